//! The records of living mounts: one folder each in `runtime_dir()/mounts`.

use std::cell::Cell;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::runtime_dir;
use crate::error::{Code, Error, Result};
use crate::store::Store;
use crate::sys::process::ProcessId;
use crate::sys::{mount, probe, procfs};

/// Name of the control socket in a record's folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the log in a record's folder.
pub const LOG_FILE: &str = "log";
const RECORD_FILE: &str = "mount.json";
/// A mount that begins has a record within this time, on a busy host too.
const BEGINNING: Duration = Duration::from_secs(2);

/// What a supervisor writes down about its mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it is mounted (canonical).
    pub mountpoint: PathBuf,
    /// The store that it serves (canonical).
    pub store: PathBuf,
    /// Its [`id`](Store::id); unknown to versions before.
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
    /// The folder itself: the lock is on it, and the control socket is reached through it.
    folder: OwnedFd,
    ours: Cell<bool>,
}

impl Mount {
    /// Its supervisor and its server, as far as they live and their numbers mean something in this PID namespace.
    pub fn processes(&self) -> [Option<u32>; 2] {
        let supervisor = (!self.orphaned && !self.foreign).then_some(self.supervisor_pid);
        [supervisor, self.server_pid]
    }
}

impl RecordDir {
    /// Makes the folder of a new mount.
    ///
    /// # Errors
    /// When the runtime directory cannot be made or written.
    pub fn create(supervisor: ProcessId) -> Result<RecordDir> {
        let path = folder_of_records()?.join(format!("{}-{}", supervisor.pid, supervisor.identity));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io("cannot make the mount's record", &path, e))?;
        let made = Self::take_over(&path)?;
        made.ours.set(true);
        Ok(made)
    }

    /// Takes over the folder of a mount whose supervisor has died.
    ///
    /// # Errors
    /// [`Code::InUse`] where a supervisor lives.
    pub fn take_over(path: &Path) -> Result<RecordDir> {
        let fail = |e| Error::io("cannot use the mount's record", path, e);
        let folder = OwnedFd::from(fs::File::open(path).map_err(fail)?);
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(RecordDir::inherited(path.to_owned(), folder)),
            Err(Errno::WOULDBLOCK) => {
                Err(Error::in_use("the mount has a supervisor, or another one takes it over just now")
                    .at(path)
                    .remedy("see `stencil status`"))
            }
            Err(e) => Err(fail(e.into())),
        }
    }

    /// The folder that a supervisor hands to the program that it becomes.
    pub fn inherited(path: PathBuf, folder: OwnedFd) -> RecordDir {
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
        self.ours.set(self.ours.get() || written.is_ok());
        written.map_err(|e| Error::io("cannot write the mount's record", &self.path, e))
    }
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

/// The folder that has one for each mount; made where it is not there.
pub(super) fn folder_of_records() -> Result<PathBuf> {
    let all = runtime_dir().join("mounts");
    fs::create_dir_all(&all).map_err(|e| {
        Error::io("cannot make the runtime directory", &all, e)
            .remedy("run it as root, or set STENCIL_RUNTIME_DIR to a directory that you can write")
    })?;
    Ok(all)
}

/// The mounts of a store that can be known, by whatever path it was mounted: one folder may have several, below a bind
/// mount for example.
///
/// # Errors
/// As [`mounts`].
pub fn mounts_of(store: &Store) -> Result<Vec<Mount>> {
    Ok(only(mounts()?, store))
}

/// As [`mounts_of`], for who must know of every one.
///
/// # Errors
/// [`Code::TryAgain`] where a record cannot be read, or a mount of the store has none in
/// this runtime directory.
pub fn every_mount_of(store: &Store) -> Result<Vec<Mount>> {
    let until = Instant::now() + BEGINNING;
    loop {
        let all = every_mount()?;
        let known = |dev| all.iter().any(|m| m.device == dev);
        let ours = identity(store.dir());
        let serves = |source: &Path| source == store.dir() || (ours.is_some() && identity(source) == ours);
        let mut mounted = procfs::mounts()?.into_iter().filter(|line| line.fs_type == mount::FS_TYPE);
        let Some(stranger) = mounted.find(|m| !known(m.dev) && serves(Path::new(&m.source))) else {
            let of_before = |m: &&Mount| m.store_id.is_none() && !serves(&m.store);
            return match all.iter().find(of_before) {
                Some(mount) => Err(of_unknown_store(mount)),
                None => Ok(only(all, store)),
            };
        };
        if Instant::now() > until {
            return Err(Error::try_again("a mount of the store has no record in this runtime directory")
                .at(&stranger.mountpoint)
                .remedy(format!(
                    "run it with the STENCIL_RUNTIME_DIR of that mount, here it is {}; or take the mount away: \
                     stencil umount {}",
                    runtime_dir().display(),
                    stranger.mountpoint.display()
                )));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Another store may lie at the path of one that was moved.
fn of_unknown_store(mount: &Mount) -> Error {
    Error::try_again("a mount of an older build does not say which store it serves")
        .at(&mount.mountpoint)
        .remedy(format!("run `stencil restart {}` first", mount.mountpoint.display()))
}

/// Whether a mount has not ended.
///
/// # Errors
/// As [`every_mount_of`]: a record that cannot be read is no sign of an end.
pub(super) fn lives(mount: &Mount) -> Result<bool> {
    Ok(every_mount()?.iter().any(|living| living.dir == mount.dir))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino())).ok()
}

fn only(mut mounts: Vec<Mount>, store: &Store) -> Vec<Mount> {
    mounts.retain(|m| is_of_store(&m.store, m.store_id.as_deref(), store));
    mounts
}

/// Whether a mount is of that store, which has this path and identity by its own word.
pub fn is_of_store(path: &Path, id: Option<&str>, store: &Store) -> bool {
    let ours = identity(store.dir());
    if id != Some(store.id().as_str()) {
        return path == store.dir() || (ours.is_some() && identity(path) == ours);
    }
    // A copy of a store has its id too. Only one that lies at the mount's path, beside ours, says that the mount is not
    // ours: anything else may have come there when ours was moved, or in another mount namespace.
    identity(path) == ours || Store::open(path).map_or(true, |its| its.id() != store.id())
}

/// Every mount of this runtime directory whose supervisor or server lives, lazily unmounted ones too, by mountpoint.
/// Records of dead ones are removed on the way; not those of another PID namespace, whose processes cannot be seen.
///
/// # Errors
/// When the runtime directory exists and cannot be read. A directory that does not exist holds no mount.
pub fn mounts() -> Result<Vec<Mount>> {
    let (found, unread) = mounts_and_unread()?;
    unread.iter().for_each(|error| log::warn!("{error}"));
    Ok(found)
}

/// As [`mounts`], for who must know of every one.
///
/// # Errors
/// As there, or [`Code::TryAgain`] where a record cannot be read.
pub fn every_mount() -> Result<Vec<Mount>> {
    let (all, unread) = mounts_and_unread()?;
    unread.into_iter().next().map_or(Ok(all), Err)
}

/// As [`mounts`], and why records of more mounts could not be read.
///
/// # Errors
/// As [`mounts`].
pub fn mounts_and_unread() -> Result<(Vec<Mount>, Vec<Error>)> {
    let all = runtime_dir().join("mounts");
    let fail = |e: io::Error| {
        let remedy = match e.kind() {
            io::ErrorKind::PermissionDenied => {
                "run it as root: mounts have their records in this directory and in no other"
            }
            _ => "STENCIL_RUNTIME_DIR names the directory with the records of mounts: set it to that one",
        };
        Error::io("cannot read the runtime directory", &all, e).remedy(remedy)
    };
    let entries = match fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        Err(e) => return Err(fail(e)),
    };
    let mounted = procfs::mounts()?;
    let namespace = probe::pid_namespace();
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for entry in entries {
        let dir = entry.map_err(fail)?.path();
        let record = match read_record(&dir) {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            Err(error) => {
                unread.push(error);
                continue;
            }
        };
        // A number says nothing here when it is of another PID namespace; a lock is the same everywhere.
        let foreign = record.pid_namespace.is_some_and(|its| Some(its) != namespace);
        let alive = |pid, identity| !foreign && ProcessId { pid, identity }.is_alive();
        let supervisor = match foreign {
            true => is_locked(&dir),
            false => alive(record.supervisor_pid, record.supervisor_identity),
        };
        let server = record.server_pid.filter(|&pid| alive(pid, record.server_identity));
        let dead = !supervisor && server.is_none() && !foreign;
        if dead && removed(&dir) {
            continue;
        }
        // Where it was not, somebody takes it over just now.
        let supervisor = supervisor || dead;
        let detached = !mounted.iter().any(|m| m.dev == record.device);
        found.push(Mount {
            mountpoint: record.mountpoint,
            store: record.store,
            store_id: record.store_id,
            device: record.device,
            supervisor_pid: record.supervisor_pid,
            server_pid: server,
            detached,
            orphaned: !supervisor,
            foreign,
            version: record.version,
            identities: [record.ledger, record.program],
            dir,
        });
    }
    found.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    Ok((found, unread))
}

/// Removes the record of a mount whose processes are dead; false while somebody has it.
fn removed(dir: &Path) -> bool {
    match RecordDir::take_over(dir) {
        Ok(dead) => {
            log::debug!("removing the record of a dead mount: {}", dir.display());
            dead.ours.set(true);
            true
        }
        Err(error) => error.code() != Code::InUse,
    }
}

/// True while a supervisor has the folder of its record.
fn is_locked(dir: &Path) -> bool {
    // Shared: two that look at the same time do not take each other for a supervisor.
    let look = |folder: fs::File| flock(&folder, FlockOperation::NonBlockingLockShared);
    fs::File::open(dir).is_ok_and(|folder| look(folder) == Err(Errno::WOULDBLOCK))
}

/// A folder without a record belongs to a supervisor that is just starting, which has no server yet, or to nobody.
///
/// # Errors
/// [`Code::TryAgain`] that says why it cannot be read.
fn read_record(dir: &Path) -> Result<Option<Record>> {
    let path = dir.join(RECORD_FILE);
    let unread = |e: io::Error| {
        Error::try_again("the record of a mount cannot be read").at(&path).because(e).remedy(format!(
            "run it as root, with the Stencil that made it; if nobody lives there any more, remove {}",
            dir.display()
        ))
    };
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| unread(e.into())),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(unread(e)),
    }
}
