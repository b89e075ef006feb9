//! What was copied, in pages of a mapping.

use std::ops::Range;

use serde::Serialize;

use crate::error::Result;
use crate::sys::pagemap::Pagemap;
use crate::units::{PAGE_SIZE, PageCount, PageIndex};

/// Neighbouring copied pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PageRange {
    /// First page, counted from the start of the mapping.
    pub first: PageIndex,
    /// How many.
    pub count: PageCount,
    /// True when the copies lie in swap and hold no RAM.
    pub swapped: bool,
}

impl PageRange {
    /// The page numbers.
    pub fn pages(&self) -> Range<u64> {
        self.first.get()..self.first.get() + self.count.get()
    }
}

/// The copied pages of a mapping that lies at `range`, counted from its start.
///
/// # Errors
/// As [`Pagemap::dirty`].
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
