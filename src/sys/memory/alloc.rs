//! Global allocators: [`ExitOnOom`] reports an out-of-memory condition and exits; [`PrefaultedZeros`] also prefaults
//! the start of large zeroed blocks.
//!
//! The kernel copies each request of a FUSE connection into a buffer of the server. If the server is killed while the
//! kernel faults in the first page of a new buffer, the request fails with EIO and cannot be resent to a successor.
//! Requests to a read-only mount fit into the start of a buffer many times over. Touching the whole buffer would cost
//! 16 MiB per thread, and time at each startup.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::units::{PAGE_SIZE, to_usize};

/// Blocks of at least this size, in bytes, are new anonymous mappings whose pages are allocated on first access.
const LARGE: usize = 128 << 10;

/// Bytes at the start of a large block that are prefaulted. A request is a header of 40 bytes, arguments, and at most
/// two names of 255 bytes; `WRITE` would need a file that is open for writing, and the mount has none.
const PREFAULT: usize = 64 << 10;

/// The system allocator, except that an allocation failure ends the process with an error message and exit code 1. The
/// standard library would abort instead, which looks like a crash.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExitOnOom;

// SAFETY: every call forwards its arguments to the system allocator; a null pointer is never returned.
unsafe impl GlobalAlloc for ExitOnOom {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        or_end(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        or_end(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        or_end(unsafe { System.realloc(block, layout, size) }, size)
    }
}

/// Makes all threads allocate from one heap, for a process whose threads do the same work in turn: with a heap for each
/// thread, every heap grows to the size of the largest request. Call this before other threads are started.
pub fn use_one_heap() {
    // SAFETY: mallopt(3) changes parameters of the allocator, under its own lock. A refusal has no effect.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn or_end(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() { out_of_memory(size) } else { block }
}

/// Prints an error and exits. Must not allocate.
#[cold]
fn out_of_memory(size: usize) -> ! {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut left = size;
    while let Some(digit) = at.checked_sub(1).and_then(|before| digits.get_mut(before)) {
        *digit = b"0123456789"[left % 10];
        (at, left) = (at - 1, left / 10);
        if left == 0 {
            break;
        }
    }
    for part in [
        b"error: out of memory: cannot allocate ".as_slice(),
        digits.get(at..).unwrap_or_default(),
        b" bytes\nhint: raise the memory limits (ulimit -v, memory.max of the cgroup) or free memory on the host\n",
    ] {
        let _ = rustix::io::write(rustix::stdio::stderr(), part);
    }
    crate::sys::process::leave(1)
}

/// Same as [`ExitOnOom`], but the start of large zeroed blocks is touched before the block is returned.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrefaultedZeros;

// SAFETY: every call forwards its arguments to `ExitOnOom`; a returned block is only written within its length, with
// the zeros that it already contains.
unsafe impl GlobalAlloc for PrefaultedZeros {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { ExitOnOom.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { ExitOnOom.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        let block = unsafe { ExitOnOom.alloc_zeroed(layout) };
        if layout.size() >= LARGE {
            for at in (0..PREFAULT).step_by(to_usize(PAGE_SIZE)) {
                // SAFETY: `at` lies within the block (PREFAULT < LARGE), which belongs to this call and contains zeros.
                unsafe { block.add(at).write_volatile(0) };
            }
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { ExitOnOom.realloc(block, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::memory::alloc::*;

    #[test]
    fn prefaults_the_start_of_large_zeroed_blocks() {
        let layout = Layout::from_size_align(4 << 20, 8).unwrap();
        let pagemap = crate::sys::memory::pagemap::Pagemap::this_process().unwrap();
        // SAFETY: the layout is not empty; the block is deallocated with the same layout.
        unsafe {
            let block = PrefaultedZeros.alloc_zeroed(layout);
            assert!(!block.is_null());
            let start = (block as u64).next_multiple_of(PAGE_SIZE);
            let entries = pagemap.entries(start..start + PREFAULT as u64 - PAGE_SIZE).unwrap();
            assert!(entries.iter().all(|entry| entry.is_present()), "all pages are present");
            assert_eq!(*block.add(12345), 0);
            PrefaultedZeros.dealloc(block, layout);
        }
    }
}
