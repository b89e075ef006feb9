//! How much of a file is in the page cache: `cachestat(2)` (Linux 6.5), and `mincore(2)` through a mapping.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::error::{Error, Result};
use crate::sys::mapping::Mapping;
use crate::units::{Bytes, FileOffset, PAGE_SIZE, PageCount};

/// Number of the system call on every architecture; the `libc` crate has no name for it.
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
struct Answer {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Pages of the whole file that are in the page cache.
///
/// # Errors
/// See [`cached_in`].
pub fn cached(file: impl AsFd) -> Result<PageCount> {
    cached_in(file, FileOffset::new(0), Bytes::ZERO)
}

/// Pages of a range that are in the page cache; a length of 0 means to the end of the file.
/// The file of a FUSE passthrough mount says 0: ask its backing file.
///
/// # Errors
/// `ENOSYS` before Linux 6.5, `EOPNOTSUPP` on hugetlbfs, `EPERM` on a file that the caller may neither
/// write nor owns (Linux 6.13).
pub fn cached_in(file: impl AsFd, offset: FileOffset, length: Bytes) -> Result<PageCount> {
    let range = Range { offset: offset.get(), length: length.get() };
    let mut answer = Answer::default();
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: both structs live across the call and have the kernel's layout; the kernel reads the
    // first and writes the second, nothing else; a bad descriptor is an error number.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut answer, 0 as libc::c_uint) };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(Error::failed("cachestat failed")
            .because(error)
            .remedy("page cache figures need Linux 6.5 and the right to open the file"));
    }
    Ok(PageCount::new(answer.cached))
}

/// The parts of a mapping whose pages are in RAM, as offsets from its start. Through a FUSE passthrough
/// mapping this sees the backing file.
///
/// # Errors
/// Whatever `mincore` gives; `EPERM` does not exist, a file of another user reads as fully in RAM.
pub fn in_core(mapping: &Mapping) -> Result<Vec<std::ops::Range<u64>>> {
    let mut pages = vec![0u8; mapping.len().pages().as_usize()];
    // SAFETY: the range is a live mapping, and the answer has one byte for each of its pages.
    let result =
        unsafe { libc::mincore(mapping.as_ptr().cast(), mapping.len().as_usize(), pages.as_mut_ptr()) };
    if result != 0 {
        return Err(Error::failed("mincore failed").because(io::Error::last_os_error()));
    }
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for (index, _) in pages.iter().enumerate().filter(|(_, byte)| **byte & 1 == 1) {
        let start = index as u64 * PAGE_SIZE;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += PAGE_SIZE,
            _ => ranges.push(start..start + PAGE_SIZE),
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn counts_pages_of_a_written_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5 * 4096]).unwrap();
        assert_eq!(cached(&file).unwrap(), PageCount::new(5));
        assert_eq!(cached_in(&file, FileOffset::new(4096), Bytes::new(8192)).unwrap(), PageCount::new(2));
    }
}
