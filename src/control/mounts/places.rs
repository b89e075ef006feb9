//! Checks where the files of a mount lie: outside of the mount. A supervisor or server that opened a file in its own
//! mount would wait for its own reply.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};

use crate::control::protocol::options::MountOptions;
use crate::control::runtime_dir;
use crate::error::{Error, Result};
use crate::sys::files::mount::{self, FS_TYPE};
use crate::sys::process::procfs;

/// Rejects a path that is not UTF-8: records, and the configuration files of VMMs, are JSON and cannot contain the
/// path.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) for such a path.
pub fn expect_utf8(what: &str, path: &Path) -> Result<()> {
    if path.to_str().is_some() {
        return Ok(());
    }
    Err(Error::usage(format!("the path of the {what} is not UTF-8"))
        .at(path)
        .hint("use another path: records and configuration files of VMMs are JSON"))
}

/// Rejects a mount whose store, cache directory or runtime directory lies in the mount itself or in another Stencil
/// mount, through any link or bind mount; and a mountpoint that lies in the store. Must be called before the mount
/// exists, with a canonical mountpoint. Makes the path of the cache directory canonical.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) with both paths, and an error if the cache directory does not
/// exist.
pub fn check(options: &mut MountOptions) -> Result<()> {
    let mountpoint = options.mountpoint.clone();
    expect_utf8("mountpoint", &mountpoint)?;
    // If something is mounted there, a call on the mountpoint could block: its server may be dead.
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
                .hint("use a directory outside of the mountpoint: the mount would wait for its own reply")
        };
        let absolute = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
        // Compares the text of the paths first: `existing` below could block on the mount.
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
            let dir = fs::canonicalize(&path)
                .map_err(|e| Error::io("cannot resolve the cache directory", &path, e))?;
            expect_utf8(what, &dir)?;
            options.cache_dir = Some(dir);
        }
    }
    // The parent: a call on the mountpoint itself could block.
    let folder = mountpoint.parent().unwrap_or(&mountpoint);
    if above(&options.store, folder, identity(&options.store)) {
        return Err(Error::usage(format!("the mountpoint lies in the store, {}", options.store.display()))
            .at(&mountpoint)
            .hint("use an empty directory outside of the store"));
    }
    Ok(())
}

/// Rejects a path on a Stencil mount. Reads the mount table only, as the mount itself may not respond.
fn refuse_ours(what: &str, path: &Path) -> Result<()> {
    let mounts = procfs::mounts()?;
    let on = mounts.iter().rfind(|line| path.starts_with(&line.mountpoint));
    match on.filter(|line| line.fs_type == FS_TYPE) {
        None => Ok(()),
        Some(line) => Err(Error::usage(format!(
            "the {what} lies on the Stencil mount {}: a mount must not depend on itself or on another Stencil mount",
            line.mountpoint.display()
        ))
        .at(path)
        .hint("use a directory outside of all Stencil mounts")),
    }
}

/// Returns the canonical path of the longest existing ancestor of `path`, or `path` itself.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find_map(|part| fs::canonicalize(part).ok()).unwrap_or_else(|| path.to_owned())
}

/// Returns `st_dev` and `st_ino` as the kernel has them cached: with `AT_STATX_DONT_SYNC` FUSE sends no GETATTR, so a
/// mount that appeared there meanwhile cannot block the call.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let stat = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO).ok()?;
    Some((makedev(stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
}
