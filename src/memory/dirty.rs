//! Copied pages as page ranges of a mapping.

use std::ops::Range;

use serde::Serialize;

use crate::error::Result;
use crate::sys::memory::pagemap::Pagemap;
use crate::units::{PAGE_SIZE, PageCount, PageIndex};

/// Consecutive copied pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PageRange {
    /// First page, as an index from the start of the mapping.
    pub first: PageIndex,
    /// Number of pages.
    pub count: PageCount,
    /// True if the copies are in swap and not in memory.
    pub swapped: bool,
}

impl PageRange {
    /// Returns the page indices.
    pub fn pages(&self) -> Range<u64> {
        self.first.get()..self.first.get() + self.count.get()
    }
}

/// Returns the copied pages of the mapping with address range `range`, as page ranges from its start.
///
/// # Errors
/// Same as [`Pagemap::dirty`].
pub fn page_ranges(pagemap: &Pagemap, range: Range<u64>) -> Result<Vec<PageRange>> {
    let start = range.start;
    let dirty = pagemap.dirty(range)?;
    Ok(dirty
        .into_iter()
        .map(|found| PageRange {
            first: PageIndex::new((found.range.start - start) / PAGE_SIZE),
            count: PageCount::new(found.pages()),
            swapped: found.swapped,
        })
        .collect())
}
