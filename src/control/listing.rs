//! Which mounts there are, as the records of this runtime directory and the mount table say.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::registry::{LOG_FILE, MOUNTS, Mount, Record, RecordDir};
use super::runtime::{self, is_plain_name, runtime_dir, trusted_folder};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::folder::Folder;
use crate::sys::process::ProcessId;
use crate::sys::{mount, probe, procfs};

/// A mount that begins has a record within this time, on a busy host too.
const BEGINNING: Duration = Duration::from_secs(2);

/// What the runtime directory says.
#[derive(Debug, Default)]
pub struct Listing {
    /// Mounts whose supervisor or server lives, lazily unmounted ones too, by mountpoint.
    pub mounts: Vec<Mount>,
    /// Mounts in the mount table whose supervisor and server are dead.
    pub dead: Vec<DeadMount>,
    /// Why records of more mounts could not be read.
    pub unread: Vec<Error>,
}

/// A mount that nobody of Stencil serves any more.
#[derive(Debug, Clone)]
pub struct DeadMount {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The store that it served.
    pub store: PathBuf,
    /// Its identity.
    pub store_id: Option<String>,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// The log, where it had one.
    pub log: Option<PathBuf>,
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
/// [`Code::TryAgain`](crate::error::Code::TryAgain) where a record cannot be read, or a mount of the store has none in
/// this runtime directory.
pub fn every_mount_of(store: &Store) -> Result<Vec<Mount>> {
    let until = Instant::now() + BEGINNING;
    loop {
        let Listing { mounts: all, dead, unread } = list()?;
        if let Some(error) = unread.into_iter().next() {
            return Err(error);
        }
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
        if let Some(dead) = dead.iter().find(|dead| dead.device == stranger.dev) {
            return Err(dead.error());
        }
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

impl DeadMount {
    /// That nobody serves it, and what to do.
    pub fn error(&self) -> Error {
        let place = self.mountpoint.display();
        Error::try_again("nobody serves this mount: its supervisor and its server are dead")
            .at(&self.mountpoint)
            .remedy(format!(
                "mount the store there again: stencil mount {place}; or take it away: stencil umount {place}"
            ))
    }
}

impl Mount {
    /// That its supervisor is dead, and what to do.
    pub fn lost_supervisor(&self) -> Error {
        let place = self.mountpoint.display();
        let (supervisor, server) = (self.supervisor_pid, self.server_pid);
        let serves = server.map_or_else(String::new, |pid| format!("; its server, process {pid}, serves on"));
        let elsewhere = if self.foreign { " in another PID namespace, or hidden there" } else { "" };
        let remedy = match (self.foreign, self.detached) {
            (true, _) => format!("run `stencil mount {place}` where that mount was made"),
            (_, true) => "it is detached, and ends with its last clone: see `stencil ps`".to_owned(),
            _ => format!("give it another supervisor: stencil mount {place}"),
        };
        let what =
            format!("the mount has lost its supervisor: process {supervisor} is dead{elsewhere}{serves}");
        Error::failed(what).at(&self.mountpoint).remedy(remedy)
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
pub fn lives(mount: &Mount) -> Result<bool> {
    Ok(every_mount()?.iter().any(|living| living.dir == mount.dir))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino())).ok()
}

/// Leaves out mounts of other stores.
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
///
/// # Errors
/// When the runtime directory exists and cannot be read. A directory that does not exist holds no mount.
pub fn mounts() -> Result<Vec<Mount>> {
    let listing = list()?;
    listing.unread.iter().for_each(|error| log::warn!("{error}"));
    Ok(listing.mounts)
}

/// As [`mounts`], for who must know of every one.
///
/// # Errors
/// As there, or [`Code::TryAgain`](crate::error::Code::TryAgain) where a record cannot be read.
pub fn every_mount() -> Result<Vec<Mount>> {
    let listing = list()?;
    listing.unread.into_iter().next().map_or(Ok(listing.mounts), Err)
}

/// All records. Those of dead mounts are removed on the way once the mount is gone; not those of another PID namespace,
/// whose processes cannot be seen.
///
/// # Errors
/// As [`mounts`].
pub fn list() -> Result<Listing> {
    let mut listing = Listing::default();
    let Some(all) = runtime::open(MOUNTS)? else { return Ok(listing) };
    let names = all.names().map_err(|e| Error::io("cannot read the runtime directory", all.path(), e))?;
    let table = procfs::mounts()?;
    let namespace = probe::pid_namespace();
    let mut dead = Vec::new();
    for name in names {
        let read = read_record(&all, Path::new(&name));
        let (folder, record) = match read {
            Ok(Some(read)) => read,
            Ok(None) => continue,
            Err(e) => {
                listing.unread.push(unread(&all.path_of(&name), e));
                continue;
            }
        };
        // A number says nothing here when it is of another PID namespace; a lock is the same everywhere.
        let foreign = record.pid_namespace.is_some_and(|its| Some(its) != namespace);
        let alive = |pid, identity| !foreign && ProcessId { pid, identity }.is_alive();
        let supervisor = match foreign {
            true => is_locked(&folder),
            false => alive(record.supervisor_pid, record.supervisor_identity),
        };
        let server = record.server_pid.filter(|&pid| alive(pid, record.server_identity));
        let lost = !supervisor && !foreign;
        // One that takes it over has the lock before its record is there, for long where the file system is full.
        let taken_over = lost && is_locked(&folder);
        let place = table.iter().rfind(|line| line.dev == record.device);
        if lost && !taken_over && server.is_none() {
            match place {
                Some(line) if line.fs_type == mount::FS_TYPE && line.mountpoint == record.mountpoint => {
                    dead.push((folder, record));
                    continue;
                }
                _ => {
                    RecordDir::remove_dead(folder);
                    continue;
                }
            }
        }
        listing.mounts.push(Mount {
            dir: all.path_of(&name),
            mountpoint: record.mountpoint,
            store: record.store,
            store_id: record.store_id,
            device: record.device,
            supervisor_pid: record.supervisor_pid,
            server_pid: server,
            detached: place.is_none(),
            orphaned: !supervisor && !taken_over,
            foreign,
            version: record.version,
            identities: [record.ledger, record.program],
        });
    }
    // The kernel gives the number of a device again: of several records the newest is that of the mount.
    dead.sort_by_key(|(folder, _)| {
        std::cmp::Reverse(folder.own_metadata().map_or((0, 0), |stat| (stat.st_ctime, stat.st_ctime_nsec)))
    });
    for (folder, record) in dead {
        let known = |device| device == record.device;
        if listing.mounts.iter().any(|living| known(living.device))
            || listing.dead.iter().any(|newer| known(newer.device))
        {
            RecordDir::remove_dead(folder);
            continue;
        }
        let log = folder.has(LOG_FILE).then(|| folder.path_of(LOG_FILE));
        let Record { mountpoint, store, store_id, device, .. } = record;
        listing.dead.push(DeadMount { mountpoint, store, store_id, device, log });
    }
    listing.mounts.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    Ok(listing)
}

fn read_record(all: &Folder, name: &Path) -> io::Result<Option<(Folder, Record)>> {
    if !name.to_str().is_some_and(is_plain_name) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no supervisor gives its folder this name"));
    }
    let folder = match trusted_folder(all, name) {
        // It was removed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder?,
    };
    Ok(Record::read(&folder)?.map(|record| (folder, record)))
}

fn unread(dir: &Path, e: io::Error) -> Error {
    Error::try_again("the record of a mount cannot be read").at(dir).because(e).remedy(format!(
        "run it as root, with the Stencil that made it; if nobody lives there any more, remove {}",
        dir.display()
    ))
}

/// True while a supervisor has the folder of its record.
pub(super) fn is_locked(folder: &Folder) -> bool {
    // Shared: two that look at the same time do not take each other for a supervisor.
    let locked = flock(folder, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK);
    if !locked {
        let _ = flock(folder, FlockOperation::Unlock);
    }
    locked
}
