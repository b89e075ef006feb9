//! Where a mount may go.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control;
use stencilfs::error::{Error, Result};
use stencilfs::sys::{fuse_dev, mount, procfs};

use super::orphan_probe;

/// A mount without a server has one, or has ended, within this time.
const BEGINNING: Duration = Duration::from_secs(2);

/// The canonical path of a directory that can take a mount: there, empty, and nothing mounted on it.
///
/// # Errors
/// Says what is in the way, and how to get it out of it.
pub fn mountpoint(path: &Path) -> Result<PathBuf> {
    let canonical = canonical(path)?;
    let until = Instant::now() + BEGINNING;
    while let Some(there) = mount::at(&canonical)? {
        let ours = there.fs_type == mount::FS_TYPE;
        let known = control::every_mount()?.into_iter().find(|m| m.device == there.dev);
        if known.as_ref().is_some_and(|m| m.server_pid.is_none()) && Instant::now() < until {
            // Its supervisor starts a server; or has died, and what it forked has its record for a moment longer.
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        if ours && known.is_none() {
            orphan_probe::is_dead(&canonical, there.dev)?;
            log::warn!("{}: a dead mount of Stencil is taken away", canonical.display());
            mount::unmount(&canonical, true)
                .map_err(|e| Error::io("cannot take away the dead mount that is there", &canonical, e))?;
            continue;
        }
        let what =
            if ours { "a Stencil mount".to_owned() } else { format!("a mount of type {}", there.fs_type) };
        return Err(Error::in_use(format!("the mountpoint is taken by {what}")).at(&canonical).remedy(
            format!(
                "take that away with `{} {}`, or name another directory",
                if ours { "stencil umount" } else { "umount" },
                canonical.display()
            ),
        ));
    }
    let metadata = fs::metadata(&canonical).map_err(|e| unusable(&canonical, e))?;
    if !metadata.is_dir() {
        return Err(Error::usage("the mountpoint is no directory")
            .at(&canonical)
            .remedy("name an empty directory"));
    }
    let mut entries = fs::read_dir(&canonical).map_err(|e| unusable(&canonical, e))?;
    if entries.next().is_some() {
        return Err(Error::usage("the mountpoint is not empty: a mount would hide what is in it")
            .at(&canonical)
            .remedy("name an empty directory"));
    }
    Ok(canonical)
}

/// The path without symbolic links. What is mounted there is not asked.
///
/// # Errors
/// When its folder cannot be found.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    mount::place(path).map_err(|e| unusable(path, e))
}

fn unusable(path: &Path, e: std::io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENOENT) => Error::io("the mountpoint does not exist", path, e)
            .remedy(format!("make it: mkdir -p {}", path.display())),
        _ => Error::io("cannot use the mountpoint", path, e),
    }
}

/// Device number of what is mounted there, without asking the mount.
///
/// # Errors
/// When nothing is mounted there.
pub fn device_at(mountpoint: &Path) -> Result<u64> {
    mount::at(mountpoint)?.map(|m| m.dev).ok_or_else(|| not_there(mountpoint))
}

/// Device number of the mount of that connection, without asking it. Where the kernel does not say which one it is, that
/// of what is seen there.
///
/// # Errors
/// When it is not there.
pub fn device_of(fuse: &OwnedFd, mountpoint: &Path) -> Result<u64> {
    let ours = fuse_dev::connection_of(fuse).ok().flatten();
    match ours {
        Some(ours) if devices_at(mountpoint)?.contains(&ours) => Ok(ours),
        Some(_) => Err(not_there(mountpoint)),
        None => device_at(mountpoint),
    }
}

/// Refuses a mount that lies on another one: that one came between the look at the place and the mount.
///
/// # Errors
/// [`Code::InUse`](stencilfs::error::Code::InUse) then.
pub fn is_lowest(mountpoint: &Path, device: u64) -> Result<()> {
    if devices_at(mountpoint)?.first() == Some(&device) {
        return Ok(());
    }
    Err(Error::in_use("another mount has come there at the same time")
        .at(mountpoint)
        .remedy("`stencil status` and /proc/mounts name it; or name another directory"))
}

fn devices_at(mountpoint: &Path) -> Result<Vec<u64>> {
    let all = procfs::mounts()?.into_iter();
    Ok(all.filter(|mount| mount.mountpoint == mountpoint).map(|mount| mount.dev).collect())
}

fn not_there(mountpoint: &Path) -> Error {
    Error::failed("the mount does not appear in /proc/self/mountinfo").at(mountpoint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stencilfs::error::Code;

    #[test]
    fn what_cannot_take_a_mount_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(mountpoint(dir.path()).unwrap(), fs::canonicalize(dir.path()).unwrap());
        let missing = mountpoint(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.code(), Code::NotFound);
        fs::write(dir.path().join("file"), "x").unwrap();
        let file = mountpoint(&dir.path().join("file")).unwrap_err();
        assert!(file.to_string().contains("no directory"), "{file}");
        let full = mountpoint(dir.path()).unwrap_err();
        assert!(full.to_string().contains("not empty"), "{full}");
        let proc = mountpoint(Path::new("/proc")).unwrap_err();
        assert_eq!(proc.code(), Code::InUse);
        for error in [missing, file, full, proc] {
            assert!(error.remedy_text().is_some(), "{error}");
        }
    }
}
