//! mount(2) and its relatives: attach a FUSE connection, take it away, abort it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount};

use super::procfs::{self, MountLine};
use crate::error::{Error, Result};

/// Type of a mount of ours in `/proc/mounts`.
pub const FS_TYPE: &str = "fuse.stencil";

/// Mounts the FUSE connection behind `fuse` on a directory, with the permission checks of the kernel and for all users.
/// The superblock stays writable: on a read-only one a writable open would be `EROFS`, and QEMU tells its user about
/// `readonly=on,rom=off` only after `EACCES`. Every write-like call is refused by the server.
///
/// `source` is what `/proc/mounts` names: mount(8) compares it with fstab before it mounts a second time.
///
/// # Errors
/// The kernel's; `EPERM` says what is missing.
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
                error.remedy("mounting needs CAP_SYS_ADMIN: run it as root")
            }
            rustix::io::Errno::NODEV => {
                error.remedy("the kernel has no FUSE: load the module `fuse` or set CONFIG_FUSE_FS")
            }
            _ => error,
        }
    })
}

/// Takes a mount out of the tree, if nobody uses it or, with `lazy`, at once.
///
/// # Errors
/// `EBUSY` while it is in use; `EINVAL` where nothing is mounted there.
pub fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    // A symbolic link put in the mountpoint's place must not lead the call elsewhere.
    let mut flags = UnmountFlags::NOFOLLOW;
    if lazy {
        flags |= UnmountFlags::DETACH;
    }
    Ok(rustix::mount::unmount(mountpoint, flags)?)
}

/// What is mounted on a path, of several the one that is seen; nobody is asked but `/proc`.
///
/// # Errors
/// When `/proc/self/mountinfo` cannot be read.
pub fn at(mountpoint: &Path) -> Result<Option<MountLine>> {
    Ok(procfs::mounts()?.into_iter().rfind(|mount| mount.mountpoint == mountpoint))
}

/// A mountpoint's path without symbolic links. What is mounted there is not asked: nobody may answer for it. The last
/// part need not exist.
///
/// # Errors
/// When there is no such folder, or mounts cannot be listed.
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

/// Aborts the FUSE connection of that device number (`st_dev`): every waiting and every later request fails.
/// Uses a private instance of fusectl that is attached nowhere.
///
/// # Errors
/// `ENOENT` where no such connection exists; else the kernel's.
pub fn abort_fuse_connection(device: u64) -> io::Result<()> {
    let root = super::fusectl::open()?;
    // Connections are named after the kernel's own form of the device number; anonymous ones have major 0.
    let name = format!("{}/abort", rustix::fs::minor(device));
    let abort = rustix::fs::openat(&root, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(abort).write_all(b"1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_mount_is_found_without_asking_it() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        let (mnt, link) = (real.join("mnt"), real.join("link"));
        std::fs::create_dir(&mnt).unwrap();
        std::os::unix::fs::symlink(&mnt, &link).unwrap();
        std::os::unix::fs::symlink(&real, real.join("again")).unwrap();
        // Nobody answers on this connection: whoever asks it waits for ever.
        let fuse = crate::sys::fuse_dev::open().unwrap();
        mount_fuse(&fuse, &real, &mnt, false).unwrap();
        let places = [mnt.clone(), real.join("again/mnt"), real.join("mnt/")].map(|path| place(&path));
        let there = at(&mnt);
        unmount(&mnt, true).unwrap();
        for place in places {
            assert_eq!(place.unwrap(), mnt);
        }
        assert_eq!(there.unwrap().unwrap().fs_type, FS_TYPE);
        assert_eq!(at(&mnt).unwrap(), None);
        assert_eq!(place(&link).unwrap(), mnt, "a link to a mountpoint is followed");
        assert_eq!(place(&real.join("again/missing")).unwrap(), real.join("missing"));
        assert!(place(Path::new("/no/such/place")).is_err());
        assert_eq!(place(Path::new("/")).unwrap(), Path::new("/"));
    }

    #[test]
    fn aborting_no_connection_says_so() {
        let error = abort_fuse_connection(rustix::fs::makedev(0, 999_999)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    }
}
