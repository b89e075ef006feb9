//! Checks of mountpoints.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control;
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::mount;
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::procfs;

use super::orphan_probe;

/// Longest wait for a mount without a server: its supervisor may be starting a server, or a child of a dead supervisor
/// may still hold the lock on the record.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Returns the canonical path of a directory that can be mounted on: empty, and not a mountpoint yet. Unmounts a dead
/// mount of Stencil.
///
/// # Errors
/// Returns an error that names the obstacle and the remedy.
pub fn mountpoint(path: &Path) -> Result<PathBuf> {
    let canonical = canonical(path)?;
    let until = Instant::now() + STARTUP_TIMEOUT;
    while let Some(there) = mount::at(&canonical)? {
        let ours = there.fs_type == mount::FS_TYPE;
        let record = control::every_mount()?.into_iter().find(|m| m.device == there.dev);
        if record.as_ref().is_some_and(|m| m.server_pid.is_none()) && Instant::now() < until {
            // Either the supervisor is starting a server, or the supervisor has died and a child of it still holds the
            // lock on the record.
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        if ours && record.is_none() {
            orphan_probe::expect_dead(&canonical, there.dev)?;
            log::warn!("{}: unmounting a dead Stencil mount", canonical.display());
            mount::unmount(&canonical, true)
                .map_err(|e| Error::io("cannot unmount the dead mount", &canonical, e))?;
            continue;
        }
        let what =
            if ours { "a Stencil mount".to_owned() } else { format!("a mount of type {}", there.fs_type) };
        return Err(Error::in_use(format!("the mountpoint is in use by {what}")).at(&canonical).hint(
            format!(
                "run '{} {}', or use another directory",
                if ours { "stencil umount" } else { "umount" },
                canonical.display()
            ),
        ));
    }
    let metadata = fs::metadata(&canonical).map_err(|e| unusable(&canonical, e))?;
    if !metadata.is_dir() {
        return Err(Error::usage("the mountpoint is not a directory")
            .at(&canonical)
            .hint("use an empty directory"));
    }
    let mut entries = fs::read_dir(&canonical).map_err(|e| unusable(&canonical, e))?;
    if entries.next().is_some() {
        return Err(Error::usage("the mountpoint is not empty: a mount would hide its contents")
            .at(&canonical)
            .hint("use an empty directory"));
    }
    Ok(canonical)
}

/// Returns the path without symbolic links. Does not access a file system that is mounted at the path, as its server
/// may not respond.
///
/// # Errors
/// Returns an error if the parent directory does not exist.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    mount::place(path).map_err(|e| unusable(path, e))
}

fn unusable(path: &Path, e: std::io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENOENT) => Error::io("the mountpoint does not exist", path, e)
            .hint(format!("run 'mkdir -p {}'", path.display())),
        _ => Error::io("cannot access the mountpoint", path, e),
    }
}

/// Returns the device number of the topmost mount at a mountpoint, from the mount table.
///
/// # Errors
/// Returns an error if the path is not a mountpoint.
pub fn device_at(mountpoint: &Path) -> Result<u64> {
    mount::at(mountpoint)?.map(|m| m.dev).ok_or_else(|| not_mounted(mountpoint))
}

/// Returns the device number of a connection's mount, without a request to the mount. On kernels that do not report the
/// device of a connection, returns the device number of the topmost mount at the mountpoint.
///
/// # Errors
/// Returns an error if the mount is not in the mount table.
pub fn device_of(fuse: &OwnedFd, mountpoint: &Path) -> Result<u64> {
    let ours = device::connection_of(fuse).ok().flatten();
    match ours {
        Some(ours) if devices_at(mountpoint)?.contains(&ours) => Ok(ours),
        Some(_) => Err(not_mounted(mountpoint)),
        None => device_at(mountpoint),
    }
}

/// Rejects a mount on top of another mount, which appeared between the check of the mountpoint and the mount system
/// call.
///
/// # Errors
/// Returns [`Code::InUse`](stencilfs::error::Code::InUse) if there is another mount below.
pub fn expect_lowest(mountpoint: &Path, device: u64) -> Result<()> {
    if devices_at(mountpoint)?.first() == Some(&device) {
        return Ok(());
    }
    Err(Error::in_use("another mount was created there at the same time")
        .at(mountpoint)
        .hint("see 'stencil status' and /proc/mounts, or use another directory"))
}

fn devices_at(mountpoint: &Path) -> Result<Vec<u64>> {
    let all = procfs::mounts()?.into_iter();
    Ok(all.filter(|mount| mount.mountpoint == mountpoint).map(|mount| mount.dev).collect())
}

fn not_mounted(mountpoint: &Path) -> Error {
    Error::failed("the mount is missing from /proc/self/mountinfo").at(mountpoint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stencilfs::error::Code;

    #[test]
    fn rejects_unsuitable_mountpoints_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(mountpoint(dir.path()).unwrap(), fs::canonicalize(dir.path()).unwrap());
        let missing = mountpoint(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.code(), Code::NotFound);
        fs::write(dir.path().join("file"), "x").unwrap();
        let file = mountpoint(&dir.path().join("file")).unwrap_err();
        assert!(file.to_string().contains("is not a directory"), "{file}");
        let full = mountpoint(dir.path()).unwrap_err();
        assert!(full.to_string().contains("not empty"), "{full}");
        for error in [missing, file, full] {
            assert!(error.hint_text().is_some(), "{error}");
        }
    }
}
