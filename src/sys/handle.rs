//! Opens a file by its inode number (`open_by_handle_at(2)`), without a path.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use crate::error::{Error, Result};

/// `FILEID_INO64_GEN` of the kernel's `exportfs.h`: the kind of handle that FUSE makes.
const FILEID_INO64_GEN: i32 = 0x81;

/// `struct file_handle` with the three words of that kind.
#[repr(C)]
struct FuseHandle {
    bytes: u32,
    kind: i32,
    node_high: u32,
    node_low: u32,
    generation: u32,
}

/// Opens the inode `node` of the FUSE file system that `inside` lies in, for reading, if the kernel holds
/// that inode now; `None` if it does not, and then nothing of it is in the page cache either.
///
/// # Errors
/// Without `CAP_DAC_READ_SEARCH`, or when the server refuses the open.
pub fn open_fuse_inode(inside: impl AsFd, node: u64) -> Result<Option<File>> {
    let mut handle = FuseHandle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        node_high: (node >> 32) as u32,
        node_low: node as u32,
        generation: 0,
    };
    let mount = inside.as_fd().as_raw_fd();
    // SAFETY: the struct has the layout of file_handle with 12 bytes behind its header, which is what
    // its first field says; the kernel only reads it, and it lives across the call.
    let fd =
        unsafe { libc::open_by_handle_at(mount, (&raw mut handle).cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd >= 0 {
        // SAFETY: a descriptor that this call has just opened and nobody else knows.
        return Ok(Some(unsafe { File::from_raw_fd(fd) }));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ESTALE) => Ok(None),
        _ => Err(Error::failed(format!("cannot open inode {node} by its handle"))
            .because(error)
            .remedy("run it as root")),
    }
}
