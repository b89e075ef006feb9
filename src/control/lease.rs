//! Leases: who relies on a template between the moment at which its name was resolved and the moment at which the kernel
//! shows that it is used. A removal asks for them, and refuses.
//!
//! A lease is a locked file in `runtime_dir()/leases/<store>/`, never in the store, which may be read-only. The kernel
//! releases the lock however its holder ends: a file without a lock is nobody's.
//!
//! Taker and remover each write first and read then, so that one of them sees the other: a taker waits while a removal of
//! its template is under way, a removal refuses while somebody else has a lease.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::runtime_dir;
use crate::error::{Code, Error, Result};
use crate::store::{ContentHold, Digest, Store, TemplateRef};
use crate::sys::probe;

/// A removal that lasts longer than this holds nobody up: who wants the template is told to try again.
const LONGEST_REMOVAL: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(10);

const STOPPED: &str = "see whether that process was stopped: let it go on, or end it";

/// Another removal that has its turn for longer stands still.
const STANDSTILL: Duration = Duration::from_secs(20);

const SUFFIX: &str = "lease";
const NEW: &str = "new";
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
        while let Some(removal) = removals(store)?.into_iter().find(|l| l.digest == *digest) {
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

/// A removal under way: while this lives nobody takes a new lease of the template.
#[derive(Debug)]
pub struct RemovalMark {
    digest: Digest,
    store: Store,
    /// In this order: the mark is gone when the next one comes.
    _held: Option<(LeaseFile, File)>,
}

impl RemovalMark {
    /// Announces the removal of a template. Waits for another removal from the same store: two that see each other's
    /// marks would have to give up both.
    ///
    /// # Errors
    /// [`Code::TryAgain`] that names a removal which stands still; or when the runtime directory cannot be written.
    pub fn announce(store: &Store, digest: &Digest) -> Result<RemovalMark> {
        let folder = match make_folder(store) {
            // Who may not make a runtime directory removes from a store that nobody serves or leases.
            Err(_) if !runtime_dir().exists() => {
                return Ok(RemovalMark { digest: *digest, store: store.clone(), _held: None });
            }
            made => made?,
        };
        let path = folder.join("removal.lock");
        let options = OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).clone();
        let turn = options.open(&path).map_err(|e| closed(&path, e))?;
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
        let mark = LeaseFile::create(store, &holder(digest, "rm", true))?;
        Ok(RemovalMark { digest: *digest, store: store.clone(), _held: Some((mark, turn)) })
    }

    /// Fails while somebody has a lease of the template.
    ///
    /// # Errors
    /// [`Code::InUse`] that names the holders.
    pub fn expect_no_lease(&self) -> Result<()> {
        let all = leases(&self.store)?;
        let ours: Vec<_> = all.iter().filter(|l| l.digest == self.digest).collect();
        if ours.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = ours.iter().map(|l| l.name()).collect();
        Err(Error::in_use(format!(
            "template {} is leased: {} processes rely on it: {}",
            self.digest,
            names.len(),
            names.join(", ")
        ))
        .remedy("run it again when they are done"))
    }
}

/// Every lease of templates of this store. What the dead have left is removed on the way.
///
/// # Errors
/// When the runtime directory exists and cannot be read.
pub fn leases(store: &Store) -> Result<Vec<LeaseHolder>> {
    Ok(all(store)?.into_iter().filter(|l| !l.removes).collect())
}

/// Every removal of a template of this store that is under way.
///
/// # Errors
/// As [`leases`].
pub fn removals(store: &Store) -> Result<Vec<LeaseHolder>> {
    Ok(all(store)?.into_iter().filter(|l| l.removes).collect())
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

fn folder(store: &Store) -> PathBuf {
    runtime_dir().join("leases").join(store.id())
}

fn make_folder(store: &Store) -> Result<PathBuf> {
    let folder = folder(store);
    fs::create_dir_all(&folder).map_err(|e| closed(&folder, e))?;
    Ok(folder)
}

fn closed(path: &Path, error: io::Error) -> Error {
    Error::io("cannot take a lease", path, error)
        .remedy("run it as root: mounts and removals look for leases in this directory and in no other")
}

fn stands_still(path: &Path, removal: Option<LeaseHolder>) -> Error {
    let seconds = STANDSTILL.as_secs();
    let what = match &removal {
        Some(LeaseHolder { pid, digest, .. }) => {
            format!("process {pid} has been removing template {digest} for more than {seconds} s")
        }
        None => format!("another removal has had its turn for more than {seconds} s"),
    };
    Error::try_again(what).at(path).remedy(STOPPED)
}

fn all(store: &Store) -> Result<Vec<LeaseHolder>> {
    let folder = folder(store);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => {
            return Err(Error::io("cannot read the leases", &folder, e)
                .remedy("run it as root: leases are in this directory and in no other"));
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("cannot read the leases", &folder, e))?.path();
        if path.extension().is_some_and(|e| e == NEW) {
            // Of one that was killed before it had a lease.
            let _ = read(&path);
        } else if path.extension().is_some_and(|e| e == SUFFIX)
            && let Some(holder) = read(&path)?
        {
            found.push(holder);
        }
    }
    found.sort_by_key(|l| (l.since, l.pid));
    Ok(found)
}

/// Who holds that lease; nothing where nobody does.
fn read(path: &Path) -> Result<Option<LeaseHolder>> {
    let fail = |e| Error::io("cannot read a lease", path, e);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    // Shared: two that look at the same time do not take each other for a holder.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            let _ = fs::remove_file(path);
            return Ok(None);
        }
        Err(Errno::WOULDBLOCK) => {}
        Err(e) => return Err(fail(e.into())),
    }
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, MAX_LENGTH), &mut text).map_err(fail)?;
    let holder = serde_json::from_str(&text).map_err(|e| {
        Error::failed(format!("a lease is not understood: {e}"))
            .at(path)
            .remedy("it is of another version of Stencil: run this again when that command is done")
    })?;
    Ok(Some(holder))
}

/// A locked file, removed when dropped.
#[derive(Debug)]
struct LeaseFile {
    path: PathBuf,
    _file: File,
}

impl LeaseFile {
    /// It has its lock and its text before it has a name that counts.
    fn create(store: &Store, holder: &LeaseHolder) -> Result<LeaseFile> {
        let folder = make_folder(store)?;
        let text =
            serde_json::to_vec(holder).map_err(|e| Error::failed(format!("cannot write a lease: {e}")))?;
        loop {
            let name = crate::store::random_name()?;
            let temporary = folder.join(format!("{name}.{NEW}"));
            let path = folder.join(format!("{name}.{SUFFIX}"));
            let write = || -> io::Result<File> {
                let mut file =
                    OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
                rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
                file.write_all(&text)?;
                fs::rename(&temporary, &path)?;
                Ok(file)
            };
            match write() {
                Ok(file) => return Ok(LeaseFile { path, _file: file }),
                // Somebody who looked for leases of the dead came before the lock.
                Err(e) if e.kind() == io::ErrorKind::NotFound && folder.is_dir() => {}
                Err(e) => {
                    let _ = fs::remove_file(&temporary);
                    return Err(closed(&folder, e));
                }
            }
        }
    }
}

impl Drop for LeaseFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
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
        fs::write(&path, serde_json::to_vec(&holder).unwrap()).unwrap();
        let file = File::open(&path).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert_eq!(read(&path).unwrap(), Some(holder));
        assert!(path.exists());
        drop(file);
        assert_eq!(read(&path).unwrap(), None);
        assert!(!path.exists(), "what the dead have left is removed");
        assert_eq!(read(&path).unwrap(), None);
    }
}
