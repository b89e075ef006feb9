//! userfaultfd(2): asynchronous write protection, and the processes that handle the page faults of others.
//!
//! Asynchronous write protection makes the later writes of a process visible in its pagemap. Only the process itself can
//! register its mappings. Any process that may read its pagemap can then protect pages and read which of them were
//! written ([`Pagemap`](super::pagemap::Pagemap)).

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result};
use crate::sys::process::tasks;

/// `UFFD_USER_MODE_ONLY` of `linux/userfaultfd.h`: needs no privilege. It concerns faults that a process handles; of
/// these there are none.
const USER_MODE_ONLY: libc::c_int = 1;

/// `UFFDIO_API` and `UFFDIO_REGISTER`.
const API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;

/// `UFFD_API`.
const API_VERSION: u64 = 0xaa;

/// `UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC` (Linux 6.7). Without the first, anonymous memory is not reported
/// as protectable.
const FEATURES: u64 = 1 << 13 | 1 << 15;

/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WRITE_PROTECT: u64 = 2;

/// Registers the mappings in a page-aligned address range of this process. No page is write-protected. Closing the
/// returned descriptor ends the registration.
///
/// # Errors
/// Returns an error if the kernel has no asynchronous write protection, or if a part of the range is not mapped.
pub fn track_writes(range: Range<u64>) -> Result<OwnedFd> {
    let failed = |e: io::Error| {
        Error::failed("cannot register memory for asynchronous write protection").because(e).hint(
            "use Linux 6.7 or later with CONFIG_USERFAULTFD, and allow userfaultfd(2) in the seccomp filter",
        )
    };
    let mut api = [API_VERSION, FEATURES, 0];
    let mut register = [range.start, range.end - range.start, MODE_WRITE_PROTECT, 0];
    // SAFETY: userfaultfd takes flags only. Each argument is an array with the size that the ioctl number encodes. The
    // registration changes neither a byte nor an access right of the range.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return Err(failed(io::Error::last_os_error())) };
        let fd = OwnedFd::from_raw_fd(fd);
        for (request, argument) in [(API, api.as_mut_ptr()), (REGISTER, register.as_mut_ptr())] {
            if libc::ioctl(fd.as_raw_fd(), request, argument) != 0 {
                return Err(failed(io::Error::last_os_error()));
            }
        }
        Ok(fd)
    }
}

/// An open userfaultfd of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Userfaultfd {
    /// A thread that has it open.
    thread: u32,
    number: u64,
}

/// Returns the userfaultfds that a process has open. Empty if they cannot be listed.
pub fn userfaultfds(pid: u32) -> Vec<Userfaultfd> {
    let mut found = Vec::new();
    for folder in tasks::file_tables(pid).unwrap_or_default() {
        let Some(thread) = tasks::thread_of(&folder) else { continue };
        for entry in fs::read_dir(folder.join("fd")).into_iter().flatten().flatten() {
            let is_userfaultfd =
                fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]");
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            found.extend(number.filter(|_| is_userfaultfd).map(|number| Userfaultfd { thread, number }));
        }
    }
    found
}

/// Returns true if two descriptors are of one userfaultfd, so that one process handles page faults of the other.
pub fn is_same(one: Userfaultfd, other: Userfaultfd) -> bool {
    /// `KCMP_FILE` of `linux/kcmp.h`.
    const FILE: libc::c_int = 0;
    let (first, second) = (one.thread.cast_signed(), other.thread.cast_signed());
    // SAFETY: kcmp compares two open files and accesses no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, first, second, FILE, one.number, other.number) == 0 }
}

/// Returns true if a mapping of the process is registered with a userfaultfd. False if its mappings cannot be read.
pub fn is_registered(pid: u32) -> bool {
    let read = |folder: &std::path::Path| -> io::Result<Option<bool>> {
        let mut has_mappings = false;
        for line in BufReader::new(fs::File::open(folder.join("smaps"))?).split(b'\n') {
            let line = line?;
            let Some(flags) = line.strip_prefix(b"VmFlags:") else { continue };
            has_mappings = true;
            // Missing pages, write protection, minor faults (`show_smap_vma_flags` of `fs/proc/task_mmu.c`).
            if flags.split(|byte| *byte == b' ').any(|flag| matches!(flag, b"um" | b"uw" | b"ui")) {
                return Ok(Some(true));
            }
        }
        Ok(has_mappings.then_some(false))
    };
    matches!(tasks::through_memory(pid, read), Ok(Some(true)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::mapping::{Mapping, Protection, Request, Sharing};
    use crate::units::Bytes;

    #[test]
    fn a_registered_process_and_its_descriptor_are_found() {
        let me = std::process::id();
        let request = Request {
            length: Bytes::new(1 << 20),
            align: Bytes::new(4096),
            file: None,
            protection: Protection::ReadWrite,
            sharing: Sharing::Private,
            reserve: false,
            sync: false,
        };
        let memory = Mapping::new(&request).unwrap();
        let fd = track_writes(memory.range()).unwrap();
        let number = u64::from(fd.as_raw_fd().unsigned_abs());
        let found = userfaultfds(me);
        let ours = found.iter().find(|its| its.number == number).copied().unwrap();
        assert!(is_registered(me) && is_same(ours, ours));
        let copy = fd.try_clone().unwrap();
        let copied = Userfaultfd { number: u64::from(copy.as_raw_fd().unsigned_abs()), ..ours };
        assert!(is_same(ours, copied));
        let other = track_writes(memory.range().end..memory.range().end);
        assert!(other.is_err(), "an empty range");
        assert!(!is_same(ours, Userfaultfd { number: 0, ..ours }));
    }
}
