//! Where the files of a mount may lie: none of them in the mount itself. Its supervisor and server would wait for their own
//! answer when they open one.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};

use super::options::MountOptions;
use super::runtime_dir;
use crate::error::{Error, Result};
use crate::sys::mount::{self, FS_TYPE};
use crate::sys::procfs;

/// Refuses a path that is not UTF-8: records, and the configurations of VMMs, are JSON and cannot name it.
///
/// # Errors
/// [`Code::Usage`](crate::error::Code::Usage) then.
pub fn expect_utf8(what: &str, path: &Path) -> Result<()> {
    if path.to_str().is_some() {
        return Ok(());
    }
    Err(Error::usage(format!("the path of the {what} is not UTF-8"))
        .at(path)
        .remedy("use another path: records of mounts and clones, and configurations of VMMs, are JSON"))
}

/// Refuses a mount whose store, cache directory or runtime directory would lie in it, or in another mount of Stencil, by
/// whatever link or bind mount; and one that would lie in its store. To be called before the mount exists, with a
/// canonical mountpoint. The cache directory is canonical afterwards.
///
/// # Errors
/// [`Code::Usage`](crate::error::Code::Usage) with both paths; that a directory cannot be found.
pub fn check(options: &mut MountOptions) -> Result<()> {
    let mountpoint = options.mountpoint.clone();
    expect_utf8("mountpoint", &mountpoint)?;
    // What is mounted there already is not asked: nobody may answer for it.
    let root = if mount::at(&mountpoint)?.is_none() { identity(&mountpoint) } else { None };
    let runtime = runtime_dir();
    let above = |path: &Path, inner: &Path, identity_of: Option<(u64, u64)>| {
        inner
            .ancestors()
            .any(|outer| outer == path || (identity_of.is_some() && identity(outer) == identity_of))
    };
    let mut all = vec![("store", options.store.clone()), ("runtime directory", runtime)];
    all.extend(options.cache_dir.iter().map(|dir| ("cache directory", dir.clone())));
    for (what, path) in all {
        expect_utf8(what, &path)?;
        let inside = || {
            Error::usage(format!("the {what} lies in the mountpoint, {}", mountpoint.display()))
                .at(&path)
                .remedy("name a directory outside of it: the mount would wait for its own answer")
        };
        let absolute = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
        // Before anything that may ask the mount.
        if absolute.starts_with(&mountpoint) {
            return Err(inside());
        }
        refuse_ours(what, &absolute)?;
        let real = existing(&absolute);
        refuse_ours(what, &real)?;
        if above(&mountpoint, &real, root) {
            return Err(inside());
        }
        if what == "cache directory" {
            let dir = fs::canonicalize(&path).map_err(|e| {
                Error::io("the cache directory cannot hold backings", &path, e)
                    .remedy("name a directory on ext4 or xfs")
            })?;
            expect_utf8(what, &dir)?;
            options.cache_dir = Some(dir);
        }
    }
    // Its folder: what is mounted on it may not answer.
    let folder = mountpoint.parent().unwrap_or(&mountpoint);
    if above(&options.store, folder, identity(&options.store)) {
        return Err(Error::usage(format!("the mountpoint lies in the store, {}", options.store.display()))
            .at(&mountpoint)
            .remedy("name an empty directory outside of the store"));
    }
    Ok(())
}

/// Refuses a path on a mount of Stencil. The list of mounts is asked, not the mount.
fn refuse_ours(what: &str, path: &Path) -> Result<()> {
    let mounts = procfs::mounts()?;
    let on = mounts.iter().rfind(|line| path.starts_with(&line.mountpoint));
    match on.filter(|line| line.fs_type == FS_TYPE) {
        None => Ok(()),
        Some(line) => Err(Error::usage(format!(
            "the {what} lies on the Stencil mount {}, which is read-only",
            line.mountpoint.display()
        ))
        .at(path)
        .remedy("name a directory on a local filesystem: ext4 or xfs")),
    }
}

/// The canonical path of the longest part that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find_map(|part| fs::canonicalize(part).ok()).unwrap_or_else(|| path.to_owned())
}

/// What the kernel knows of it. A mount that has come there meanwhile is not asked.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let known = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO).ok()?;
    Some((makedev(known.stx_dev_major, known.stx_dev_minor), known.stx_ino))
}
