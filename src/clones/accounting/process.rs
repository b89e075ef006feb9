//! The memory of one clone: copied pages, page tables, and memory outside template mappings.

use std::ops::Range;

use serde::Serialize;

use crate::clones::find::CloneProcess;
use crate::error::{Code, Result};
use crate::sys::memory::pagemap::{Categories, Pagemap, Query};
use crate::sys::process::procfs;
use crate::units::{Bytes, PageCount};

/// User addresses on x86-64 with four-level page tables. With five levels, addresses above need an explicit hint to
/// mmap(2) (Documentation/arch/x86/x86_64/5level-paging.rst), which VMMs do not give.
const ADDRESS_SPACE: Range<u64> = 0..0x7FFF_FFFF_F000;

/// Memory of one clone, in bytes unless the name says pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CloneMemory {
    /// Size of the template mappings.
    pub mapped_bytes: Bytes,
    /// Template pages that the page tables map unchanged. A mapped page need not have been accessed.
    pub mapped_clean_bytes: Bytes,
    /// Copied template pages in RAM.
    pub private_bytes: Bytes,
    /// Copied template pages in swap. They take no RAM.
    pub swap_bytes: Bytes,
    /// Copied template pages, in RAM and in swap.
    pub dirty_pages: PageCount,
    /// Page tables (`VmPTE`).
    pub page_table_bytes: Bytes,
    /// Private memory outside template mappings, in RAM.
    pub overhead_bytes: Bytes,
    /// Disks in a file system without other storage; 0 for disks on storage of the host.
    pub disk_bytes: Bytes,
    /// Part of `mapped_clean_bytes` that 2 MiB entries map.
    pub pmd_mapped_bytes: Bytes,
}

/// The memory of one clone, and its addresses.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Memory figures.
    pub memory: CloneMemory,
    /// Copied pages of each mapping, in the order of the mappings.
    pub dirty: Vec<Vec<crate::sys::memory::pagemap::DirtyRange>>,
    /// Addresses of the private memory outside template mappings.
    pub overhead: Vec<Range<u64>>,
    /// Name of the command.
    pub command: String,
    /// Real user id.
    pub uid: u32,
    /// Control group.
    pub cgroup: String,
}

/// Measures one clone. Returns `None` if the clone has exited.
///
/// # Errors
/// Returns an error if the process cannot be inspected.
pub fn measure(clone: &CloneProcess) -> Result<Option<Measured>> {
    match inspect(clone) {
        Err(error) if error.code() == Code::NotFound => Ok(None),
        other => other,
    }
}

fn inspect(clone: &CloneProcess) -> Result<Option<Measured>> {
    let pagemap = Pagemap::open(clone.pid)?;
    // The kernel may have reused the process id. The open pagemap is bound to one address space, so a later reuse does
    // not change what is read.
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

/// Selects unchanged pages of the file.
fn clean() -> Query {
    Query { all: Categories::FILE | Categories::PRESENT, report: Categories::HUGE, ..Query::default() }
}

/// Returns the address ranges of anonymous memory outside the template mappings, in order.
fn outside(clone: &CloneProcess, pagemap: &Pagemap) -> Result<Vec<Range<u64>>> {
    let anonymous = Query {
        all: Categories::PRESENT,
        none: Categories::FILE | Categories::ZERO | Categories::GUARD,
        ..Query::default()
    };
    let present = pagemap.scan(ADDRESS_SPACE, &anonymous)?.into_iter().map(|region| region.range).collect();
    // Data pages of the kernel ([vvar]) look like private memory, but exist only once.
    let kernel = procfs::maps(clone.pid, |dev, ino| dev == 0 && ino == 0)?.unwrap_or_default();
    let mut skip: Vec<Range<u64>> = clone.maps.iter().map(|map| map.range()).collect();
    skip.extend(kernel.iter().filter(|line| line.path.starts_with("[v")).map(|line| line.start..line.end));
    skip.sort_unstable_by_key(|range| range.start);
    Ok(subtract(present, &skip))
}

/// Returns the parts of the sorted `ranges` that are in none of the sorted `skip`.
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
    fn subtracts_ranges() {
        let ranges = vec![0..10, 20..30, 40..50];
        assert_eq!(subtract(ranges.clone(), &[]), ranges);
        assert_eq!(subtract(ranges.clone(), &[5..25, 28..29, 50..60]), [0..5, 25..28, 29..30, 40..50]);
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
        let everything = [0..100];
        assert_eq!(subtract(ranges, &everything), []);
    }
}
