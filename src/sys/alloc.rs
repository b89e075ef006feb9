//! An allocator whose large zeroed blocks are present.
//!
//! The kernel copies each request of a FUSE connection into a buffer of the server. A server that is killed while the
//! first page of a fresh buffer is being made ends that request with EIO, and no successor sees it: buffers are made
//! of pages that are there.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::units::PAGE_SIZE;

/// Blocks from here on come fresh from the kernel, page by page at first touch.
const LARGE: usize = 128 << 10;

/// The system's allocator, but large zeroed blocks are touched before they are handed out.
#[derive(Debug, Clone, Copy, Default)]
pub struct PresentZeros;

// SAFETY: every call is the system allocator's with the same arguments; what it gives is only written within its
// length, with the zeros that are in it already.
unsafe impl GlobalAlloc for PresentZeros {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() && layout.size() >= LARGE {
            for at in (0..layout.size()).step_by(PAGE_SIZE as usize) {
                // SAFETY: `at` lies within the block, which is ours to write and holds zeros.
                unsafe { block.add(at).write_volatile(0) };
            }
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_zeroed_blocks_are_present() {
        let layout = Layout::from_size_align(4 << 20, 8).unwrap();
        let resident = || crate::sys::procfs::status(std::process::id()).unwrap().unwrap().rss_anon.get();
        let before = resident();
        // SAFETY: the layout is not empty; the block is given back with the same layout.
        unsafe {
            let block = PresentZeros.alloc_zeroed(layout);
            assert!(!block.is_null());
            assert!(resident() >= before + (3 << 20), "the pages are there");
            assert_eq!(*block.add(12345), 0);
            PresentZeros.dealloc(block, layout);
        }
    }
}
