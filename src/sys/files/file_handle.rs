//! Opens a file by inode number, without a path (`open_by_handle_at(2)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use crate::error::{Error, Result};

/// `FILEID_INO64_GEN` of the kernel's `exportfs.h`: the type of file handles for FUSE inodes.
const FILEID_INO64_GEN: i32 = 0x81;

/// `struct file_handle` with the three words of a `FILEID_INO64_GEN` handle.
#[repr(C)]
struct FuseHandle {
    bytes: u32,
    kind: i32,
    node_high: u32,
    node_low: u32,
    generation: u32,
}

/// Opens inode `node` for reading, on the FUSE file system that contains the file `inside`. Returns `None` if the
/// kernel has no such inode in memory; the page cache then holds no pages of the inode.
///
/// # Errors
/// Returns an error without `CAP_DAC_READ_SEARCH`, and if the server rejects the open.
pub fn open_fuse_inode(inside: impl AsFd, node: u64) -> Result<Option<File>> {
    let mut handle = FuseHandle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        node_high: (node >> 32) as u32,
        node_low: (node & 0xffff_ffff) as u32,
        generation: 0,
    };
    let mount = inside.as_fd().as_raw_fd();
    // SAFETY: the struct has the layout of file_handle, and its first field is the 12 bytes after the header; the
    // kernel only reads the struct, which outlives the call.
    let fd =
        unsafe { libc::open_by_handle_at(mount, (&raw mut handle).cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd >= 0 {
        // SAFETY: the call returned a new descriptor without another owner.
        return Ok(Some(unsafe { File::from_raw_fd(fd) }));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ESTALE) => Ok(None),
        _ => Err(Error::failed(format!("cannot open inode {node} by file handle"))
            .because(error)
            .hint("run the command as root")),
    }
}
