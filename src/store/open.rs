//! A store on disk.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::format::PackId;
use super::format::superblock::Superblock;
use super::header::{self, COPY, HEADER, Header};
use super::lock::{Holders, Lock};
use super::pack::{PackFile, Packs};
use super::path::{StorePath, create_root, is_misplaced};
use super::publish::{publish, random, sync_folder, write_new};
use super::session::temporary_file;
use super::{Digest, Policy, Template};
use crate::error::{Code, Error, Result};

/// A template store. Cheap to clone; clones share open packs.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

/// Keeps what is in the packs of a store there.
#[derive(Debug)]
pub struct ContentHold {
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

/// Who waits longer says for whom.
const TELL: Duration = Duration::from_secs(1);

/// A collector that has waited for so long lets writers in again.
const LONGEST_WAIT: Duration = Duration::from_secs(15);

const FOLDERS: [&str; 5] = ["images", "packs", "tags", "tmp", "locks"];

impl Store {
    /// Opens a store for reading and writing; nothing is written by this.
    ///
    /// # Errors
    /// [`Code::NotFound`](crate::error::Code) when there is no store; an error that says so when the
    /// folder is something else or comes from a newer Stencil.
    pub fn open(dir: &Path) -> Result<Store> {
        // Relative paths would change their meaning with the working directory of a daemon.
        let canonical = std::fs::canonicalize(dir);
        let root = StorePath::root(canonical.as_deref().unwrap_or(dir));
        let header = match canonical.map_err(|e| Error::io("cannot open the store", dir, e)) {
            Ok(_) => Header::read(&root),
            Err(e) => Err(e),
        };
        let header = match header {
            Ok(header) => header,
            Err(e) if e.code() == Code::NotFound && is_foreign(&root) => return Err(foreign(dir)),
            Err(e) if e.code() == Code::NotFound || e.errno() == Some(libc::ENOTDIR) && !root.is_dir() => {
                return Err(Error::not_found("no template store here")
                    .at(dir)
                    .remedy("stencil import makes one; for another place use --store DIR or STENCIL_STORE"));
            }
            Err(e) => return Err(e),
        };
        if let Some((_, why)) = &header.damaged {
            log::warn!("{why}; the next import writes it again");
        }
        let packs = Packs::new(root.join("packs"));
        Ok(Store(Arc::new(Inner { root, superblock: header.superblock, packs })))
    }

    /// Opens a store, and makes an empty one where there is nothing or an empty folder.
    ///
    /// # Errors
    /// As [`Store::open`], or when it cannot be made.
    pub fn open_or_create(dir: &Path) -> Result<Store> {
        match Store::open(dir) {
            Err(e) if e.code() == Code::NotFound => {}
            opened => return opened,
        }
        let root = create_root(dir)?;
        if is_foreign(&root) {
            return Err(foreign(dir));
        }
        make_folders(&root)?;
        // Two commands may create it at once: the header decides, and exactly one of them links it.
        let _lock = Lock::wait(&root.join("locks/create"), || Ok(()))?;
        let (header, copy) = (root.join(HEADER), root.join(COPY));
        // A store that has lost its header has a copy of it.
        if !header.exists() && !copy.exists() {
            let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let temporary = root.join("tmp/format");
            let _ = temporary.remove_file();
            let bytes = Superblock::new(random()?, random()?, created).encode();
            for path in [&header, &copy] {
                write_new(&temporary, &bytes)?;
                publish(&temporary, path)?;
            }
            sync_folder(&root)?;
        }
        Store::open(dir)
    }

    /// Its folder, absolute.
    pub fn dir(&self) -> &Path {
        self.0.root.as_ref()
    }

    /// Key of the inode numbers; never leaves the host.
    pub fn secret(&self) -> [u8; 32] {
        self.0.superblock.secret
    }

    /// Its identity: 32 hex digits, the same wherever it is mounted or moved to.
    pub fn id(&self) -> String {
        PackId(self.0.superblock.id).to_string()
    }

    /// The error that says that the store has no such template.
    pub fn no_template(&self, digest: &Digest) -> Error {
        no_template(self.dir(), digest)
    }

    /// Nothing that the store holds is given back while this lives: a collector waits for it.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn hold_content(&self) -> Result<ContentHold> {
        self.lock_content(|| Ok(())).map(|lock| ContentHold { _lock: lock })
    }

    /// Digests of all templates, sorted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn digests(&self) -> Result<Vec<Digest>> {
        Ok(self.names(&self.images_dir())?.iter().filter_map(|n| n.parse().ok()).collect())
    }

    /// Whether the store is still where it was opened.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code) when its folders cannot be reached, or another store lies there.
    pub fn check_reachable(&self) -> Result<()> {
        self.expect_same_store()?;
        for folder in [self.images_dir(), self.packs_dir(), self.tags_dir()] {
            // To see its dot takes the right to search the folder.
            folder.folder().and_then(|open| open.folder(".")).map_err(|e| self.away(&folder, e))?;
        }
        Ok(())
    }

    /// The error for a part of the store that cannot be opened: it is out of reach, or something else lies there.
    fn away(&self, path: &StorePath, error: io::Error) -> Error {
        match is_misplaced(&error) && self.0.root.is_dir() {
            true => path.error("cannot open", error),
            false => Error::try_again("the store cannot be reached").at(path).because(error).remedy(
                "bring it back to that path, readable for the server: what waits for it then goes on",
            ),
        }
    }

    /// Whether a header of the store is where it was opened.
    ///
    /// # Errors
    /// As [`Store::check_reachable`].
    pub(super) fn expect_same_store(&self) -> Result<()> {
        let there = header::identify(&self.0.root).map_err(|e| self.away(&self.0.root.join(HEADER), e))?;
        if there.is_some_and(|there| there.secret != self.0.superblock.secret) {
            return Err(Error::try_again("another store lies where the store was")
                .at(self.dir())
                .remedy("bring the store back to that path"));
        }
        Ok(())
    }

    /// Its header as it is on the disk now.
    pub(super) fn header(&self) -> Result<Header> {
        Header::read(&self.0.root)
    }

    /// Makes folders that are missing and writes a damaged header again, for who is about to write.
    pub(super) fn mend(&self) -> Result<()> {
        self.check_writable()?;
        make_folders(&self.0.root)?;
        if self.header()?.damaged.is_some() {
            let _names = self.lock_names()?;
            self.header()?.mend(&self.tmp_dir())?;
        }
        Ok(())
    }

    /// `error`, or that the whole store cannot be reached where that is its cause: nothing is missing or damaged then.
    pub(super) fn blame(&self, error: Error) -> Error {
        self.check_reachable().err().unwrap_or(error)
    }

    /// True when the store has that template, which is not the same as that it cannot be seen.
    ///
    /// # Errors
    /// As [`Store::check_reachable`].
    pub fn find(&self, digest: &Digest) -> Result<bool> {
        if self.has(digest) {
            return Ok(true);
        }
        self.check_reachable().map(|()| false)
    }

    /// True where something has the name of that template, folder or not: it is not removed, it may be damaged.
    pub(super) fn is_listed(&self, digest: &Digest) -> bool {
        self.image_dir(digest).exists()
    }

    /// True when the store has that template.
    pub fn has(&self, digest: &Digest) -> bool {
        self.image_dir(digest).is_dir()
    }

    /// Opens a template: its header and the roots of its tables; blocks are read when asked for.
    ///
    /// # Errors
    /// [`Code::NotFound`](crate::error::Code), [`Code::Damage`](crate::error::Code), or as
    /// [`Store::check_reachable`].
    pub fn template(&self, digest: &Digest) -> Result<Template> {
        Template::open(self.clone(), digest).map_err(|e| self.blame(e))
    }

    /// Changes the policy of a template; two changes at once do not lose one another.
    ///
    /// # Errors
    /// [`Code::NotFound`](crate::error::Code), or when it cannot be written.
    pub fn set_policy(&self, digest: &Digest, change: impl FnOnce(&mut Policy)) -> Result<()> {
        let _names = self.lock_names()?;
        self.set_policy_locked(digest, change)
    }

    /// As [`Store::set_policy`]; the caller holds the lock of names.
    pub(super) fn set_policy_locked(&self, digest: &Digest, change: impl FnOnce(&mut Policy)) -> Result<()> {
        if !self.has(digest) {
            return Err(no_template(self.dir(), digest));
        }
        let path = self.policy_path(digest);
        let mut policy = Policy::read(&path)?;
        change(&mut policy);
        policy.write(&self.tmp_dir(), &path)
    }

    /// Paths of all packs.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn pack_files(&self) -> Result<Vec<StorePath>> {
        Ok(self.packs().ids()?.into_iter().map(|id| self.packs().path(id)).collect())
    }

    /// An open pack.
    pub(super) fn pack(&self, id: PackId) -> Result<Arc<PackFile>> {
        self.0.packs.get(id).map_err(|e| self.blame(e))
    }

    /// The error for a pack that cannot be read. It is opened anew at its next use: behind a network filesystem the old
    /// descriptor may be stale for good.
    pub(super) fn unreadable(&self, id: PackId, error: Error) -> Error {
        self.0.packs.forget(id);
        self.blame(error)
    }

    /// Closes packs that are gone: while they are open they keep their room on the disk. Who reads them goes on.
    pub fn close_vanished(&self) {
        self.packs().close_vanished();
    }

    pub(super) fn packs(&self) -> &Packs {
        &self.0.packs
    }

    pub(super) fn images_dir(&self) -> StorePath {
        self.0.root.join("images")
    }

    pub(super) fn image_dir(&self, digest: &Digest) -> StorePath {
        self.images_dir().join(digest.to_string())
    }

    pub(super) fn policy_path(&self, digest: &Digest) -> StorePath {
        self.image_dir(digest).join("policy")
    }

    pub(super) fn tags_dir(&self) -> StorePath {
        self.0.root.join("tags")
    }

    pub(super) fn packs_dir(&self) -> StorePath {
        self.0.root.join("packs")
    }

    pub(super) fn tmp_dir(&self) -> StorePath {
        self.0.root.join("tmp")
    }

    /// Held alone while names, policies or the list of templates change; for a short time only.
    pub(super) fn lock_names(&self) -> Result<Lock> {
        self.lock_names_while(|| Ok(()))
    }

    /// As [`Store::lock_names`], for as long as `go_on` says so.
    pub(super) fn lock_names_while(&self, go_on: impl Fn() -> Result<()>) -> Result<Lock> {
        self.check_writable()?;
        Lock::wait(&self.0.root.join("locks/names"), go_on)
    }

    /// A file without a name on the store's filesystem.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn temporary_file(&self) -> Result<File> {
        temporary_file(&self.tmp_dir())
    }

    /// Held shared by importers for as long as they rely on packs; a collector takes it alone. Waits for as long as
    /// `go_on` says so.
    pub(super) fn lock_content(&self, go_on: impl Fn() -> Result<()>) -> Result<Lock> {
        self.check_writable()?;
        let begun = Instant::now();
        let mut told = false;
        let mut wait = |file: &File| {
            if !told && begun.elapsed() > TELL {
                told = true;
                log::warn!("waiting for {}", Holders(file));
            }
            go_on()
        };
        // A collector that waits keeps the gate: those who come after it do not keep it waiting.
        let _gate = Lock::wait_while(&self.0.root.join("locks/gate"), true, &mut wait)?;
        Lock::wait_while(&self.0.root.join("locks/content"), true, &mut wait)
    }

    /// Held by a collector: nobody relies on packs but readers, who look again when one is gone. Everybody who wants to
    /// write waits for who waits here, so that it does so for a short time only.
    pub(super) fn lock_content_alone(&self, interrupt: &AtomicBool) -> Result<Lock> {
        self.check_writable()?;
        let begun = Instant::now();
        let mut told = false;
        let mut wait = |file: &File| {
            if interrupt.load(Ordering::Relaxed) {
                let why = format!("interrupted while waiting for {}: nothing was changed", Holders(file));
                return Err(Error::failed(why).at(self.dir()));
            }
            if begun.elapsed() > LONGEST_WAIT {
                let why = format!("{} did not end within {} s", Holders(file), LONGEST_WAIT.as_secs());
                return Err(Error::try_again(why).at(self.dir()).remedy("run it again when that has ended"));
            }
            if !told && begun.elapsed() > TELL {
                told = true;
                log::warn!("waiting for {}; others that write wait meanwhile", Holders(file));
            }
            Ok(())
        };
        let _gate = Lock::wait_while(&self.0.root.join("locks/gate"), false, &mut wait)?;
        Lock::wait_while(&self.0.root.join("locks/content"), false, &mut wait)
    }

    /// True where nothing of it can be changed by this path.
    pub fn is_on_read_only_filesystem(&self) -> bool {
        rustix::fs::statvfs(self.dir())
            .is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_on_read_only_filesystem() {
            return Err(Error::failed("the store lies on a filesystem that is mounted read-only")
                .at(self.dir())
                .remedy("reading and mounting work; to change it, mount that filesystem read-write"));
        }
        match self.0.superblock.preamble.read_only_compatible {
            0 => Ok(()),
            features => Err(Error::failed(format!(
                "the store needs a newer Stencil to be changed (features {features:#x})"
            ))
            .at(self.dir())
            .remedy("update Stencil on this host; reading works")),
        }
    }
}

/// True for a folder that holds something, but nothing of a store that is being made.
fn is_foreign(dir: &StorePath) -> bool {
    dir.names().is_ok_and(|names| {
        let ours =
            |name: &OsString| FOLDERS.iter().chain(&[HEADER, COPY, "lost+found"]).any(|ours| name == *ours);
        names.iter().any(|name| !ours(name))
    })
}

/// Makes those of its folders that are not there.
fn make_folders(root: &StorePath) -> Result<()> {
    for name in FOLDERS {
        let folder = root.join(name);
        match folder.create_folder() {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(folder.error("cannot create", e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// There is no template of that digest in the store.
pub(super) fn no_template(dir: &Path, digest: &Digest) -> Error {
    Error::not_found(format!("no template {digest}")).at(dir).remedy("see stencil ls for what the store has")
}

fn foreign(dir: &Path) -> Error {
    Error::usage("this folder is not empty and no template store")
        .at(dir)
        .remedy("name another folder with --store DIR or STENCIL_STORE")
}
