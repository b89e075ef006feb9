//! Where a mount may go.

use std::fs;
use std::path::{Path, PathBuf};

use stencilfs::control;
use stencilfs::error::{Error, Result};
use stencilfs::sys::mount;

/// The canonical path of a directory that can take a mount: there, empty, and nothing mounted on it.
///
/// # Errors
/// Says what is in the way, and how to get it out of it.
pub fn mountpoint(path: &Path) -> Result<PathBuf> {
    let canonical = canonical(path)?;
    while let Some(there) = mount::at(&canonical)? {
        let ours = there.fs_type == mount::FS_TYPE;
        // The kernel may know its attributes for a while yet; that it has a path does not mean that it lives.
        if ours && !control::every_mount()?.iter().any(|m| m.device == there.dev) {
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
    mount::at(mountpoint)?
        .map(|m| m.dev)
        .ok_or_else(|| Error::failed("the mount does not appear in /proc/self/mountinfo").at(mountpoint))
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
