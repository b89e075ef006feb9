//! What one clone holds: its copies, its page tables, its own memory.

use std::ops::Range;

use serde::Serialize;

use crate::clones::find::CloneProcess;
use crate::error::{Code, Result};
use crate::sys::pagemap::{Categories, Pagemap, Query};
use crate::sys::procfs;
use crate::units::{Bytes, PageCount};

/// User addresses end here on x86-64 with four levels; programs that ask for more do not exist among clones.
const ADDRESS_SPACE: Range<u64> = 0..0x7FFF_FFFF_F000;

/// Memory of one clone, in bytes unless the name says pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CloneMemory {
    /// Size of its template mappings.
    pub mapped_bytes: Bytes,
    /// Pages of templates that its page tables map unchanged: a mapping, not a use.
    pub mapped_clean_bytes: Bytes,
    /// Its copies of template pages, in RAM.
    pub private_bytes: Bytes,
    /// Its copies of template pages, in swap: no RAM.
    pub swap_bytes: Bytes,
    /// Its copies of template pages, in RAM and in swap.
    pub dirty_pages: PageCount,
    /// Its page tables (`VmPTE`).
    pub page_table_bytes: Bytes,
    /// Its private memory outside template mappings, in RAM.
    pub overhead_bytes: Bytes,
    /// Its disks, where they lie in RAM and nowhere else; 0 where a disk of the host has them.
    pub disk_bytes: Bytes,
    /// Part of `mapped_clean_bytes` that is mapped by 2 MiB entries.
    pub pmd_mapped_bytes: Bytes,
}

/// The memory of one clone, and where it lies.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The figures.
    pub memory: CloneMemory,
    /// Its copies, for each of its mappings in order: addresses, and whether they are in swap.
    pub dirty: Vec<Vec<crate::sys::pagemap::DirtyRange>>,
    /// Addresses of its private memory outside template mappings.
    pub overhead: Vec<Range<u64>>,
    /// Name of its command.
    pub command: String,
    /// Its user.
    pub uid: u32,
    /// Its control group.
    pub cgroup: String,
}

/// Measures one clone; `None` when it has ended.
///
/// # Errors
/// When the process may not be looked into.
pub fn measure(clone: &CloneProcess) -> Result<Option<Measured>> {
    match look_into(clone) {
        Err(error) if error.code() == Code::NotFound => Ok(None),
        other => other,
    }
}

fn look_into(clone: &CloneProcess) -> Result<Option<Measured>> {
    let pagemap = Pagemap::open(clone.pid)?;
    // The pid may have been given away since; with the pagemap open it cannot happen any more unseen.
    if !clone.process().is_alive() {
        return Ok(None);
    }
    let mut memory = CloneMemory::default();
    let mut dirty = Vec::with_capacity(clone.maps.len());
    for map in &clone.maps {
        memory.mapped_bytes += map.length;
        let copies = pagemap.dirty(map.range())?;
        for copy in &copies {
            let pages = PageCount::new(copy.pages());
            memory.dirty_pages += pages;
            *(if copy.swapped { &mut memory.swap_bytes } else { &mut memory.private_bytes }) += pages.bytes();
        }
        dirty.push(copies);
        for region in pagemap.scan(map.range(), &clean())? {
            let bytes = Bytes::new(region.range.end - region.range.start);
            memory.mapped_clean_bytes += bytes;
            if region.categories.contains(Categories::HUGE) {
                memory.pmd_mapped_bytes += bytes;
            }
        }
    }
    let overhead = outside(clone, &pagemap)?;
    memory.overhead_bytes = overhead.iter().map(|range| Bytes::new(range.end - range.start)).sum();
    let Some(status) = procfs::status(clone.pid)? else { return Ok(None) };
    memory.page_table_bytes = status.page_tables;
    let Some(cgroup) = procfs::cgroup(clone.pid)? else { return Ok(None) };
    Ok(Some(Measured { memory, dirty, overhead, command: status.name, uid: status.uid, cgroup }))
}

/// Unchanged pages of the file.
fn clean() -> Query {
    Query { all: Categories::FILE | Categories::PRESENT, report: Categories::HUGE, ..Query::default() }
}

/// Anonymous memory outside the template mappings, as address ranges in order.
fn outside(clone: &CloneProcess, pagemap: &Pagemap) -> Result<Vec<Range<u64>>> {
    let anonymous = Query {
        all: Categories::PRESENT,
        none: Categories::FILE | Categories::ZERO | Categories::GUARD,
        ..Query::default()
    };
    let present = pagemap.scan(ADDRESS_SPACE, &anonymous)?.into_iter().map(|region| region.range).collect();
    // The kernel's own data pages ([vvar]) look like private memory and are one copy for all.
    let kernel = procfs::maps(clone.pid, |dev, ino| dev == 0 && ino == 0)?.unwrap_or_default();
    let mut skip: Vec<Range<u64>> = clone.maps.iter().map(|map| map.range()).collect();
    skip.extend(kernel.iter().filter(|line| line.path.starts_with("[v")).map(|line| line.start..line.end));
    skip.sort_unstable_by_key(|range| range.start);
    Ok(subtract(present, &skip))
}

/// The parts of sorted `ranges` that lie in none of sorted `skip`.
fn subtract(ranges: Vec<Range<u64>>, skip: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::with_capacity(ranges.len());
    for range in ranges {
        let mut start = range.start;
        let first = skip.partition_point(|s| s.end <= range.start);
        for hole in skip[first..].iter().take_while(|s| s.start < range.end) {
            if hole.start > start {
                left.push(start..hole.start);
            }
            start = start.max(hole.end);
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtracting_ranges() {
        let ranges = vec![0..10, 20..30, 40..50];
        assert_eq!(subtract(ranges.clone(), &[]), ranges);
        assert_eq!(subtract(ranges.clone(), &[5..25, 28..29, 50..60]), [0..5, 25..28, 29..30, 40..50]);
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
        let everything = [0..100];
        assert_eq!(subtract(ranges, &everything), []);
    }
}
