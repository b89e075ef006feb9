//! The records of living mounts: one folder each in `runtime_dir()/mounts`.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::runtime_dir;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::process::ProcessId;
use crate::sys::procfs;

/// Name of the control socket in a record's folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the log in a record's folder.
pub const LOG_FILE: &str = "log";
const RECORD_FILE: &str = "mount.json";

/// What a supervisor writes down about its mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it is mounted (canonical).
    pub mountpoint: PathBuf,
    /// The store that it serves (canonical).
    pub store: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Process that holds the mount.
    pub supervisor_pid: u32,
    /// Its start, in clock ticks since boot.
    pub supervisor_start: u64,
    /// Process that answers the kernel, when one runs.
    pub server_pid: Option<u32>,
    /// Its start, in clock ticks since boot.
    pub server_start: u64,
    /// Version of both.
    pub version: String,
    /// `st_dev` and `st_ino` of the ledger: a server that was taken over cannot pass off another one.
    pub ledger: (u64, u64),
    /// The same of the program that servers are started from.
    pub program: (u64, u64),
}

/// A mount with a living supervisor or server.
#[derive(Debug, Clone)]
pub struct Mount {
    /// Where it is mounted, or was before a lazy unmount.
    pub mountpoint: PathBuf,
    /// The store that it serves.
    pub store: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Process that holds the mount (dead where `orphaned`).
    pub supervisor_pid: u32,
    /// Process that answers the kernel.
    pub server_pid: Option<u32>,
    /// True after a lazy unmount.
    pub detached: bool,
    /// True where the supervisor has died and only the server is left.
    pub orphaned: bool,
    /// Version of both.
    pub version: String,
    /// `st_dev` and `st_ino` of the ledger, and of the program that servers are started from.
    pub identities: [(u64, u64); 2],
    /// Folder with its record, socket and log.
    pub dir: PathBuf,
}

/// The folder of a mount's record, locked by its supervisor for as long as that lives; removed when dropped.
#[derive(Debug)]
pub struct RecordDir {
    path: PathBuf,
    /// The folder itself: the lock is on it, and the control socket is reached through it.
    folder: OwnedFd,
}

impl RecordDir {
    /// Makes the folder of a new mount.
    ///
    /// # Errors
    /// When the runtime directory cannot be made or written.
    pub fn create(supervisor: ProcessId) -> Result<RecordDir> {
        let all = runtime_dir().join("mounts");
        fs::create_dir_all(&all).map_err(|e| {
            Error::io("cannot make the runtime directory", &all, e)
                .remedy("run it as root, or set STENCIL_RUNTIME_DIR to a directory that you can write")
        })?;
        let path = all.join(format!("{}-{}", supervisor.pid, supervisor.start_time));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io("cannot make the mount's record", &path, e))?;
        Self::take_over(&path)
    }

    /// Takes over the folder of a mount whose supervisor has died.
    ///
    /// # Errors
    /// [`Code::InUse`](crate::error::Code::InUse) where a supervisor lives.
    pub fn take_over(path: &Path) -> Result<RecordDir> {
        let fail = |e| Error::io("cannot use the mount's record", path, e);
        let folder = OwnedFd::from(fs::File::open(path).map_err(fail)?);
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(RecordDir { path: path.to_owned(), folder }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(Error::in_use("the mount has a supervisor, or another one takes it over just now")
                    .at(path)
                    .remedy("see `stencil status`"))
            }
            Err(e) => Err(fail(e.into())),
        }
    }

    /// The folder that a supervisor hands to the program that it becomes.
    pub fn inherited(path: PathBuf, folder: OwnedFd) -> RecordDir {
        RecordDir { path, folder }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself.
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Writes the record in one step.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn write(&self, record: &Record) -> Result<()> {
        let tmp = self.path.join("mount.json.tmp");
        let text = serde_json::to_vec_pretty(record)
            .map_err(|e| Error::failed(format!("cannot write the mount's record: {e}")))?;
        let written = (|| -> io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
            file.write_all(&text)?;
            fs::rename(&tmp, self.path.join(RECORD_FILE))
        })();
        written.map_err(|e| Error::io("cannot write the mount's record", &self.path, e))
    }
}

impl Drop for RecordDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The mounts of a store, by whatever path it was mounted: one folder may have several, below a bind mount for example.
///
/// # Errors
/// As [`mounts`].
pub fn mounts_of(store: &Store) -> Result<Vec<Mount>> {
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let ours = identity(store.dir());
    let mut found = mounts()?;
    found.retain(|m| m.store == store.dir() || (ours.is_some() && identity(&m.store) == ours));
    Ok(found)
}

/// Every mount of this runtime directory whose supervisor or server lives, lazily unmounted ones too, by mountpoint.
/// Records of dead ones are removed on the way.
///
/// # Errors
/// When the runtime directory exists and cannot be read. A directory that does not exist holds no mount.
pub fn mounts() -> Result<Vec<Mount>> {
    let all = runtime_dir().join("mounts");
    let entries = match fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => {
            return Err(Error::io("cannot read the runtime directory", &all, e)
                .remedy("run it as root, or set STENCIL_RUNTIME_DIR to a directory that you can write"));
        }
    };
    let mounted = procfs::mounts()?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let dir = entry.path();
        let Some(record) = read_record(&dir) else { continue };
        let alive = |pid, start_time| ProcessId { pid, start_time }.is_alive();
        let supervisor = alive(record.supervisor_pid, record.supervisor_start);
        let server = record.server_pid.filter(|&pid| alive(pid, record.server_start));
        if !supervisor && server.is_none() {
            log::debug!("removing the record of a dead mount: {}", dir.display());
            let _ = fs::remove_dir_all(&dir);
            continue;
        }
        let detached = !mounted.iter().any(|m| m.dev == record.device);
        found.push(Mount {
            mountpoint: record.mountpoint,
            store: record.store,
            device: record.device,
            supervisor_pid: record.supervisor_pid,
            server_pid: server,
            detached,
            orphaned: !supervisor,
            version: record.version,
            identities: [record.ledger, record.program],
            dir,
        });
    }
    found.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    Ok(found)
}

/// A folder without a readable record belongs to a supervisor that is just starting, or to nobody: left alone.
fn read_record(dir: &Path) -> Option<Record> {
    let text = fs::read(dir.join(RECORD_FILE)).ok()?;
    match serde_json::from_slice(&text) {
        Ok(record) => Some(record),
        Err(error) => {
            log::warn!("{}: no record of a mount: {error}", dir.display());
            None
        }
    }
}
