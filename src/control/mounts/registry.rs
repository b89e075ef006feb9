//! Records of live mounts: one directory each in `runtime_dir()/mounts`.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::runtime::{self, MAX_RECORD};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::{file_locks, trust};
use crate::sys::process::ProcessId;

/// The subdirectory of the runtime directory with one directory for each mount.
pub(in crate::control) const MOUNTS: &str = "mounts";
/// Name of the control socket in the directory of a record.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the log in the directory of a record.
pub const LOG_FILE: &str = "log";
const RECORD_FILE: &str = "mount.json";

/// Timeout for locking a record. A command that checks the record holds the lock for a moment.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// The record that a supervisor writes about its mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Mountpoint (canonical).
    pub mountpoint: PathBuf,
    /// Path of the store (canonical).
    pub store: PathBuf,
    /// [Identity](crate::store::Store::id) of the store.
    pub store_id: String,
    /// `st_dev` of the mount's files.
    pub device: u64,
    /// PID of the supervisor.
    pub supervisor_pid: u32,
    /// Identity of the supervisor's process.
    pub supervisor_identity: u64,
    /// PID of the server, if one runs.
    pub server_pid: Option<u32>,
    /// Identity of the server's process; 0 without a server.
    pub server_identity: u64,
    /// Version of supervisor and server.
    pub version: String,
    /// `st_dev` and `st_ino` of the ledger, so that a compromised server cannot substitute another ledger.
    pub ledger: (u64, u64),
    /// `st_dev` and `st_ino` of the program that servers are started from.
    pub program: (u64, u64),
    /// PID namespace of the PIDs, if `/proc` shows it.
    pub pid_namespace: Option<u64>,
}

/// A mount, usually with a live supervisor or server.
#[derive(Debug, Clone)]
pub struct Mount {
    /// Mountpoint; after a lazy unmount, the former one.
    pub mountpoint: PathBuf,
    /// Path of the store.
    pub store: PathBuf,
    /// Identity of the store.
    pub store_id: String,
    /// `st_dev` of the mount's files.
    pub device: u64,
    /// PID of the supervisor (dead if `orphaned`).
    pub supervisor_pid: u32,
    /// PID of the server.
    pub server_pid: Option<u32>,
    /// True after a lazy unmount.
    pub detached: bool,
    /// True if the supervisor is dead.
    pub orphaned: bool,
    /// True if supervisor and server run in another PID namespace: their PIDs mean nothing here, and clones may be
    /// invisible.
    pub foreign: bool,
    /// `st_dev` and `st_ino` of the ledger, and of the program that servers are started from.
    pub identities: [(u64, u64); 2],
    /// Directory with the record, the control socket and the log.
    pub dir: PathBuf,
}

/// The directory of a mount's record, locked by its supervisor until the supervisor exits. Removed on drop. A directory
/// that was taken over is removed only after this process has written its own record there: until then the mount may
/// continue without this process.
#[derive(Debug)]
pub struct RecordDir {
    path: PathBuf,
    /// The open directory: it carries the lock, and the control socket is reached through its descriptor. Mode 0700
    /// keeps other users from opening and locking it.
    folder: Directory,
    ours: Cell<bool>,
}

impl Mount {
    /// Returns true if supervisor and server are dead. No request to its files may be made: nothing answers.
    pub fn is_dead(&self) -> bool {
        self.orphaned && !self.foreign && self.server_pid.is_none()
    }

    /// Returns the path of the log, if there is one.
    pub fn log(&self) -> Option<PathBuf> {
        Some(self.dir.join(LOG_FILE)).filter(|log| log.is_file())
    }

    /// Returns the PIDs of supervisor and server, if they are alive and in this PID namespace.
    pub fn processes(&self) -> [Option<u32>; 2] {
        let supervisor = (!self.orphaned && !self.foreign).then_some(self.supervisor_pid);
        [supervisor, self.server_pid]
    }
}

impl Record {
    /// Reads the record in a directory. Returns `None` if there is no record: the supervisor is still starting and has
    /// no server yet, or the directory is stale.
    ///
    /// # Errors
    /// Returns `InvalidData` for a record that a supervisor cannot have written, and an error if a system call fails.
    pub(in crate::control) fn read(folder: &Directory) -> io::Result<Option<Record>> {
        let text = match runtime::read(folder, RECORD_FILE, MAX_RECORD) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let record: Record = serde_json::from_slice(&text)?;
        match record.problem() {
            None => Ok(Some(record)),
            Some(field) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("invalid field {field}"))),
        }
    }

    /// Returns the supervisor's process.
    pub(in crate::control) fn supervisor(&self) -> ProcessId {
        ProcessId { pid: self.supervisor_pid, identity: self.supervisor_identity }
    }

    /// Returns the first field with a value that a supervisor cannot have written.
    fn problem(&self) -> Option<&'static str> {
        let fields = [
            ("mountpoint", runtime::is_whole_path(&self.mountpoint)),
            ("store", runtime::is_whole_path(&self.store)),
            ("store_id", runtime::is_plain_name(&self.store_id)),
            ("supervisor_pid", runtime::is_pid(self.supervisor_pid)),
            ("server_pid", self.server_pid.is_none_or(runtime::is_pid)),
        ];
        fields.into_iter().find(|(_, is_valid)| !is_valid).map(|(field, _)| field)
    }
}

impl RecordDir {
    /// Creates the directory of a new mount.
    ///
    /// # Errors
    /// Returns an error if the runtime directory cannot be created or written.
    pub fn create(supervisor: ProcessId) -> Result<RecordDir> {
        let all = runtime::create(MOUNTS)?;
        let name = format!("{}-{}", supervisor.pid, supervisor.identity);
        let path = all.path_of(&name);
        let fail = |e| runtime::failed("cannot create the mount's record", &path, e);
        let folder = all.create_folder(&name, 0o700).map_err(fail)?;
        let created = Self::locked(folder, CHECK_TIMEOUT)?;
        created.ours.set(true);
        Ok(created)
    }

    /// Takes over the directory of a mount whose supervisor is dead.
    ///
    /// # Errors
    /// Returns [`Code::InUse`](crate::error::Code::InUse) if a supervisor is alive, and
    /// [`Code::NotFound`](crate::error::Code::NotFound) if the directory was removed.
    pub fn take_over(path: &Path) -> Result<RecordDir> {
        Self::locked(open_record(path)?, CHECK_TIMEOUT)
    }

    /// Removes the directory of a mount whose processes are dead, unless another process holds the lock.
    pub(in crate::control) fn remove_dead(folder: Directory) {
        if let Ok(dead) = Self::locked(folder, Duration::ZERO) {
            log::debug!("removing the record of a dead mount: {}", dead.path.display());
            dead.ours.set(true);
        }
    }

    fn locked(folder: Directory, limit: Duration) -> Result<RecordDir> {
        let path = folder.path().to_owned();
        match file_locks::wait(&folder, true, limit, || false) {
            Ok(true) => Ok(RecordDir { path, folder, ours: Cell::new(false) }),
            Ok(false) => {
                Err(Error::in_use("the mount has a supervisor, or another supervisor is taking it over")
                    .at(&path)
                    .hint("run 'stencil status'"))
            }
            Err(e) => Err(Error::io("cannot lock the mount's record", &path, e)),
        }
    }

    /// Wraps the locked directory that a supervisor leaves to the program that it executes.
    pub fn inherited(path: PathBuf, folder: OwnedFd) -> RecordDir {
        let folder = Directory::from_fd(folder, &path);
        RecordDir { path, folder, ours: Cell::new(false) }
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the descriptor of the directory.
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Opens the log for appending.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn open_log(&self) -> io::Result<fs::File> {
        runtime::append(&self.folder, LOG_FILE)
    }

    /// Removes the control socket of a predecessor.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn remove_socket(&self) -> io::Result<()> {
        match self.folder.remove_tree(CONTROL_SOCKET) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Writes the record atomically.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn write(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record)
            .map_err(|e| Error::failed(format!("cannot write the mount's record: {e}")))?;
        let written = runtime::replace(&self.folder, RECORD_FILE, &text);
        self.ours.set(self.ours.get() || written.is_ok());
        written.map_err(|e| runtime::failed("cannot write the mount's record", &self.path, e))
    }
}

/// Opens the directory of a record, whose path comes from a listing or a ledger.
pub(in crate::control) fn open_record(path: &Path) -> Result<Directory> {
    trust::open(path).map_err(|e| Error::io("cannot open the mount's record", path, e))
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

/// Returns a path to the control socket in the open directory of a record. The path fits into a socket address (107
/// bytes) however deep the directory is.
pub fn socket_path(folder: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}/{CONTROL_SOCKET}", folder.as_fd().as_raw_fd()).into()
}
