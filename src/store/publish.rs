//! Atomic publication: temporary → fsync → rename → fsync of the folder.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Makes renames and removals in a folder last.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("cannot sync the folder", path, e))
}

/// Gives what root has just made to the owner of the folder it lies in: a store belongs to one user, with whose rights
/// it is served, and who must be able to go on with it. Nobody else can give files away.
pub(super) fn inherit_owner(path: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let fail = |e| Error::io("cannot see who owns", path, e);
    let folder = fs::metadata(path.parent().unwrap_or(Path::new("."))).map_err(fail)?;
    let ours = fs::symlink_metadata(path).map_err(fail)?;
    if (ours.uid(), ours.gid()) == (folder.uid(), folder.gid()) {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(folder.uid()), Some(folder.gid()))
        .map_err(|e| Error::io("cannot give it to the store's owner", path, e))
}

/// Makes a folder of the store, for its owner.
pub(super) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir(path).map_err(|e| Error::io("cannot create", path, e))?;
    inherit_owner(path)
}

/// Moves what is complete and durable to the place where it counts.
pub(super) fn publish(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("cannot publish", to, e))
}

/// Writes a new file, durable, without publishing it.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io("cannot write", path, e))?;
    inherit_owner(path)
}

/// Replaces a small file as a whole: a reader sees the old or the new bytes, never a mixture. `tmp` is
/// the store's folder for what is not published yet.
pub(super) fn replace_file(tmp: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let session = Session::begin(tmp)?;
    let temporary = session.path().join("new");
    write_new(&temporary, bytes)?;
    fs::rename(&temporary, path).map_err(|e| Error::io("cannot replace", path, e))?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Random bytes of the kernel.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut bytes))
        .map_err(|e| Error::io("cannot read random bytes", "/dev/urandom", e))?;
    Ok(bytes)
}

/// Sixteen random bytes as a file name.
pub(super) fn random_hex() -> Result<String> {
    random::<16>().map(|bytes| super::format::PackId(bytes).to_string())
}

/// A locked file; the kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code)] File);

impl Lock {
    fn open(path: &Path) -> Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| Error::io("cannot open the lock", path, e))?;
        inherit_owner(path)?;
        Ok(file)
    }

    /// Waits for the lock, alone or shared, for as long as `go_on` says so: others may hold it for hours.
    pub fn wait_while(path: &Path, shared: bool, mut go_on: impl FnMut(&File) -> Result<()>) -> Result<Lock> {
        let file = Lock::open(path)?;
        let operation = match shared {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Lock(file)),
                Err(Errno::INTR | Errno::WOULDBLOCK) => go_on(&file)?,
                Err(e) => return Err(Error::io("cannot lock", path, e.into())),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for a lock that is held for moments only, alone or shared; not to be interrupted.
    pub fn wait(path: &Path, shared: bool) -> Result<Lock> {
        let file = Lock::open(path)?;
        let operation = if shared { FlockOperation::LockShared } else { FlockOperation::LockExclusive };
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Lock(file)),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(Error::io("cannot lock", path, e.into())),
            }
        }
    }
}

/// A folder of one writer below `STORE/tmp`, locked while the writer lives, removed when it ends. What
/// a killed writer left is removed by the next one.
#[derive(Debug)]
pub(super) struct Session {
    path: PathBuf,
    _lock: File,
}

impl Session {
    /// A new one; sweeps the dead first.
    pub fn begin(tmp: &Path) -> Result<Session> {
        sweep(tmp, false);
        loop {
            let path = tmp.join(random_hex()?);
            fs::create_dir(&path).map_err(|e| Error::io("cannot create", &path, e))?;
            let opened = || File::open(&path).map_err(|e| Error::io("cannot open", &path, e));
            let lock = inherit_owner(&path).and_then(|()| opened());
            // Another writer's sweep may take the folder before it is locked: then begin again.
            match lock {
                Ok(lock)
                    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() =>
                {
                    return Ok(Session { path, _lock: lock });
                }
                Err(e) if e.code() != crate::error::Code::NotFound => return Err(e),
                _ => continue,
            }
        }
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {e}; the next import will", self.path.display());
        }
    }
}

/// Removes the folders whose writer is gone, or only looks at them. Gives their number, and what they take on the disk.
pub(super) fn sweep(tmp: &Path, only_look: bool) -> (u64, u64) {
    let Ok(entries) = fs::read_dir(tmp) else { return (0, 0) };
    let (mut count, mut bytes) = (0, 0);
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(folder) = File::open(&path) else { continue };
        if !path.is_dir() || flock(&folder, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let takes = allocated(&path);
        match if only_look { Ok(()) } else { fs::remove_dir_all(&path) } {
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

/// What a file, or a folder with all below it, takes on the disk, as far as it can be seen.
pub(super) fn allocated(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let below = if meta.is_dir() { fs::read_dir(path).ok() } else { None };
    let below = below.into_iter().flatten().flatten().map(|entry| allocated(&entry.path()));
    meta.blocks() * 512 + below.sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_the_dead_are_swept_and_living_ones_are_not() {
        let tmp = tempfile::tempdir().unwrap();
        let living = Session::begin(tmp.path()).unwrap();
        let dead = tmp.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("file"), "x").unwrap();
        let next = Session::begin(tmp.path()).unwrap();
        assert!(living.path().exists() && next.path().exists() && !dead.exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}
