//! Copied pages that were written since they were write-protected, in mappings that their process has registered with a
//! userfaultfd for asynchronous write protection ([`userfault`](crate::sys::memory::userfault)).
//!
//! The kernel applies the protection to the address space of the pagemap, whichever process asks (`pagemap_scan` in
//! `fs/proc/task_mmu.c`). The next write removes it and does not wait for anything.

use std::ops::Range;

use super::{Categories, NOT_COPIED, Pagemap, Query};
use crate::error::Result;
use crate::units::PAGE_SIZE;

impl Pagemap {
    /// Returns true if the mapping at this page-aligned address is registered.
    ///
    /// # Errors
    /// Same as [`Pagemap::scan`].
    pub fn tracks_writes(&self, address: u64) -> Result<bool> {
        let query = Query { all: Categories::WRITE_TRACKED, ..Query::default() };
        Ok(!self.scan(address..address + PAGE_SIZE, &query)?.is_empty())
    }

    /// Returns the copied pages of registered mappings that are not write-protected: those that were written since
    /// [`Pagemap::protect_copies`], or never protected.
    ///
    /// # Errors
    /// Same as [`Pagemap::scan`].
    pub fn written_copies(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.copies(range, false)
    }

    /// Write-protects these pages, each when the scan finds it, and returns them.
    ///
    /// # Errors
    /// Same as [`Pagemap::scan`], and an error if a mapping in the range is not registered.
    pub fn protect_copies(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.copies(range, true)
    }

    fn copies(&self, range: Range<u64>, protect: bool) -> Result<Vec<Range<u64>>> {
        let query = Query {
            all: Categories::WRITTEN,
            none: NOT_COPIED,
            any: Categories::PRESENT | Categories::SWAPPED,
            protect,
            ..Query::default()
        };
        Ok(self.scan(range, &query)?.into_iter().map(|region| region.range).collect())
    }
}
