//! Write protection by userfaultfd, as a VMM arms it to find written pages.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use stencilfs::sys::memory::mapping::Mapping;

/// Enables asynchronous write protection by userfaultfd on a mapping. Closing the returned file disables it.
pub fn arm_write_protection(map: &Mapping) -> File {
    const API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
    const WRITE_PROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
    let (unpopulated, asynchronous) = (1u64 << 13, 1u64 << 15);
    let range = map.range();
    let length = range.end - range.start;
    let mut api = [0xaa, unpopulated | asynchronous, 0];
    let mut register = [range.start, length, 2, 0];
    let mut protect = [range.start, length, 1];
    // SAFETY: each argument is an array with the size that the ioctl number encodes; the range is that of the mapping,
    // and write protection changes no byte of it.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) as i32;
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        let file = File::from_raw_fd(fd);
        for (request, argument) in [
            (API, api.as_mut_ptr()),
            (REGISTER, register.as_mut_ptr()),
            (WRITE_PROTECT, protect.as_mut_ptr()),
        ] {
            let done = libc::ioctl(fd, request, argument);
            assert_eq!(done, 0, "{request:#x}: {}", io::Error::last_os_error());
        }
        file
    }
}
