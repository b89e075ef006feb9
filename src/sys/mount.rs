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

/// The abort of one FUSE connection. It stays that one's: its number may be given to another as soon as it is over, and
/// an abort that was opened before does nothing to that.
#[derive(Debug)]
pub struct Abort(File);

impl Abort {
    /// That of the connection which has that device number (`st_dev`) now. Uses a private instance of fusectl that is
    /// attached nowhere.
    ///
    /// # Errors
    /// `ENOENT` where no such connection exists; else the kernel's.
    pub fn of(device: u64) -> io::Result<Abort> {
        let root = super::fusectl::open()?;
        // Connections are named after the kernel's own form of the device number; anonymous ones have major 0.
        let name = format!("{}/abort", rustix::fs::minor(device));
        let abort = rustix::fs::openat(&root, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Abort(abort.into()))
    }

    /// Every waiting and every later request fails.
    ///
    /// # Errors
    /// The kernel's. A connection that is over is none.
    pub fn now(mut self) -> io::Result<()> {
        self.0.write_all(b"1")
    }
}

/// Aborts the FUSE connection of that device number (`st_dev`): every waiting and every later request fails.
///
/// # Errors
/// `ENOENT` where no such connection exists; else the kernel's.
pub fn abort_fuse_connection(device: u64) -> io::Result<()> {
    Abort::of(device)?.now()
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
    fn an_abort_is_of_its_connection_and_of_no_later_one() {
        use crate::sys::fuse_dev;
        let dir = tempfile::tempdir().unwrap();
        let begin = || {
            let fuse = fuse_dev::open().unwrap();
            mount_fuse(&fuse, dir.path(), dir.path(), false).unwrap();
            let device = at(dir.path()).unwrap().unwrap().dev;
            (fuse, device)
        };
        let mut same = 0;
        for _ in 0..50 {
            let (fuse, device) = begin();
            let (early, late) = (Abort::of(device).unwrap(), Abort::of(device).unwrap());
            assert!(!fuse_dev::is_over(&fuse));
            early.now().unwrap();
            let aborted = fuse_dev::is_over(&fuse);
            unmount(dir.path(), true).unwrap();
            drop(fuse);
            let (next, its) = begin();
            let done = late.now();
            let spared = !fuse_dev::is_over(&next);
            unmount(dir.path(), true).unwrap();
            assert!(aborted && done.is_ok() && spared, "{aborted} {done:?} {spared}, {device} and {its}");
            same += u32::from(its == device);
            if same > 3 {
                return;
            }
        }
        assert!(same > 0, "no number was given again");
    }

    #[test]
    fn aborting_no_connection_says_so() {
        let error = abort_fuse_connection(rustix::fs::makedev(0, 999_999)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    }
}
