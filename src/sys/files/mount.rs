//! mount(2), umount2(2) and the abort of FUSE connections.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount};

use crate::error::{Error, Result};
pub use crate::sys::process::procfs::FS_TYPE;
use crate::sys::process::procfs::{self, MountLine};

/// Mounts the FUSE connection `fuse` on a directory for all users, with permission checks by the kernel
/// (`default_permissions`). The superblock stays writable: on a read-only superblock an open for writing fails with
/// `EROFS`, but QEMU prints its advice about `readonly=on,rom=off` only after `EACCES`. The server rejects all writes.
///
/// `source` is the first field in `/proc/mounts`; mount(8) compares it with fstab to detect an existing mount.
///
/// # Errors
/// Returns an error if mount(2) fails, with a remedy for missing privileges and a missing FUSE module.
pub fn mount_fuse(fuse: impl AsFd, source: &Path, mountpoint: &Path, noexec: bool) -> Result<()> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    if noexec {
        flags |= MountFlags::NOEXEC;
    }
    let data = format!(
        "fd={},rootmode=40555,user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576",
        fuse.as_fd().as_raw_fd()
    );
    let data = std::ffi::CString::new(data).map_err(|e| Error::failed(e.to_string()))?;
    mount(source, mountpoint, FS_TYPE, flags, Some(data.as_c_str())).map_err(|e| {
        let error = Error::io("cannot mount", mountpoint, e.into());
        match e {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                error.hint("run the command as root: mounting requires CAP_SYS_ADMIN")
            }
            rustix::io::Errno::NODEV => {
                error.hint("load the kernel module fuse (modprobe fuse), or set CONFIG_FUSE_FS")
            }
            _ => error,
        }
    })
}

/// Unmounts a mountpoint: only if the mount is unused, or with `lazy` (`MNT_DETACH`) immediately.
///
/// # Errors
/// Returns `EBUSY` if the mount is in use, and `EINVAL` if nothing is mounted there.
pub fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    // A symbolic link in place of the mountpoint must not redirect the call.
    let mut flags = UnmountFlags::NOFOLLOW;
    if lazy {
        flags |= UnmountFlags::DETACH;
    }
    Ok(rustix::mount::unmount(mountpoint, flags)?)
}

/// Returns the mount on a path, the topmost of several. Reads only `/proc`, so an unresponsive mount cannot block it.
///
/// # Errors
/// Returns an error if `/proc/self/mountinfo` cannot be read.
pub fn at(mountpoint: &Path) -> Result<Option<MountLine>> {
    Ok(procfs::mounts()?.into_iter().rfind(|mount| mount.mountpoint == mountpoint))
}

/// Resolves the symbolic links in the path of a mountpoint. A file system that is mounted there is not accessed,
/// because its server may be unresponsive. The last component need not exist.
///
/// # Errors
/// Returns an error if the parent directory does not exist or mounts cannot be listed.
pub fn place(path: &Path) -> io::Result<PathBuf> {
    let full = std::path::absolute(path)?;
    let (Some(parent), Some(name)) = (full.parent(), full.file_name()) else {
        return std::fs::canonicalize(full);
    };
    let place = std::fs::canonicalize(parent)?.join(name);
    if at(&place).map_err(io::Error::other)?.is_some() {
        return Ok(place);
    }
    match std::fs::canonicalize(&place) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(place),
        other => other,
    }
}

/// An open `abort` file of one FUSE connection. The kernel may reuse the number of a connection as soon as the
/// connection ends; an abort file that was opened before does not affect the new connection.
#[derive(Debug)]
pub struct Abort(File);

impl Abort {
    /// Opens the abort file of the connection that currently has this device number (`st_dev`), on a private instance
    /// of fusectl.
    ///
    /// # Errors
    /// Returns `ENOENT` if no such connection exists, and an error if a system call fails.
    pub fn of(device: u64) -> io::Result<Abort> {
        let root = crate::sys::fuse::control_fs::open()?;
        // Connections are named after the kernel's encoding of the device number; anonymous devices have major 0.
        let name = format!("{}/abort", rustix::fs::minor(device));
        let abort = rustix::fs::openat(&root, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Abort(abort.into()))
    }

    /// Aborts the connection: all pending and future requests fail.
    ///
    /// # Errors
    /// Returns an error if the write fails. Aborting a connection that has ended succeeds.
    pub fn now(mut self) -> io::Result<()> {
        self.0.write_all(b"1")
    }
}

/// Aborts the FUSE connection with this device number (`st_dev`): all pending and future requests fail.
///
/// # Errors
/// Returns `ENOENT` if no such connection exists, and an error if a system call fails.
pub fn abort_fuse_connection(device: u64) -> io::Result<()> {
    Abort::of(device)?.now()
}
