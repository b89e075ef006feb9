//! The store's directory: opening, locks and access to its parts.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::header::{self, COPY, HEADER, Header};
use super::lock::{Holders, Lock};
use super::pack::{PackFile, Packs};
use super::path::{StorePath, create_root, is_misplaced};
use super::publish::{publish, random, sync_directory, write_new};
use super::session::temporary_file;
use crate::error::{Code, Error, Result};
use crate::store::Digest;
use crate::store::format::PackId;
use crate::store::format::superblock::Superblock;

/// A template store. Cloning is cheap; clones share open packs.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

/// Prevents garbage collection of a store's packs while it is alive.
#[derive(Debug)]
pub struct ContentLock {
    _lock: Lock,
}

struct Inner {
    root: StorePath,
    superblock: Superblock,
    packs: Packs,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.dir().display())
    }
}

/// Longer waits for a lock are logged.
const LOG_AFTER: Duration = Duration::from_secs(1);

/// Timeout of a collector that waits for writers; while the collector waits, new writers wait too.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(15);

const DIRECTORIES: [&str; 5] = ["images", "packs", "tags", "tmp", "locks"];

impl Store {
    /// Opens a store for reading and writing, without changing the store.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if there is no store. Returns an error if the directory is not a
    /// store, or if the store needs a newer Stencil.
    pub fn open(dir: &Path) -> Result<Store> {
        // A daemon changes its working directory, which would change the meaning of a relative path.
        let canonical = std::fs::canonicalize(dir);
        let root = StorePath::root(canonical.as_deref().unwrap_or(dir));
        let header = match canonical.map_err(|e| Error::io("cannot open store", dir, e)) {
            Ok(_) => Header::read(&root),
            Err(e) => Err(e),
        };
        let header = match header {
            Ok(header) => header,
            Err(e) if e.code() == Code::NotFound && is_foreign(&root) => return Err(foreign(dir)),
            Err(e) if e.code() == Code::NotFound || e.errno() == Some(libc::ENOTDIR) && !root.is_dir() => {
                return Err(Error::not_found("no template store found")
                    .at(dir)
                    .hint("create a store with 'stencil import', or select another directory with --store DIR or STENCIL_STORE"));
            }
            Err(e) => return Err(e),
        };
        if let Some((_, why)) = &header.damaged {
            log::warn!("{why}; the next import rewrites the file");
        }
        let packs = Packs::new(root.join("packs"));
        Ok(Store(Arc::new(Inner { root, superblock: header.superblock, packs })))
    }

    /// Opens a store, or creates an empty one if the directory is missing or empty.
    ///
    /// # Errors
    /// Same as [`Store::open`]. Also returns an error if the store cannot be created.
    pub fn open_or_create(dir: &Path) -> Result<Store> {
        match Store::open(dir) {
            Err(e) if e.code() == Code::NotFound => {}
            opened => return opened,
        }
        let root = create_root(dir)?;
        if is_foreign(&root) {
            return Err(foreign(dir));
        }
        create_directories(&root)?;
        // Two commands may create the store at once. Under the lock, exactly one of them publishes the header.
        let _lock = Lock::wait(&root.join("locks/create"), || Ok(()))?;
        let (header, copy) = (root.join(HEADER), root.join(COPY));
        // A store that has lost its header still has the copy.
        if !header.exists() && !copy.exists() {
            let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let temporary = root.join("tmp/format");
            let _ = temporary.remove_file();
            let bytes = Superblock::new(random()?, random()?, created).encode();
            for path in [&header, &copy] {
                write_new(&temporary, &bytes)?;
                publish(&temporary, path)?;
            }
            sync_directory(&root)?;
        }
        Store::open(dir)
    }

    /// Returns the absolute path of the store's directory.
    pub fn dir(&self) -> &Path {
        self.0.root.as_ref()
    }

    /// Returns the key of the inode number hash. The key never leaves the host.
    pub fn secret(&self) -> [u8; 32] {
        self.0.superblock.secret
    }

    /// Returns the identifier of the store, 32 hex digits. The identifier does not change when the store is moved.
    pub fn id(&self) -> String {
        PackId(self.0.superblock.id).to_string()
    }

    /// Returns the error for a template that the store does not have.
    pub fn no_template(&self, digest: &Digest) -> Error {
        no_template(self.dir(), digest)
    }

    /// Prevents garbage collection of the store's packs while the returned value is alive.
    ///
    /// # Errors
    /// Returns an error if the store is not writable.
    pub fn lock_content_shared(&self) -> Result<ContentLock> {
        self.lock_content(|| Ok(())).map(|lock| ContentLock { _lock: lock })
    }

    /// Returns the digests of all templates, sorted.
    ///
    /// # Errors
    /// Returns an error if the directory `images` cannot be read.
    pub fn digests(&self) -> Result<Vec<Digest>> {
        Ok(self.names(&self.images_dir())?.iter().filter_map(|n| n.parse().ok()).collect())
    }

    /// Checks that the store is still at the path at which it was opened.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code) if a directory of the store cannot be opened, or if another store
    /// is at the path.
    pub fn check_reachable(&self) -> Result<()> {
        self.expect_same_store()?;
        for directory in [self.images_dir(), self.packs_dir(), self.tags_dir()] {
            // Opening `.` needs search permission on the directory.
            directory
                .folder()
                .and_then(|open| open.folder("."))
                .map_err(|e| self.open_error(&directory, e))?;
        }
        Ok(())
    }

    /// Returns the error for a part of the store that cannot be opened: damage if a file of another type is in its
    /// place, otherwise a store outage.
    fn open_error(&self, path: &StorePath, error: io::Error) -> Error {
        match is_misplaced(&error) && self.0.root.is_dir() {
            true => path.error("cannot open", error),
            false => Error::try_again("cannot reach the store").at(path).because(error).hint(
                "make the store available at that path again, readable for the server; pending requests then continue",
            ),
        }
    }

    /// Checks that a header of this store is at the path at which the store was opened.
    ///
    /// # Errors
    /// Same as [`Store::check_reachable`].
    pub(in crate::store) fn expect_same_store(&self) -> Result<()> {
        let found =
            header::identify(&self.0.root).map_err(|e| self.open_error(&self.0.root.join(HEADER), e))?;
        if found.is_some_and(|found| found.secret != self.0.superblock.secret) {
            return Err(Error::try_again("a different store is now at the path of this store")
                .at(self.dir())
                .hint("make the original store available at that path again"));
        }
        Ok(())
    }

    /// Reads the header from the disk.
    pub(in crate::store) fn header(&self) -> Result<Header> {
        Header::read(&self.0.root)
    }

    /// Creates missing directories and rewrites a damaged header, before a write to the store.
    pub(in crate::store) fn repair(&self) -> Result<()> {
        self.check_writable()?;
        create_directories(&self.0.root)?;
        if self.header()?.damaged.is_some() {
            let _names = self.lock_names()?;
            self.header()?.repair(&self.tmp_dir())?;
        }
        Ok(())
    }

    /// Returns the store outage if the store cannot be reached, otherwise `error`. During an outage nothing is reported
    /// as missing or damaged.
    pub(in crate::store) fn outage_or(&self, error: Error) -> Error {
        self.check_reachable().err().unwrap_or(error)
    }

    /// Runs `work`, and once more if it fails although the store can be reached: an outage may have ended after the
    /// failure.
    pub(in crate::store) fn despite_outage<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        work().or_else(|_| {
            self.check_reachable()?;
            work().map_err(|e| self.outage_or(e))
        })
    }

    /// Returns true if the store has this template, and false if the reachable store does not have it.
    ///
    /// # Errors
    /// Same as [`Store::check_reachable`].
    pub fn find(&self, digest: &Digest) -> Result<bool> {
        let found = self.despite_outage(|| match self.has(digest) {
            true => Ok(()),
            false => Err(no_template(self.dir(), digest)),
        });
        match found {
            Err(error) if error.code() == Code::NotFound => Ok(false),
            found => found.map(|()| true),
        }
    }

    /// Returns true if a file of any type has the template's name: the template is not removed, but may be damaged.
    pub(in crate::store) fn is_listed(&self, digest: &Digest) -> bool {
        self.image_dir(digest).exists()
    }

    /// Returns true if the store has this template. Returns false during a store outage too.
    pub fn has(&self, digest: &Digest) -> bool {
        self.image_dir(digest).is_dir()
    }

    /// Returns the paths of all packs.
    ///
    /// # Errors
    /// Returns an error if the directory `packs` cannot be read.
    pub fn pack_files(&self) -> Result<Vec<StorePath>> {
        Ok(self.packs().ids()?.into_iter().map(|id| self.packs().path(id)).collect())
    }

    /// Returns an open pack.
    pub(in crate::store) fn pack(&self, id: PackId) -> Result<Arc<PackFile>> {
        self.0.packs.get(id).map_err(|e| self.outage_or(e))
    }

    /// Returns the error for a pack that cannot be read, and closes the pack. The next use reopens the pack: on a
    /// network file system, the old descriptor may stay stale (`ESTALE`).
    pub(in crate::store) fn unreadable(&self, id: PackId, error: Error) -> Error {
        self.0.packs.forget(id);
        self.outage_or(error)
    }

    /// Closes removed packs, because an open file keeps its disk space. Reads in progress are not affected.
    pub fn close_vanished(&self) {
        self.packs().close_vanished();
    }

    pub(in crate::store) fn packs(&self) -> &Packs {
        &self.0.packs
    }

    pub(in crate::store) fn images_dir(&self) -> StorePath {
        self.0.root.join("images")
    }

    pub(in crate::store) fn image_dir(&self, digest: &Digest) -> StorePath {
        self.images_dir().join(digest.to_string())
    }

    pub(in crate::store) fn policy_path(&self, digest: &Digest) -> StorePath {
        self.image_dir(digest).join("policy")
    }

    pub(in crate::store) fn tags_dir(&self) -> StorePath {
        self.0.root.join("tags")
    }

    pub(in crate::store) fn packs_dir(&self) -> StorePath {
        self.0.root.join("packs")
    }

    pub(in crate::store) fn tmp_dir(&self) -> StorePath {
        self.0.root.join("tmp")
    }

    /// Takes the names lock, exclusively. The lock is held while names, policies or the list of templates change, for a
    /// short time only.
    pub(in crate::store) fn lock_names(&self) -> Result<Lock> {
        self.lock_names_while(|| Ok(()))
    }

    /// Same as [`Store::lock_names`]; stops waiting when `check` returns an error.
    pub(in crate::store) fn lock_names_while(&self, check: impl Fn() -> Result<()>) -> Result<Lock> {
        self.check_writable()?;
        Lock::wait(&self.0.root.join("locks/names"), check)
    }

    /// Creates an unnamed file on the store's file system.
    ///
    /// # Errors
    /// Returns an error if the file cannot be created.
    pub fn temporary_file(&self) -> Result<File> {
        temporary_file(&self.tmp_dir())
    }

    /// Takes the content lock, shared. Importers hold the lock while they rely on packs; a collector takes the lock
    /// exclusively. Stops waiting when `check` returns an error.
    pub(in crate::store) fn lock_content(&self, check: impl Fn() -> Result<()>) -> Result<Lock> {
        self.check_writable()?;
        let started = Instant::now();
        let mut logged = false;
        let mut wait = |file: &File| {
            if !logged && started.elapsed() > LOG_AFTER {
                logged = true;
                log::warn!("waiting for {}", Holders(file));
            }
            check()
        };
        // A waiting collector holds the gate, so that later writers do not prolong its wait.
        let _gate = Lock::wait_while(&self.0.root.join("locks/gate"), true, &mut wait)?;
        Lock::wait_while(&self.0.root.join("locks/content"), true, &mut wait)
    }

    /// Removes all tags and images. Packs stay.
    pub(in crate::store) fn remove_templates(&self) -> Result<()> {
        self.remove_trees(&["tags", "images"])
    }

    /// Removes all files of the store, except its directory. The packs must not be sealed.
    pub(in crate::store) fn remove_rest(&self) -> Result<()> {
        // The header goes last: until then the directory is a store, for which the command can be run again.
        self.remove_trees(&DIRECTORIES)?;
        self.remove_trees(&[COPY, HEADER])
    }

    fn remove_trees(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let path = self.0.root.join(name);
            match path.remove_tree() {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(path.error("cannot remove", e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes the content lock, exclusively, for a collector. Then only readers rely on packs, and a reader reopens its
    /// placement when a pack is missing. New writers wait while the collector waits, so the wait has a timeout.
    pub(in crate::store) fn lock_content_alone(&self, interrupt: &AtomicBool) -> Result<Lock> {
        self.check_writable()?;
        let started = Instant::now();
        let mut logged = false;
        let mut wait = |file: &File| {
            if interrupt.load(Ordering::Relaxed) {
                let why =
                    format!("interrupted while waiting for {}; the store was not changed", Holders(file));
                return Err(Error::failed(why).at(self.dir()));
            }
            if started.elapsed() > COLLECTOR_TIMEOUT {
                let why = format!(
                    "timed out after {} s waiting for {}",
                    COLLECTOR_TIMEOUT.as_secs(),
                    Holders(file)
                );
                return Err(Error::try_again(why)
                    .at(self.dir())
                    .hint("run the command again after that process has ended"));
            }
            if !logged && started.elapsed() > LOG_AFTER {
                logged = true;
                log::warn!(
                    "waiting for {}; other writers wait until this command has finished",
                    Holders(file)
                );
            }
            Ok(())
        };
        let _gate = Lock::wait_while(&self.0.root.join("locks/gate"), false, &mut wait)?;
        Lock::wait_while(&self.0.root.join("locks/content"), false, &mut wait)
    }

    /// Returns true if the file system of the store is mounted read-only at this path.
    pub fn is_on_read_only_filesystem(&self) -> bool {
        rustix::fs::statvfs(self.dir())
            .is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_on_read_only_filesystem() {
            return Err(Error::failed("the file system of the store is mounted read-only")
                .at(self.dir())
                .hint("remount the file system read-write to change the store; reading and mounting do not need this"));
        }
        match self.0.superblock.preamble.read_only_compatible {
            0 => Ok(()),
            features => Err(Error::failed(format!(
                "changing the store needs a newer Stencil: unsupported features {features:#x}"
            ))
            .at(self.dir())
            .hint("update Stencil on this host; this version can still read the store")),
        }
    }
}

/// Returns true for a directory with entries that are not part of a store.
fn is_foreign(dir: &StorePath) -> bool {
    dir.names().is_ok_and(|names| {
        let ours = |name: &OsString| {
            DIRECTORIES.iter().chain(&[HEADER, COPY, "lost+found"]).any(|ours| name == *ours)
        };
        names.iter().any(|name| !ours(name))
    })
}

/// Creates the missing directories of a store.
fn create_directories(root: &StorePath) -> Result<()> {
    for name in DIRECTORIES {
        let directory = root.join(name);
        match directory.create_folder() {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(directory.error("cannot create", e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns the error for a template that the store does not have.
pub(in crate::store) fn no_template(dir: &Path, digest: &Digest) -> Error {
    Error::not_found(format!("no template {digest}")).at(dir).hint("run 'stencil ls' to list the templates")
}

fn foreign(dir: &Path) -> Error {
    Error::usage("the directory is not empty and not a template store")
        .at(dir)
        .hint("select another directory with --store DIR or STENCIL_STORE")
}
