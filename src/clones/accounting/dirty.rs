//! The pages that one clone has copied, as ranges of the template's files.

use serde::Serialize;

use super::process::measure;
use crate::clones::find::{self, CloneProcess, Inodes};
use crate::control::Mount;
use crate::error::Result;
use crate::units::{PAGE_SIZE, PageCount};

/// A range of pages that one clone has copied, in pages of the template's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DirtyRange {
    /// File of the template.
    pub file: String,
    /// First page of the range.
    pub first_page: u64,
    /// Number of pages.
    pub pages: PageCount,
    /// True if the copied pages are in swap.
    pub swapped: bool,
}

/// Returns the pages that one process has copied; `None` if it maps no template or has exited.
///
/// # Errors
/// Returns an error if a store cannot be read or the process cannot be inspected.
pub fn dirty_of(pid: u32, mounts: &[Mount]) -> Result<Option<(CloneProcess, Vec<DirtyRange>)>> {
    let Some(clone) = find::look_at(pid, &Inodes::of(mounts)?)? else { return Ok(None) };
    let Some(measured) = measure(&clone)? else { return Ok(None) };
    let mut ranges = Vec::new();
    for (map, dirty) in clone.maps.iter().zip(&measured.dirty) {
        for copy in dirty {
            ranges.push(DirtyRange {
                file: map.file.clone(),
                first_page: (map.offset.get() + copy.range.start - map.start) / PAGE_SIZE,
                pages: PageCount::new(copy.pages()),
                swapped: copy.swapped,
            });
        }
    }
    Ok(Some((clone, ranges)))
}
