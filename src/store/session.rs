//! Sessions: folders in `STORE/tmp` for what is not published yet.

use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::{FileType, FlockOperation, flock};

use super::path::StorePath;
use super::publish::random_hex;
use crate::error::{Error, Result};
use crate::sys::folder::Folder;

/// How often a folder is created that another writer's sweep takes before it is locked.
const MAX_ATTEMPTS: usize = 100;

/// Depth to which [`allocated_below`] descends.
const MAX_DEPTH: usize = 32;

/// A folder of one writer below `STORE/tmp`, locked while the writer lives, removed when it ends. What
/// a killed writer left is removed by the next one.
#[derive(Debug)]
pub(super) struct Session {
    tmp: StorePath,
    name: String,
    path: StorePath,
}

impl Session {
    /// A new one; sweeps the dead first.
    pub fn begin(tmp: &StorePath) -> Result<Session> {
        let tmp = tmp.opened().map_err(|e| tmp.error("cannot open", e))?;
        sweep(&tmp, false);
        for _ in 0..MAX_ATTEMPTS {
            let name = random_hex()?;
            let path = tmp.join(&name);
            let folder = match path.create_folder() {
                Ok(folder) => Arc::new(folder),
                // Another writer's sweep may take the folder before it is locked: then begin again.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(path.error("cannot create", e)),
            };
            if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                return Ok(Session { tmp, name, path: StorePath::of(folder) });
            }
        }
        Err(Error::try_again("folders in it vanish while they are created").at(&tmp))
    }

    /// Its folder.
    pub fn path(&self) -> &StorePath {
        &self.path
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = self.tmp.join(&self.name).remove_tree() {
            log::warn!("cannot remove {}: {e}; the next import will", self.path.as_ref().display());
        }
    }
}

/// A file without a name in `STORE/tmp`, for its owner alone.
pub(super) fn temporary_file(tmp: &StorePath) -> Result<File> {
    let create = || {
        let folder = tmp.folder()?;
        match folder.create_unnamed(0o600) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            created => return created,
        }
        let name = random_hex().map_err(std::io::Error::other)?;
        let file = folder.create(&name, 0o600)?;
        folder.remove_file(&name)?;
        Ok(file)
    };
    create().map_err(|e| tmp.error("cannot create a temporary file", e))
}

/// Removes the folders whose writer is gone, or only looks at them. Gives their number, and what they take on the disk.
pub(super) fn sweep(tmp: &StorePath, only_look: bool) -> (u64, u64) {
    let Ok(tmp) = tmp.folder() else { return (0, 0) };
    let (mut count, mut bytes) = (0, 0);
    for name in tmp.names().unwrap_or_default() {
        // Anything but a folder is no session.
        let Ok(folder) = tmp.folder(&name) else { continue };
        if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let takes = allocated_below(&tmp, &name, MAX_DEPTH);
        let path = tmp.path_of(&name);
        match if only_look { Ok(()) } else { tmp.remove_tree(&name) } {
            Ok(()) => {
                (count, bytes) = (count + 1, bytes + takes);
                if !only_look {
                    log::info!("removed {}, left by a killed writer", path.display());
                }
            }
            Err(e) => log::debug!("cannot remove {}: {e}", path.display()),
        }
    }
    (count, bytes)
}

/// What a file takes on the disk, as far as it can be seen.
pub(super) fn allocated(path: &StorePath) -> u64 {
    path.metadata().map_or(0, |found| found.st_blocks as u64 * 512)
}

/// As [`allocated`]; of a folder also everything below.
fn allocated_below(folder: &Folder, name: &OsStr, depth: usize) -> u64 {
    let Ok(found) = folder.metadata(name) else { return 0 };
    let mut bytes = found.st_blocks as u64 * 512;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory
        && depth > 0
        && let Ok(below) = folder.folder(name)
    {
        let names = below.names().unwrap_or_default();
        bytes += names.iter().map(|name| allocated_below(&below, name, depth - 1)).sum::<u64>();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn sessions_of_the_dead_are_swept_and_living_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let tmp = StorePath::root(&fs::canonicalize(dir.path()).unwrap());
        let living = Session::begin(&tmp).unwrap();
        let dead = dir.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("file"), "x").unwrap();
        let next = Session::begin(&tmp).unwrap();
        let path = |session: &Session| session.path().as_ref().to_owned();
        assert!(path(&living).exists() && path(&next).exists() && !dead.exists());
        let living_path = path(&living);
        drop(living);
        assert!(!living_path.exists());
    }
}
