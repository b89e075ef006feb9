//! Page cache residency of files: `cachestat(2)` (Linux 6.5), and `mincore(2)` on a mapping.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::mapping::Mapping;
use crate::error::{Error, Result};
use crate::units::{Bytes, FileOffset, PAGE_SIZE, PageCount, to_usize};

/// Number of the system call, the same on every architecture. The `libc` crate does not define it.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of `linux/mman.h`.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of `linux/mman.h`.
#[repr(C)]
#[derive(Default)]
struct Statistics {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Returns the number of pages of a whole file in the page cache.
///
/// # Errors
/// Same as [`cached_in`].
pub fn cached(file: impl AsFd) -> Result<PageCount> {
    cached_in(file, FileOffset::new(0), Bytes::ZERO)
}

/// Returns the number of pages of a range in the page cache. A length of 0 extends the range to the end of the file.
/// For a file of a FUSE passthrough mount the kernel reports 0: the pages belong to the backing file.
///
/// # Errors
/// Returns an error with `ENOSYS` before Linux 6.5, `EOPNOTSUPP` on hugetlbfs, and `EPERM` for a file that the caller
/// neither owns nor may write (since Linux 6.14, and in 6.13.1 and 6.12.12).
pub fn cached_in(file: impl AsFd, offset: FileOffset, length: Bytes) -> Result<PageCount> {
    let range = Range { offset: offset.get(), length: length.get() };
    let mut statistics = Statistics::default();
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: both structs outlive the call and have the kernel's layout; the kernel reads the first and writes the
    // second, and accesses nothing else.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut statistics, 0 as libc::c_uint) };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(Error::failed("cannot read page cache statistics with cachestat")
            .because(error)
            .hint("use Linux 6.5 or later, and run the command as a user who may write the file"));
    }
    Ok(PageCount::new(statistics.cached))
}

/// Returns the ranges of a mapping that are resident in memory, as byte offsets from its start. A FUSE passthrough
/// mapping reports the residency of the backing file.
///
/// # Errors
/// Returns an error if mincore(2) fails. There is no permission error: for a file that the caller neither owns nor may
/// write, the kernel reports all pages as resident.
pub fn in_core(mapping: &Mapping) -> Result<Vec<std::ops::Range<u64>>> {
    in_core_of(mapping, 0..mapping.len().get())
}

/// Same as [`in_core`], for a page-aligned part of the mapping, given as byte offsets.
///
/// # Errors
/// Same as [`in_core`], and an error for a part outside of the mapping.
pub fn in_core_of(mapping: &Mapping, part: std::ops::Range<u64>) -> Result<Vec<std::ops::Range<u64>>> {
    let failed = |e| Error::failed("cannot read page residency with mincore").because(e);
    if part.start > part.end || part.end > mapping.len().get() {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let length = to_usize(part.end - part.start);
    let mut pages = vec![0u8; Bytes::new(part.end - part.start).pages().as_usize()];
    // SAFETY: the range lies in a live mapping, and the vector has one byte for each of its pages.
    let result = unsafe {
        libc::mincore(mapping.as_ptr().add(to_usize(part.start)).cast(), length, pages.as_mut_ptr())
    };
    if result != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for (index, _) in pages.iter().enumerate().filter(|(_, byte)| **byte & 1 == 1) {
        let start = part.start + index as u64 * PAGE_SIZE;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += PAGE_SIZE,
            _ => ranges.push(start..start + PAGE_SIZE),
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use crate::sys::memory::cachestat::*;
    use std::io::Write;

    #[test]
    fn counts_pages_of_a_written_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5 * 4096]).unwrap();
        assert_eq!(cached(&file).unwrap(), PageCount::new(5));
        assert_eq!(cached_in(&file, FileOffset::new(4096), Bytes::new(8192)).unwrap(), PageCount::new(2));
    }
}
