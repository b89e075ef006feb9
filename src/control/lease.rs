//! Leases: a lease protects a template between the resolution of its name and the moment when the kernel shows its use.
//! A removal reads the leases and refuses to remove a leased template.
//!
//! A lease is a locked file in `runtime_dir()/leases/<store>/`, never in the store, which may be read-only. The kernel
//! releases the lock when its holder exits in any way: a file without a lock is stale.
//!
//! The taker of a lease and a removal each write their own file first, and then read the files of the other. At least
//! one of the two therefore sees the other: the taker waits during a removal of its template, and the removal refuses
//! if a lease exists.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::runtime::{self, runtime_dir, trusted_file};
use crate::error::{Code, Error, Result};
use crate::store::{ContentLock, Digest, Refused, Store, TemplateRef};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::sys::probe;

/// Longest time that a lease waits for a removal of the same template.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Longest wait for the lock on a new lease file, which a scan for stale leases locks for a moment.
const SCAN_TIMEOUT: Duration = Duration::from_secs(2);

const STOPPED: &str = "check whether that process is stopped; resume it with 'kill -CONT', or end it";

/// Time after which a removal that holds the removal lock without progress counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// File name extensions of leases and of removal marks: a scan for one kind opens no file of the other.
const LEASE: &str = "lease";
const REMOVAL: &str = "removal";
const NEW: &str = "new";
/// Locked by a removal: one removal from a store runs at a time.
const LOCK: &str = "removal.lock";
/// Largest lease file, in bytes; real ones are much shorter.
const MAX_LENGTH: u64 = 4096;

/// Process that holds a lease on a template, or a removal that has marked the template (`removes`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// PID of the process that took the lease.
    pub pid: u32,
    /// PID namespace of `pid` (inode number of the namespace).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_namespace: Option<u64>,
    /// Name of its command.
    pub command: String,
    /// Start of the lease, in seconds since 1970.
    pub since: u64,
    /// The template.
    pub digest: Digest,
    /// True for a removal that checks whether the template is in use.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removes: bool,
}

impl LeaseHolder {
    /// Returns the holder as text: `12 (clone)`.
    pub fn name(&self) -> String {
        let foreign = self.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace());
        let place = if foreign { " in another PID namespace" } else { "" };
        format!("{} ({}){place}", self.pid, self.command)
    }
}

/// A lease on a template, which is not removed while this value exists.
#[derive(Debug)]
pub struct Lease {
    _held: Held,
}

#[derive(Debug)]
enum Held {
    File {
        _file: LeaseFile,
    },
    /// The runtime directory is not writable: a lock on the store's content keeps removed files from being deleted.
    Content {
        _hold: ContentLock,
    },
    /// The store is on a read-only file system too, so this path cannot remove anything. A removal through a writable
    /// mount of the store makes a command that reads the template fail; a process that has a file of the template open
    /// or mapped is found as usual.
    Nothing,
}

impl Lease {
    /// Resolves a name and takes a lease on its template.
    ///
    /// # Errors
    /// Same as [`Store::resolve`] and [`Lease::take`].
    pub fn of(store: &Store, reference: &TemplateRef, command: &str) -> Result<(Digest, Lease)> {
        loop {
            let digest = store.resolve(reference)?;
            match Lease::take(store, &digest, command) {
                Ok(lease) => return Ok((digest, lease)),
                // The template was removed in between: resolve the name again, as it may point to another template now.
                Err(e) if e.code() == Code::NotFound && store.resolve(reference)? != digest => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes a lease on a template, for the command with the name `command`. Waits for a removal of the template to
    /// end.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`] if the store does not have the template (any more), and [`Code::TryAgain`] if a
    /// removal of the template lasts longer than a minute.
    pub fn take(store: &Store, digest: &Digest, command: &str) -> Result<Lease> {
        let held = match LeaseFile::create(store, &holder(digest, command, false)) {
            Ok(file) => Held::File { _file: file },
            Err(e) if matches!(e.errno(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
                match store.is_on_read_only_filesystem() {
                    true => Held::Nothing,
                    false => Held::Content { _hold: store.lock_content_shared().map_err(|_| e)? },
                }
            }
            Err(e) => return Err(e),
        };
        let until = Instant::now() + REMOVAL_TIMEOUT;
        // Without a lease file a removal cannot see this process, and the removal marks are not readable.
        let removals = || if let Held::File { .. } = held { removals(store) } else { Ok(Vec::new()) };
        while let Some(removal) = removals()?.into_iter().find(|l| l.digest == *digest) {
            if Instant::now() > until {
                return Err(Error::try_again(format!(
                    "timed out after {} s waiting for process {}, which is removing template {digest}",
                    REMOVAL_TIMEOUT.as_secs(),
                    removal.pid
                ))
                .hint(STOPPED));
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
        if !store.find(digest)? {
            return Err(store.no_template(digest));
        }
        Ok(Lease { _held: held })
    }
}

/// Marks of a removal in progress: no new lease on its templates is granted while this value exists.
#[derive(Debug)]
pub struct RemovalMark {
    /// Dropped in this order: the marks are removed before the lock is released to the next removal.
    held: Option<(Vec<(Digest, LeaseFile)>, File)>,
}

impl RemovalMark {
    /// Announces the removal of templates. Waits for other removals from the same store: two removals that saw each
    /// other's marks would both have to give up.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`] with the name of a removal that makes no progress for 20 seconds, and an error if the
    /// runtime directory cannot be written.
    pub fn announce(store: &Store, digests: &[Digest]) -> Result<RemovalMark> {
        let folder = match make_folder(store) {
            // A user who cannot create the runtime directory removes from a store that has no mounts and no leases.
            Err(_) if !runtime_dir().exists() => {
                return Ok(RemovalMark { held: None });
            }
            made => made?,
        };
        let path = folder.path_of(LOCK);
        let (lock, _) = folder.open_or_create(LOCK, 0o600).map_err(|e| closed(&path, e))?;
        let mut first = (None, Instant::now());
        let progress = || {
            let now = removals(store)?.into_iter().next();
            if now != first.0 {
                first = (now, Instant::now());
            } else if first.1.elapsed() > STUCK_AFTER {
                return Err(stuck(&path, now));
            }
            Ok(())
        };
        file_locks::wait_while(&lock, true, progress).map_err(|e| closed(&path, e))??;
        let mark = |digest: &Digest| {
            LeaseFile::create(store, &holder(digest, "rm", true)).map(|file| (*digest, file))
        };
        let marks = digests.iter().map(mark).collect::<Result<Vec<_>>>()?;
        Ok(RemovalMark { held: Some((marks, lock)) })
    }

    /// Removes the mark of one template: commands that wait for a lease on it proceed.
    pub fn end_for(&mut self, digest: &Digest) {
        if let Some((marks, _)) = &mut self.held {
            marks.retain(|(marked, _)| marked != digest);
        }
    }
}

/// Returns those of the templates that are leased, each with a [`Code::InUse`] error that names the holders.
///
/// # Errors
/// Same as [`leases`].
pub fn leased(store: &Store, digests: &[Digest]) -> Result<Refused> {
    let mut holders: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    for lease in leases(store)?.iter().filter(|lease| digests.contains(&lease.digest)) {
        holders.entry(lease.digest).or_default().push(lease.name());
    }
    let error = |(digest, names): (Digest, Vec<String>)| {
        let (count, names) = (names.len(), names.join(", "));
        let (holders, hint) = match count {
            1 => ("1 process".to_owned(), "retry when the process has exited"),
            _ => (format!("{count} processes"), "retry when the processes have exited"),
        };
        let error = Error::in_use(format!("template {digest} is leased by {holders}: {names}"));
        (digest, error.hint(hint))
    };
    Ok(holders.into_iter().map(error).collect())
}

/// Returns all leases on templates of this store. Removes stale lease files on the way.
///
/// # Errors
/// Returns an error if the runtime directory exists and cannot be read.
pub fn leases(store: &Store) -> Result<Vec<LeaseHolder>> {
    all(store, LEASE)
}

/// Returns all removals of templates of this store that are in progress.
///
/// # Errors
/// Same as [`leases`].
pub fn removals(store: &Store) -> Result<Vec<LeaseHolder>> {
    all(store, REMOVAL)
}

fn holder(digest: &Digest, command: &str, removes: bool) -> LeaseHolder {
    LeaseHolder {
        pid: std::process::id(),
        pid_namespace: probe::pid_namespace(),
        command: command.to_owned(),
        since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        digest: *digest,
        removes,
    }
}

fn name_of(store: &Store) -> String {
    format!("leases/{}", store.id())
}

fn make_folder(store: &Store) -> Result<Directory> {
    runtime::create(&name_of(store))
}

fn closed(path: &Path, error: io::Error) -> Error {
    runtime::failed("cannot take a lease", path, error)
}

fn stuck(path: &Path, removal: Option<LeaseHolder>) -> Error {
    let seconds = STUCK_AFTER.as_secs();
    let what = match &removal {
        Some(LeaseHolder { pid, digest, .. }) => {
            format!(
                "timed out after {seconds} s waiting for process {pid}, which is removing template {digest} or \
                 other templates"
            )
        }
        None => format!("timed out after {seconds} s waiting for the lock of another removal"),
    };
    Error::try_again(what).at(path).hint(STOPPED)
}

fn all(store: &Store, kind: &str) -> Result<Vec<LeaseHolder>> {
    let Some(folder) = runtime::open(&name_of(store))? else { return Ok(Vec::new()) };
    let names = folder.names().map_err(|e| Error::io("cannot read the leases", folder.path(), e))?;
    let mut found = Vec::new();
    for name in names {
        let name = Path::new(&name);
        if name.extension().is_some_and(|e| e == NEW) {
            // The file was left by a process that was killed before it had a lease; `read` removes the file.
            let _ = read(&folder, name);
        } else if name.extension().is_some_and(|e| e == kind)
            && let Some(holder) = read(&folder, name)?
        {
            found.push(holder);
        }
    }
    found.sort_by_key(|l| (l.since, l.pid));
    Ok(found)
}

/// Returns the holder of a lease file; `None` if the file does not exist or is stale. Removes a stale file.
fn read(folder: &Directory, name: &Path) -> Result<Option<LeaseHolder>> {
    let fail = |e| Error::io("cannot read a lease", folder.path_of(name), e);
    let file = match trusted_file(folder, name) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            return Err(
                fail(e).hint("check the owner of that file; if no Stencil command runs, remove the file")
            );
        }
    };
    // A shared lock: two scans at the same time must not take each other for a holder.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            let _ = folder.remove_file(name);
            return Ok(None);
        }
        Err(Errno::WOULDBLOCK) => {}
        Err(e) => return Err(fail(e.into())),
    }
    let mut text = Vec::new();
    file.take(MAX_LENGTH).read_to_end(&mut text).map_err(fail)?;
    let holder: LeaseHolder =
        serde_json::from_slice(&text).map_err(|e| invalid_lease(folder, name, &e.to_string()))?;
    match runtime::is_pid(holder.pid) {
        true => Ok(Some(holder)),
        false => Err(invalid_lease(folder, name, &format!("invalid PID {}", holder.pid))),
    }
}

fn invalid_lease(folder: &Directory, name: &Path, why: &str) -> Error {
    Error::failed(format!("cannot parse a lease: {why}")).at(folder.path_of(name)).hint(
        "retry when the command that holds the lease has exited; another version of Stencil wrote the lease",
    )
}

/// A locked lease file, removed on drop.
#[derive(Debug)]
struct LeaseFile {
    folder: Directory,
    name: String,
    _file: File,
}

impl LeaseFile {
    /// Creates the file under a temporary name, locks and fills it, then renames it: a visible lease is always locked.
    fn create(store: &Store, holder: &LeaseHolder) -> Result<LeaseFile> {
        let text =
            serde_json::to_vec(holder).map_err(|e| Error::failed(format!("cannot write a lease: {e}")))?;
        let kind = if holder.removes { REMOVAL } else { LEASE };
        loop {
            let folder = make_folder(store)?;
            let random = crate::store::random_name()?;
            let (temporary, name) = (format!("{random}.{NEW}"), format!("{random}.{kind}"));
            let write = || -> io::Result<File> {
                let mut file = folder.create(&temporary, 0o600)?;
                if !file_locks::wait(&file, true, SCAN_TIMEOUT, || false)? {
                    return Err(io::Error::other("another process holds the lock on the new lease"));
                }
                file.write_all(&text)?;
                folder.rename(&temporary, &folder, &name)?;
                Ok(file)
            };
            match write() {
                Ok(file) => return Ok(LeaseFile { folder, name, _file: file }),
                // A scan for stale leases removed the file before it was locked.
                Err(e) if e.kind() == io::ErrorKind::NotFound && folder.path().is_dir() => {}
                Err(e) => {
                    let _ = folder.remove_file(&temporary);
                    return Err(closed(folder.path(), e));
                }
            }
        }
    }
}

impl Drop for LeaseFile {
    fn drop(&mut self) {
        let _ = self.folder.remove_file(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_without_a_holder_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let holder = LeaseHolder {
            pid: 1,
            pid_namespace: None,
            command: "clone".into(),
            since: 7,
            digest: Digest::of(b"x"),
            removes: false,
        };
        let path = dir.path().join("a.lease");
        let folder = Directory::open(dir.path()).unwrap();
        let read = || read(&folder, Path::new("a.lease"));
        folder.create("a.lease", 0o600).unwrap().write_all(&serde_json::to_vec(&holder).unwrap()).unwrap();
        let file = File::open(&path).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert_eq!(read().unwrap(), Some(holder));
        assert!(path.exists());
        drop(file);
        assert_eq!(read().unwrap(), None);
        assert!(!path.exists(), "a stale lease is removed");
        assert_eq!(read().unwrap(), None);
    }
}
