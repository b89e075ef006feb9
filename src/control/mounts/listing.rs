//! Lists mounts from the records in the runtime directory and from the kernel's mount table.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::registry::{MOUNTS, Mount, Record, RecordDir};
use crate::control::runtime::{self, is_plain_name, runtime_dir, trusted_folder};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::files::directory::Directory;
use crate::sys::files::mount;
use crate::sys::fuse::control_fs::Waiting;
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::sys::process::procfs;

/// Longest time from the mount system call until the record is written, on a busy host too.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time from the last use of a detached mount until the kernel has ended its connection.
const CONNECTION_END_TIMEOUT: Duration = Duration::from_millis(200);

/// Contents of the runtime directory.
#[derive(Debug, Default)]
pub struct Listing {
    /// Mounts whose supervisor or server is alive, sorted by mountpoint; lazily unmounted ones too.
    pub mounts: Vec<Mount>,
    /// Mounts whose supervisor and server are dead, in the mount table or used by a process.
    pub dead: Vec<Mount>,
    /// Errors of records that could not be read.
    pub unread: Vec<Error>,
}

/// Returns the readable mounts of a store, whichever path of the store was mounted: a bind mount, for example, gives
/// one directory several paths.
///
/// # Errors
/// Same as [`mounts`].
pub fn mounts_of(store: &Store) -> Result<Vec<Mount>> {
    Ok(only(mounts()?, store))
}

/// Returns the mount through which the templates of a store are reached by their paths.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the store is not mounted. Otherwise same as [`mounts`].
pub fn mount_of(store: &Store) -> Result<Mount> {
    mounts_of(store)?.into_iter().find(|mount| !mount.detached).ok_or_else(|| {
        let dir = store.dir();
        Error::not_found("the store is not mounted")
            .at(dir)
            .hint(format!("mount the store: stencil --store {} mount MNT", dir.display()))
    })
}

/// Same as [`mounts_of`], for callers that must see all mounts.
///
/// # Errors
/// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if a record cannot be read, or if a mount of the store is
/// dead or has no record in this runtime directory.
pub fn every_mount_of(store: &Store) -> Result<Vec<Mount>> {
    let until = Instant::now() + RECORD_TIMEOUT;
    loop {
        let Listing { mounts: all, dead, unread } = list()?;
        if let Some(error) = unread.into_iter().next() {
            return Err(error);
        }
        let is_ours = |dead: &&Mount| dead.detached && is_of_store(&dead.store, &dead.store_id, store);
        if let Some(dead) = dead.iter().find(is_ours) {
            return Err(dead.lost_both());
        }
        let known = |dev| all.iter().any(|m| m.device == dev);
        let ours = identity(store.dir());
        let serves = |source: &Path| source == store.dir() || (ours.is_some() && identity(source) == ours);
        let mut mounted = procfs::mounts()?.into_iter().filter(|line| line.fs_type == mount::FS_TYPE);
        let Some(stranger) = mounted.find(|m| !known(m.dev) && serves(Path::new(&m.source))) else {
            return Ok(only(all, store));
        };
        if let Some(dead) = dead.iter().find(|dead| dead.device == stranger.dev) {
            return Err(dead.lost_both());
        }
        if Instant::now() > until {
            return Err(Error::try_again("a mount of the store has no record in this runtime directory")
                .at(&stranger.mountpoint)
                .hint(format!(
                    "run the command with the STENCIL_RUNTIME_DIR of that mount (here: {}), or unmount it: \
                     'stencil umount {}'",
                    runtime_dir().display(),
                    stranger.mountpoint.display()
                )));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

impl Mount {
    /// Returns the error that reports the dead mount and the remedy.
    pub fn lost_both(&self) -> Error {
        let place = self.mountpoint.display();
        Error::try_again("the mount is dead: its supervisor and its server have exited")
            .at(&self.mountpoint)
            .hint(match self.detached {
                true => format!(
                    "end the processes that use the mount ('stencil ps' lists its clones), or run 'stencil umount --force \
                     {place}'; the detached mount ends with the last process"
                ),
                false => format!(
                    "run 'stencil --store {} mount {place}' with the options of that mount to mount the store again, or \
                     'stencil umount {place}' to unmount",
                    self.store.display()
                ),
            })
    }

    /// Returns the error that reports the dead supervisor and the remedy.
    pub fn lost_supervisor(&self) -> Error {
        let place = self.mountpoint.display();
        let (supervisor, server) = (self.supervisor_pid, self.server_pid);
        let serves =
            server.map_or_else(String::new, |pid| format!("; its server, process {pid}, still serves"));
        let elsewhere = if self.foreign { " or invisible, in another PID namespace" } else { "" };
        let remedy = match (self.foreign, self.detached) {
            (true, _) => format!("run 'stencil mount {place}' in the PID namespace of that mount"),
            (_, true) => {
                "run 'stencil ps' to list the clones: the detached mount ends with the last one".to_owned()
            }
            _ => format!("run 'stencil mount {place}' to start another supervisor"),
        };
        let what =
            format!("the mount has lost its supervisor: process {supervisor} is dead{elsewhere}{serves}");
        Error::failed(what).at(&self.mountpoint).hint(remedy)
    }
}

/// Returns true if the mount still exists.
///
/// # Errors
/// Same as [`every_mount`]: a record that cannot be read does not prove the end of a mount.
pub fn lives(mount: &Mount) -> Result<bool> {
    Ok(every_mount()?.iter().any(|living| living.dir == mount.dir))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino())).ok()
}

/// Keeps the mounts of one store.
fn only(mut mounts: Vec<Mount>, store: &Store) -> Vec<Mount> {
    mounts.retain(|m| is_of_store(&m.store, &m.store_id, store));
    mounts
}

/// Returns true if a mount, whose record has this store path and identity, is a mount of `store`.
pub fn is_of_store(path: &Path, id: &str, store: &Store) -> bool {
    let ours = identity(store.dir());
    if id != store.id() {
        return path == store.dir() || (ours.is_some() && identity(path) == ours);
    }
    // A copy of a store has the same identity. Only a store with that identity at the mount's path, distinct from ours,
    // shows that the mount is of another store. If the path leads to anything else, another store may be at that path
    // now, because our store was moved, or the path is of another mount namespace.
    identity(path) == ours || Store::open(path).map_or(true, |its| its.id() != store.id())
}

/// Returns the mounts of this runtime directory whose supervisor or server is alive, sorted by mountpoint; lazily
/// unmounted ones too. Logs the errors of unreadable records.
///
/// # Errors
/// Returns an error if the runtime directory exists and cannot be read. A missing directory has no mounts.
pub fn mounts() -> Result<Vec<Mount>> {
    let listing = list()?;
    listing.unread.iter().for_each(|error| log::warn!("{error}"));
    Ok(listing.mounts)
}

/// Same as [`mounts`], with the dead mounts behind the others: their clones can be found by the mappings.
///
/// # Errors
/// Same as [`mounts`].
pub fn mounts_and_dead() -> Result<Vec<Mount>> {
    let Listing { mut mounts, dead, unread } = list()?;
    unread.iter().for_each(|error| log::warn!("{error}"));
    mounts.extend(with_store(dead));
    Ok(mounts)
}

/// Returns the dead mounts whose store can be read. Logs the others: their clones are unknown.
pub fn with_store(dead: Vec<Mount>) -> Vec<Mount> {
    let (mounts, unknown) = with_store_or_error(dead);
    unknown.iter().for_each(|error| log::warn!("{error}"));
    mounts
}

/// Same as [`with_store`], with an error for each of the others.
pub fn with_store_or_error(mut dead: Vec<Mount>) -> (Vec<Mount>, Vec<Error>) {
    let mut unknown = Vec::new();
    dead.retain(|mount| match Store::open(&mount.store) {
        Ok(store) if store.id() == mount.store_id => true,
        opened => {
            let why = opened.map_or_else(|e| e.to_string(), |_| "another store is at its path".to_owned());
            let place = mount.mountpoint.display();
            unknown.push(
                Error::try_again(format!("the clones of the dead mount {place} are unknown: {why}")).hint(
                    format!(
                        "make the store readable at {}, or unmount: 'stencil umount {place}'",
                        mount.store.display()
                    ),
                ),
            );
            false
        }
    });
    (dead, unknown)
}

/// Same as [`mounts`], for callers that must see all mounts.
///
/// # Errors
/// Same as [`mounts`], and [`Code::TryAgain`](crate::error::Code::TryAgain) if a record cannot be read.
pub fn every_mount() -> Result<Vec<Mount>> {
    let listing = list()?;
    listing.unread.into_iter().next().map_or(Ok(listing.mounts), Err)
}

/// Reads all records. Removes the records of dead mounts that are no longer in the mount table, except those of other
/// PID namespaces, whose processes are invisible.
///
/// # Errors
/// Same as [`mounts`].
pub fn list() -> Result<Listing> {
    let mut listing = Listing::default();
    let Some(all) = runtime::open(MOUNTS)? else { return Ok(listing) };
    let names = all.names().map_err(|e| Error::io("cannot read the runtime directory", all.path(), e))?;
    let table = procfs::mounts()?;
    let namespace = probe::pid_namespace();
    let mut dead = Vec::new();
    let mut until = None;
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
        // A PID of another PID namespace means nothing here; a lock is visible in every namespace.
        let foreign = record.pid_namespace.is_some_and(|its| Some(its) != namespace);
        let alive = |pid, identity| !foreign && ProcessId { pid, identity }.is_alive();
        let supervisor = match foreign {
            true => is_locked(&folder),
            false => alive(record.supervisor_pid, record.supervisor_identity),
        };
        let server = record.server_pid.filter(|&pid| alive(pid, record.server_identity));
        let lost = !supervisor && !foreign;
        // A supervisor that takes over holds the lock before its record is written, for long if the file system is
        // full.
        let taken_over = lost && is_locked(&folder);
        let place = table.iter().rfind(|line| line.dev == record.device);
        if lost && !taken_over && server.is_none() {
            let exists = match place {
                Some(line) => line.fs_type == mount::FS_TYPE && line.mountpoint == record.mountpoint,
                None => {
                    let until = *until.get_or_insert_with(|| Instant::now() + CONNECTION_END_TIMEOUT);
                    is_in_use(|| Waiting::of(record.device).map(drop), until)
                }
            };
            match exists {
                true => dead.push((dead_mount(&folder, record, place.is_none()), folder)),
                false => RecordDir::remove_dead(folder),
            }
            continue;
        }
        listing.mounts.push(Mount {
            server_pid: server,
            orphaned: !supervisor && !taken_over,
            foreign,
            ..dead_mount(&folder, record, place.is_none())
        });
    }
    // The kernel reuses device numbers: the newest of several records belongs to the mount.
    dead.sort_by_key(|(_, folder): &(Mount, Directory)| {
        std::cmp::Reverse(folder.own_metadata().map_or((0, 0), |stat| (stat.st_ctime, stat.st_ctime_nsec)))
    });
    for (mount, folder) in dead {
        let known = |device| device == mount.device;
        if listing.mounts.iter().any(|living| known(living.device))
            || listing.dead.iter().any(|newer| known(newer.device))
        {
            RecordDir::remove_dead(folder);
            continue;
        }
        listing.dead.push(mount);
    }
    listing.mounts.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    Ok(listing)
}

/// Returns true if a process uses a detached mount, which keeps its connection then. The kernel ends the connection
/// shortly after the last use. An error other than `ENOENT` is no proof of the end.
fn is_in_use(connection: impl Fn() -> io::Result<()>, until: Instant) -> bool {
    while !connection().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        if Instant::now() > until {
            return true;
        }
        thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Returns the mount of a record, as if its processes were dead.
fn dead_mount(folder: &Directory, record: Record, detached: bool) -> Mount {
    Mount {
        dir: folder.path().to_owned(),
        mountpoint: record.mountpoint,
        store: record.store,
        store_id: record.store_id,
        device: record.device,
        supervisor_pid: record.supervisor_pid,
        server_pid: None,
        detached,
        orphaned: true,
        foreign: false,
        identities: [record.ledger, record.program],
    }
}

fn read_record(all: &Directory, name: &Path) -> io::Result<Option<(Directory, Record)>> {
    if !name.to_str().is_some_and(is_plain_name) {
        let reason = "a supervisor does not give its directory such a name";
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let folder = match trusted_folder(all, name) {
        // The record was removed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder?,
    };
    Ok(Record::read(&folder)?.map(|record| (folder, record)))
}

fn unread(dir: &Path, e: io::Error) -> Error {
    Error::try_again("cannot read the record of a mount").at(dir).because(e).hint(format!(
        "run the command as root, with the version of Stencil that wrote the record; if that mount no longer \
         exists, remove {}",
        dir.display()
    ))
}

/// Returns true while a supervisor holds the lock on the directory of its record.
pub(in crate::control) fn is_locked(folder: &Directory) -> bool {
    // A shared lock: two checks at the same time must not take each other for a supervisor.
    let locked = flock(folder, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK);
    if !locked {
        let _ = flock(folder, FlockOperation::Unlock);
    }
    locked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_connection_is_no_longer_in_use() {
        let in_use = |errno| is_in_use(|| Err(io::Error::from_raw_os_error(errno)), Instant::now());
        assert!(!in_use(libc::ENOENT));
        assert!(in_use(libc::EPERM) && in_use(libc::EMFILE));
        assert!(is_in_use(|| Ok(()), Instant::now()));
    }
}
