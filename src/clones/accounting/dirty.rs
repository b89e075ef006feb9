//! The dirty pages of one clone, as ranges of the template's files.

use std::ops::Range;

use serde::Serialize;

use super::frames::Shared;
use super::process::{Measured, measure};
use crate::clones::find::{self, CloneProcess, Inodes, TemplateMapping};
use crate::clones::zero_memory::ZeroMemory;
use crate::control::Mount;
use crate::error::Result;
use crate::store::Digest;
use crate::sys::memory::pagemap;
use crate::units::{PAGE_SIZE, PageCount};

/// A range of dirty pages of one clone, in pages of the template's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DirtyRange {
    /// File of the template.
    pub file: String,
    /// First page of the range.
    pub first_page: u64,
    /// Number of pages.
    pub pages: PageCount,
    /// Address of the first page in the process; null if `/proc/PID/maps` does not show which memory has replaced the page.
    pub address: Option<u64>,
    /// True if the pages are in swap.
    pub swapped: bool,
    /// True if the process has mapped other memory over the template. Anonymous pages without a write contain zeros.
    pub replaced: bool,
    /// The template.
    #[serde(skip)]
    pub digest: Digest,
}

/// Returns the dirty pages of one process in the order of their addresses; `None` if the process maps no template or
/// has exited.
///
/// # Errors
/// Returns an error if a store cannot be read or the process cannot be inspected.
pub fn dirty_of(pid: u32, mounts: &[Mount]) -> Result<Option<(CloneProcess, Vec<DirtyRange>)>> {
    let Some((clone, measured)) = measure_of(pid, &Inodes::of(mounts)?)? else { return Ok(None) };
    let ranges = ranges(&clone.maps, &measured);
    Ok(Some((clone, ranges)))
}

/// Measures one process; `None` if the process maps none of these files or has exited.
///
/// # Errors
/// Returns an error if the tables of a template cannot be read or the process cannot be inspected.
pub fn measure_of(pid: u32, inodes: &Inodes) -> Result<Option<(CloneProcess, Measured)>> {
    let Some(mut clone) = find::look_at(pid, inodes)? else { return Ok(None) };
    let measured = measure(&mut clone, &ZeroMemory::new(inodes), Shared::Nothing)?;
    Ok(measured.map(|measured| (clone, measured)))
}

fn ranges(maps: &[TemplateMapping], measured: &Measured) -> Vec<DirtyRange> {
    let mut ranges = Vec::new();
    for (map, copied) in maps.iter().zip(&measured.copied) {
        ranges.extend(
            copied.iter().map(|copy| (copy.range.start, range(map, &copy.range, copy.swapped, false))),
        );
    }
    for (replaced, private) in &measured.replaced {
        let map = &maps[replaced.map];
        for (part, swapped) in parts(&replaced.range, private) {
            let mut range = range(map, &part, swapped, true);
            range.address = range.address.filter(|_| replaced.is_certain);
            ranges.push((part.start, range));
        }
    }
    ranges.sort_by_key(|(address, _)| *address);
    ranges.into_iter().map(|(_, range)| range).collect()
}

fn range(map: &TemplateMapping, addresses: &Range<u64>, swapped: bool, replaced: bool) -> DirtyRange {
    DirtyRange {
        file: map.file.clone(),
        // A replaced page may lie before the mapping.
        first_page: map.offset.get().wrapping_add(addresses.start).wrapping_sub(map.start) / PAGE_SIZE,
        pages: PageCount::new((addresses.end - addresses.start) / PAGE_SIZE),
        address: Some(addresses.start),
        swapped,
        replaced,
        digest: map.digest,
    }
}

/// Splits a range of replaced pages into parts that are in swap and parts that are not.
fn parts(whole: &Range<u64>, private: &[pagemap::DirtyRange]) -> Vec<(Range<u64>, bool)> {
    let mut parts = Vec::new();
    let mut start = whole.start;
    for swapped in private.iter().filter(|range| range.swapped) {
        if start < swapped.range.start {
            parts.push((start..swapped.range.start, false));
        }
        parts.push((swapped.range.clone(), true));
        start = swapped.range.end;
    }
    if start < whole.end {
        parts.push((start..whole.end, false));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_pages_in_swap_are_parts_of_their_range() {
        let private = |range, swapped| pagemap::DirtyRange { range, swapped };
        let found = [private(10..12, false), private(12..14, true), private(18..20, true)];
        assert_eq!(
            parts(&(10..20), &found),
            [(10..12, false), (12..14, true), (14..18, false), (18..20, true)]
        );
        assert_eq!(parts(&(10..20), &[]), [(10..20, false)]);
    }
}
