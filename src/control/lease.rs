//! Leases: who relies on a template between the moment at which its name was resolved and the moment at which the kernel
//! shows that it is used. A removal asks for them, and refuses.
//!
//! A lease is a locked file in `runtime_dir()/leases/<store>/`, never in the store, which may be read-only. The kernel
//! releases the lock however its holder ends: a file without a lock is nobody's.
//!
//! Taker and remover each write first and read then, so that one of them sees the other: a taker waits while a removal of
//! its template is under way, a removal refuses while somebody else has a lease.

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
use crate::store::{ContentHold, Digest, Refused, Store, TemplateRef};
use crate::sys::folder::Folder;
use crate::sys::{locks, probe};

/// A removal that lasts longer than this holds nobody up: who wants the template is told to try again.
const LONGEST_REMOVAL: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(10);

/// Who looks whether a lease that is being made is a dead one's has its lock for a moment.
const LOOK: Duration = Duration::from_secs(2);

const STOPPED: &str = "see whether that process was stopped: let it go on, or end it";

/// Another removal that has its turn for longer stands still.
const STANDSTILL: Duration = Duration::from_secs(20);

/// File name extensions of leases and of removal marks: a scan for one kind opens no file of the other.
const LEASE: &str = "lease";
const REMOVAL: &str = "removal";
const NEW: &str = "new";
/// One removal of a store at a time has this file locked.
const LOCK: &str = "removal.lock";
/// More than any honest one has.
const MAX_LENGTH: u64 = 4096;

/// Who relies on which template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// The process that took it.
    pub pid: u32,
    /// The PID namespace of that number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_namespace: Option<u64>,
    /// Its command.
    pub command: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// The template.
    pub digest: Digest,
    /// True for a removal that looks whether somebody uses it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removes: bool,
}

impl LeaseHolder {
    /// For a line: `12 (clone)`.
    pub fn name(&self) -> String {
        let foreign = self.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace());
        let place = if foreign { " in another PID namespace" } else { "" };
        format!("{} ({}){place}", self.pid, self.command)
    }
}

/// The template is not removed while this lives.
#[derive(Debug)]
pub struct Lease {
    _held: Held,
}

#[derive(Debug)]
enum Held {
    File {
        _file: LeaseFile,
    },
    /// Where the runtime directory is closed to us: nothing that is removed is given back meanwhile.
    Content {
        _hold: ContentHold,
    },
    /// And the store lies on a read-only filesystem: nothing is removed by this way. Who removes it by another one ends
    /// a command that reads it with an error; a process that has or maps a file of it is found as ever.
    Nothing,
}

impl Lease {
    /// Resolves a name and takes a lease of what it means.
    ///
    /// # Errors
    /// As [`Store::resolve`] and [`Lease::take`].
    pub fn of(store: &Store, reference: &TemplateRef, command: &str) -> Result<(Digest, Lease)> {
        loop {
            let digest = store.resolve(reference)?;
            match Lease::take(store, &digest, command) {
                Ok(lease) => return Ok((digest, lease)),
                // It was removed in between: what the name means now decides.
                Err(e) if e.code() == Code::NotFound && store.resolve(reference)? != digest => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes a lease of a template, for the command of that name. Waits while a removal looks for users of it.
    ///
    /// # Errors
    /// [`Code::NotFound`] when the store has no such template (any more), [`Code::TryAgain`] when a removal of it does
    /// not come to an end.
    pub fn take(store: &Store, digest: &Digest, command: &str) -> Result<Lease> {
        let held = match LeaseFile::create(store, &holder(digest, command, false)) {
            Ok(file) => Held::File { _file: file },
            Err(e) if matches!(e.errno(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
                match store.is_on_read_only_filesystem() {
                    true => Held::Nothing,
                    false => Held::Content { _hold: store.hold_content().map_err(|_| e)? },
                }
            }
            Err(e) => return Err(e),
        };
        let until = Instant::now() + LONGEST_REMOVAL;
        // Without a lease of ours no removal looks at us, and we may not look at it.
        let removals = || if let Held::File { .. } = held { removals(store) } else { Ok(Vec::new()) };
        while let Some(removal) = removals()?.into_iter().find(|l| l.digest == *digest) {
            if Instant::now() > until {
                return Err(Error::try_again(format!(
                    "process {} has been removing template {digest} for a minute",
                    removal.pid
                ))
                .remedy(STOPPED));
            }
            std::thread::sleep(AGAIN);
        }
        if !store.find(digest)? {
            return Err(store.no_template(digest));
        }
        Ok(Lease { _held: held })
    }
}

/// A removal in progress: while this lives, nobody takes a new lease of its templates.
#[derive(Debug)]
pub struct RemovalMark {
    /// In this order: the marks are gone when the next removal has its turn.
    held: Option<(Vec<(Digest, LeaseFile)>, File)>,
}

impl RemovalMark {
    /// Announces the removal of templates. Waits for another removal from the same store: two that see each other's
    /// marks would have to give up both.
    ///
    /// # Errors
    /// [`Code::TryAgain`] that names a removal which stands still; or when the runtime directory cannot be written.
    pub fn announce(store: &Store, digests: &[Digest]) -> Result<RemovalMark> {
        let folder = match make_folder(store) {
            // Who may not make a runtime directory removes from a store that nobody serves or leases.
            Err(_) if !runtime_dir().exists() => {
                return Ok(RemovalMark { held: None });
            }
            made => made?,
        };
        let path = folder.path_of(LOCK);
        let (turn, _) = folder.open_or_create(LOCK, 0o600).map_err(|e| closed(&path, e))?;
        let mut first = (None, Instant::now());
        loop {
            match flock(&turn, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(e) => return Err(closed(&path, e.into())),
            }
            let now = removals(store)?.into_iter().next();
            if now != first.0 {
                first = (now, Instant::now());
            } else if first.1.elapsed() > STANDSTILL {
                return Err(stands_still(&path, now));
            }
            std::thread::sleep(AGAIN);
        }
        let mark = |digest: &Digest| {
            LeaseFile::create(store, &holder(digest, "rm", true)).map(|file| (*digest, file))
        };
        let marks = digests.iter().map(mark).collect::<Result<Vec<_>>>()?;
        Ok(RemovalMark { held: Some((marks, turn)) })
    }

    /// Ends it for one of the templates: who wants a lease of it waits no longer.
    pub fn end_for(&mut self, digest: &Digest) {
        if let Some((marks, _)) = &mut self.held {
            marks.retain(|(marked, _)| marked != digest);
        }
    }
}

/// Those of the templates that somebody has a lease of, each with a [`Code::InUse`] that names the holders.
///
/// # Errors
/// As [`leases`].
pub fn leased(store: &Store, digests: &[Digest]) -> Result<Refused> {
    let mut holders: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    for lease in leases(store)?.iter().filter(|lease| digests.contains(&lease.digest)) {
        holders.entry(lease.digest).or_default().push(lease.name());
    }
    let error = |(digest, names): (Digest, Vec<String>)| {
        let (count, names) = (names.len(), names.join(", "));
        let error =
            Error::in_use(format!("template {digest} is leased: {count} processes rely on it: {names}"));
        (digest, error.remedy("run it again when they are done"))
    };
    Ok(holders.into_iter().map(error).collect())
}

/// Every lease of templates of this store. What the dead have left is removed on the way.
///
/// # Errors
/// When the runtime directory exists and cannot be read.
pub fn leases(store: &Store) -> Result<Vec<LeaseHolder>> {
    all(store, LEASE)
}

/// Every removal of a template of this store that is under way.
///
/// # Errors
/// As [`leases`].
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

fn make_folder(store: &Store) -> Result<Folder> {
    runtime::create(&name_of(store))
}

fn closed(path: &Path, error: io::Error) -> Error {
    runtime::failed("cannot take a lease", path, error)
}

fn stands_still(path: &Path, removal: Option<LeaseHolder>) -> Error {
    let seconds = STANDSTILL.as_secs();
    let what = match &removal {
        Some(LeaseHolder { pid, digest, .. }) => {
            format!(
                "process {pid} has been removing template {digest}, or others with it, for more than {seconds} s"
            )
        }
        None => format!("another removal has had its turn for more than {seconds} s"),
    };
    Error::try_again(what).at(path).remedy(STOPPED)
}

fn all(store: &Store, kind: &str) -> Result<Vec<LeaseHolder>> {
    let Some(folder) = runtime::open(&name_of(store))? else { return Ok(Vec::new()) };
    let names = folder.names().map_err(|e| Error::io("cannot read the leases", folder.path(), e))?;
    let mut found = Vec::new();
    for name in names {
        let name = Path::new(&name);
        if name.extension().is_some_and(|e| e == NEW) {
            // Of one that was killed before it had a lease.
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

/// Who holds that lease; nothing where nobody does.
fn read(folder: &Folder, name: &Path) -> Result<Option<LeaseHolder>> {
    let fail = |e| Error::io("cannot read a lease", folder.path_of(name), e);
    let file = match trusted_file(folder, name) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            return Err(fail(e).remedy("see whose file that is; when no command of Stencil runs, remove it"));
        }
    };
    // Shared: two that look at the same time do not take each other for a holder.
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
        serde_json::from_slice(&text).map_err(|e| not_understood(folder, name, &e.to_string()))?;
    match runtime::is_pid(holder.pid) {
        true => Ok(Some(holder)),
        false => Err(not_understood(folder, name, "no process has such a number")),
    }
}

fn not_understood(folder: &Folder, name: &Path, why: &str) -> Error {
    Error::failed(format!("a lease is not understood: {why}"))
        .at(folder.path_of(name))
        .remedy("it is of another version of Stencil: run this again when that command is done")
}

/// A locked file, removed when dropped.
#[derive(Debug)]
struct LeaseFile {
    folder: Folder,
    name: String,
    _file: File,
}

impl LeaseFile {
    /// It has its lock and its text before it has a name that counts.
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
                if !locks::wait(&file, true, LOOK, || false)? {
                    return Err(io::Error::other("another process has it locked"));
                }
                file.write_all(&text)?;
                folder.rename(&temporary, &folder, &name)?;
                Ok(file)
            };
            match write() {
                Ok(file) => return Ok(LeaseFile { folder, name, _file: file }),
                // Somebody who looked for leases of the dead came before the lock.
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
    fn a_lease_without_a_holder_is_nobodys() {
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
        let folder = Folder::open(dir.path()).unwrap();
        let read = || read(&folder, Path::new("a.lease"));
        folder.create("a.lease", 0o600).unwrap().write_all(&serde_json::to_vec(&holder).unwrap()).unwrap();
        let file = File::open(&path).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert_eq!(read().unwrap(), Some(holder));
        assert!(path.exists());
        drop(file);
        assert_eq!(read().unwrap(), None);
        assert!(!path.exists(), "what the dead have left is removed");
        assert_eq!(read().unwrap(), None);
    }
}
