//! Allocators: one that names the cause when there is no memory, and one whose large zeroed blocks begin with pages that
//! are present.
//!
//! The kernel copies each request of a FUSE connection into a buffer of the server. A server that is killed while the
//! first page of a fresh buffer is being made ends that request with EIO, and no successor sees it. The requests that a
//! read-only mount is asked fit into the begin of a buffer many times; touching all of it would cost 16 MiB a thread,
//! and time at every start.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::units::PAGE_SIZE;

/// Blocks from here on come fresh from the kernel, page by page at first touch.
const LARGE: usize = 128 << 10;

/// So much of one is touched: a request is a header of 40 bytes, arguments, and at most two names of 255 bytes; a
/// `WRITE` needs a file that is open for writing, and none is.
const BEGIN: usize = 64 << 10;

/// The system's allocator. Where it has no memory the process ends with an error message and exit code 1: the standard
/// library would abort, which looks like a fault of the program.
#[derive(Debug, Clone, Copy, Default)]
pub struct OrEnd;

// SAFETY: every call is the system allocator's with the same arguments; a null pointer is never handed on.
unsafe impl GlobalAlloc for OrEnd {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        or_end(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        or_end(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        or_end(unsafe { System.realloc(block, layout, size) }, size)
    }
}

fn or_end(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() { out_of_memory(size) } else { block }
}

/// Nothing here allocates.
#[cold]
fn out_of_memory(size: usize) -> ! {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut left = size;
    while let Some(digit) = at.checked_sub(1).and_then(|before| digits.get_mut(before)) {
        *digit = b'0' + (left % 10) as u8;
        (at, left) = (at - 1, left / 10);
        if left == 0 {
            break;
        }
    }
    for part in [
        b"stencil: out of memory: cannot allocate ".as_slice(),
        digits.get(at..).unwrap_or_default(),
        b" bytes\nstencil: raise the limits on memory: ulimit -v, memory.max of the control group; or free memory \
          on the host\n",
    ] {
        let _ = rustix::io::write(rustix::stdio::stderr(), part);
    }
    super::process::leave(1)
}

/// As [`OrEnd`], and the begin of large zeroed blocks is touched before they are handed out.
#[derive(Debug, Clone, Copy, Default)]
pub struct PresentZeros;

// SAFETY: every call is the allocator's above with the same arguments; what it gives is only written within its
// length, with the zeros that are in it already.
unsafe impl GlobalAlloc for PresentZeros {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { OrEnd.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { OrEnd.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        let block = unsafe { OrEnd.alloc_zeroed(layout) };
        if layout.size() >= LARGE {
            for at in (0..BEGIN).step_by(PAGE_SIZE as usize) {
                // SAFETY: `at` lies within the block (BEGIN is less than LARGE), which is ours to write and holds zeros.
                unsafe { block.add(at).write_volatile(0) };
            }
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { OrEnd.realloc(block, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_zeroed_blocks_begin_with_present_pages() {
        let layout = Layout::from_size_align(4 << 20, 8).unwrap();
        let pagemap = crate::sys::pagemap::Pagemap::this_process().unwrap();
        // SAFETY: the layout is not empty; the block is given back with the same layout.
        unsafe {
            let block = PresentZeros.alloc_zeroed(layout);
            assert!(!block.is_null());
            let begin = (block as u64).next_multiple_of(PAGE_SIZE);
            let entries = pagemap.entries(begin..begin + BEGIN as u64 - PAGE_SIZE).unwrap();
            assert!(entries.iter().all(|entry| entry.is_present()), "the pages are there");
            assert_eq!(*block.add(12345), 0);
            PresentZeros.dealloc(block, layout);
        }
    }
}
