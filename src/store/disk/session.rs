//! Sessions: directories in `STORE/tmp` for unpublished files.

use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::{FileType, FlockOperation, flock};

use super::path::StorePath;
use super::publish::{random_hex, sync_directory, write_new};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;

/// Maximum number of attempts to create a session directory. Another writer's sweep may remove a directory before it is
/// locked.
const MAX_ATTEMPTS: usize = 100;

/// Maximum depth to which [`allocated_below`] descends.
const MAX_DEPTH: usize = 32;

/// A directory of one writer below `STORE/tmp`, locked while the writer runs and removed when the writer finishes. The
/// next writer removes the directory of a killed writer.
#[derive(Debug)]
pub(in crate::store) struct Session {
    tmp: StorePath,
    name: String,
    path: StorePath,
}

impl Session {
    /// Creates a session, after removing the sessions of killed writers.
    pub fn create(tmp: &StorePath) -> Result<Session> {
        let tmp = tmp.opened().map_err(|e| tmp.error("cannot open", e))?;
        sweep(&tmp, false);
        for _ in 0..MAX_ATTEMPTS {
            let name = random_hex()?;
            let path = tmp.join(&name);
            let directory = match path.create_folder() {
                Ok(directory) => Arc::new(directory),
                // Another writer's sweep removed the directory before it was opened: try again.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(path.error("cannot create", e)),
            };
            if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                return Ok(Session { tmp, name, path: StorePath::of(directory) });
            }
        }
        Err(Error::try_again("cannot create a session: new directories are removed by another process")
            .at(&tmp)
            .hint("stop the program that removes directories there, then run the command again"))
    }

    /// Returns the session's directory.
    pub fn path(&self) -> &StorePath {
        &self.path
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = self.tmp.join(&self.name).remove_tree() {
            log::warn!(
                "cannot remove session directory {}: {e}; the next writer removes it",
                self.path.as_ref().display()
            );
        }
    }
}

/// Creates an unnamed file in `STORE/tmp`, with mode 0600.
pub(in crate::store) fn temporary_file(tmp: &StorePath) -> Result<File> {
    let create = || {
        let directory = tmp.folder()?;
        match directory.create_unnamed(0o600) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            created => return created,
        }
        let name = random_hex().map_err(std::io::Error::other)?;
        let file = directory.create(&name, 0o600)?;
        directory.remove_file(&name)?;
        Ok(file)
    };
    create().map_err(|e| tmp.error("cannot create a temporary file", e))
}

/// Removes the directories of killed writers, or with `dry_run` only counts them. Returns their number and the bytes
/// allocated for them.
pub(in crate::store) fn sweep(tmp: &StorePath, dry_run: bool) -> (u64, u64) {
    let Ok(tmp) = tmp.folder() else { return (0, 0) };
    let (mut count, mut bytes) = (0, 0);
    for name in tmp.names().unwrap_or_default() {
        // Only directories are sessions.
        let Ok(directory) = tmp.folder(&name) else { continue };
        if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let allocated = allocated_below(&tmp, &name, MAX_DEPTH);
        let path = tmp.path_of(&name);
        match if dry_run { Ok(()) } else { tmp.remove_tree(&name) } {
            Ok(()) => {
                (count, bytes) = (count + 1, bytes + allocated);
                if !dry_run {
                    log::info!("removed {}, the session directory of a killed writer", path.display());
                }
            }
            Err(e) => log::debug!("cannot remove session directory {}: {e}", path.display()),
        }
    }
    (count, bytes)
}

/// Returns the bytes allocated for a file; 0 if its metadata cannot be read.
pub(in crate::store) fn allocated(path: &StorePath) -> u64 {
    path.metadata().map_or(0, |found| found.st_blocks.cast_unsigned() * 512)
}

/// Same as [`allocated`], but includes everything below a directory.
fn allocated_below(directory: &Directory, name: &OsStr, depth: usize) -> u64 {
    let Ok(found) = directory.metadata(name) else { return 0 };
    let mut bytes = found.st_blocks.cast_unsigned() * 512;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory
        && depth > 0
        && let Ok(below) = directory.folder(name)
    {
        let names = below.names().unwrap_or_default();
        bytes += names.iter().map(|name| allocated_below(&below, name, depth - 1)).sum::<u64>();
    }
    bytes
}

/// Replaces a small file atomically: a reader sees either the old or the new bytes. `tmp` is the store's directory for
/// unpublished files.
pub(in crate::store) fn replace_file(tmp: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    let session = Session::create(tmp)?;
    let temporary = session.path().join("new");
    write_new(&temporary, bytes)?;
    temporary.rename(path).map_err(|e| path.error("cannot replace", e))?;
    sync_directory(&path.parent())
}

#[cfg(test)]
mod tests {
    use crate::store::disk::session::*;
    use std::fs;

    #[test]
    fn removes_only_sessions_of_killed_writers() {
        let dir = tempfile::tempdir().unwrap();
        let tmp = StorePath::root(&fs::canonicalize(dir.path()).unwrap());
        let running = Session::create(&tmp).unwrap();
        let dead = dir.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("file"), "x").unwrap();
        let next = Session::create(&tmp).unwrap();
        let path = |session: &Session| session.path().as_ref().to_owned();
        assert!(path(&running).exists() && path(&next).exists() && !dead.exists());
        let running_path = path(&running);
        drop(running);
        assert!(!running_path.exists());
    }
}
