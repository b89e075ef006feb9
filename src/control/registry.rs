//! The records of living mounts: one folder each in `runtime_dir()/mounts`.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::runtime::{self, MAX_RECORD};
use crate::error::{Error, Result};
use crate::sys::folder::Folder;
use crate::sys::process::ProcessId;
use crate::sys::{locks, trust};

/// The folder of the runtime directory that has one for each mount.
pub(super) const MOUNTS: &str = "mounts";
/// Name of the control socket in a record's folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the log in a record's folder.
pub const LOG_FILE: &str = "log";
const RECORD_FILE: &str = "mount.json";

/// How long a command may have the lock of a record that it looks at.
const LOOK: Duration = Duration::from_secs(1);

/// What a supervisor writes down about its mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it is mounted (canonical).
    pub mountpoint: PathBuf,
    /// The store that it serves (canonical).
    pub store: PathBuf,
    /// [Identity](crate::store::Store::id) of that store.
    #[serde(default)]
    pub store_id: Option<String>,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Process that holds the mount.
    pub supervisor_pid: u32,
    /// Its identity.
    pub supervisor_identity: u64,
    /// Process that answers the kernel, when one runs.
    pub server_pid: Option<u32>,
    /// Its identity; 0 without a process.
    pub server_identity: u64,
    /// Version of both.
    pub version: String,
    /// `st_dev` and `st_ino` of the ledger: a server that was taken over cannot pass off another one.
    pub ledger: (u64, u64),
    /// The same of the program that servers are started from.
    pub program: (u64, u64),
    /// The PID namespace that the numbers of processes are of; unknown to versions before.
    #[serde(default)]
    pub pid_namespace: Option<u64>,
}

/// A mount with a living supervisor or server.
#[derive(Debug, Clone)]
pub struct Mount {
    /// Where it is mounted, or was before a lazy unmount.
    pub mountpoint: PathBuf,
    /// The store that it serves.
    pub store: PathBuf,
    /// Its identity.
    pub store_id: Option<String>,
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
    /// True where both live in another PID namespace: their numbers mean nothing here, and clones may not be visible.
    pub foreign: bool,
    /// Version of both.
    pub version: String,
    /// `st_dev` and `st_ino` of the ledger, and of the program that servers are started from.
    pub identities: [(u64, u64); 2],
    /// Folder with its record, socket and log.
    pub dir: PathBuf,
}

/// The folder of a mount's record, locked by its supervisor for as long as that lives. Removed when dropped; one that
/// another supervisor left only when this one has written its own record into it, since the mount may live on without.
#[derive(Debug)]
pub struct RecordDir {
    path: PathBuf,
    /// The folder itself: the lock is on it, and the control socket is reached through it. Its mode is 0700, so that only
    /// its owner can open it, and lock it.
    folder: Folder,
    ours: Cell<bool>,
}

impl Mount {
    /// Its supervisor and its server, as far as they live and their numbers mean something in this PID namespace.
    pub fn processes(&self) -> [Option<u32>; 2] {
        let supervisor = (!self.orphaned && !self.foreign).then_some(self.supervisor_pid);
        [supervisor, self.server_pid]
    }
}

impl Record {
    /// The record in a folder; none belongs to a supervisor that is just starting, which has no server yet, or to nobody.
    ///
    /// # Errors
    /// The system's; `InvalidData` for what no supervisor writes.
    pub(super) fn read(folder: &Folder) -> io::Result<Option<Record>> {
        let text = match runtime::read(folder, RECORD_FILE, MAX_RECORD) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let record: Record = serde_json::from_slice(&text)?;
        match record.problem() {
            None => Ok(Some(record)),
            Some(field) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("its {field} is invalid"))),
        }
    }

    /// The process that holds the mount.
    pub(super) fn supervisor(&self) -> ProcessId {
        ProcessId { pid: self.supervisor_pid, identity: self.supervisor_identity }
    }

    /// The first field that no supervisor writes so.
    fn problem(&self) -> Option<&'static str> {
        let plain = |text: &str| runtime::is_plain_name(text);
        let fields = [
            ("mountpoint", runtime::is_whole_path(&self.mountpoint)),
            ("store", runtime::is_whole_path(&self.store)),
            ("store_id", self.store_id.as_deref().is_none_or(plain)),
            ("supervisor_pid", runtime::is_pid(self.supervisor_pid)),
            ("server_pid", self.server_pid.is_none_or(runtime::is_pid)),
        ];
        fields.into_iter().find(|(_, is_valid)| !is_valid).map(|(field, _)| field)
    }
}

impl RecordDir {
    /// Makes the folder of a new mount.
    ///
    /// # Errors
    /// When the runtime directory cannot be made or written.
    pub fn create(supervisor: ProcessId) -> Result<RecordDir> {
        let all = runtime::create(MOUNTS)?;
        let name = format!("{}-{}", supervisor.pid, supervisor.identity);
        let path = all.path_of(&name);
        let fail = |e| runtime::failed("cannot make the mount's record", &path, e);
        let folder = all.create_folder(&name, 0o700).map_err(fail)?;
        let made = Self::locked(folder, LOOK)?;
        made.ours.set(true);
        Ok(made)
    }

    /// Takes over the folder of a mount whose supervisor has died.
    ///
    /// # Errors
    /// [`Code::InUse`](crate::error::Code::InUse) where a supervisor lives; not found where it was removed.
    pub fn take_over(path: &Path) -> Result<RecordDir> {
        Self::locked(open_record(path)?, LOOK)
    }

    /// Removes the folder of a mount whose processes are dead, unless somebody has it.
    pub(super) fn remove_dead(folder: Folder) {
        if let Ok(dead) = Self::locked(folder, Duration::ZERO) {
            log::debug!("removing the record of a dead mount: {}", dead.path.display());
            dead.ours.set(true);
        }
    }

    fn locked(folder: Folder, limit: Duration) -> Result<RecordDir> {
        let path = folder.path().to_owned();
        match locks::wait(&folder, true, limit, || false) {
            Ok(true) => Ok(RecordDir { path, folder, ours: Cell::new(false) }),
            Ok(false) => {
                Err(Error::in_use("the mount has a supervisor, or another one takes it over just now")
                    .at(&path)
                    .remedy("see `stencil status`"))
            }
            Err(e) => Err(Error::io("cannot use the mount's record", &path, e)),
        }
    }

    /// The folder that a supervisor hands to the program that it becomes.
    pub fn inherited(path: PathBuf, folder: OwnedFd) -> RecordDir {
        let folder = Folder::from_fd(folder, &path);
        RecordDir { path, folder, ours: Cell::new(false) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself.
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Opens the log to write at its end.
    ///
    /// # Errors
    /// The system's.
    pub fn open_log(&self) -> io::Result<fs::File> {
        runtime::append(&self.folder, LOG_FILE)
    }

    /// Removes what another supervisor has left at the control socket's name.
    ///
    /// # Errors
    /// The system's.
    pub fn remove_socket(&self) -> io::Result<()> {
        match self.folder.remove_tree(CONTROL_SOCKET) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Writes the record in one step.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn write(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record)
            .map_err(|e| Error::failed(format!("cannot write the mount's record: {e}")))?;
        let written = runtime::replace(&self.folder, RECORD_FILE, &text);
        self.ours.set(self.ours.get() || written.is_ok());
        written.map_err(|e| runtime::failed("cannot write the mount's record", &self.path, e))
    }
}

/// The folder of a record whose path a listing or a ledger has given.
pub(super) fn open_record(path: &Path) -> Result<Folder> {
    trust::open(path).map_err(|e| Error::io("cannot use the mount's record", path, e))
}

impl Drop for RecordDir {
    fn drop(&mut self) {
        if !self.ours.get() {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
