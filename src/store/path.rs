//! Access to the files of a store.
//!
//! A store may belong to a user who is not trusted by whoever reads or changes it. No file below the store is opened,
//! created, renamed, removed or given away by its path: every access resolves the name beneath a descriptor of the
//! store's folder (`sys::folder`). The root is opened for each access, or once by [`StorePath::opened`] for a longer
//! operation: a store that was moved away, unmounted or replaced is noticed by the next one.

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Gid, OFlags, Stat, Uid, fchown, fstat};

use crate::error::{Error, Result};
use crate::sys::folder::Folder;
use crate::units::Bytes;

/// Mode of a store's files: packs hold guest memory.
const FILE_MODE: u32 = 0o600;
/// Mode of a store's folders.
const FOLDER_MODE: u32 = 0o700;

/// A file or folder of a store. Its path is for messages; access goes through the methods.
#[derive(Debug, Clone)]
pub struct StorePath {
    base: Base,
    /// Relative to the base; empty for the base itself.
    name: PathBuf,
    path: PathBuf,
}

#[derive(Debug, Clone)]
enum Base {
    /// The store's folder: absolute, without symbolic links, opened for each access.
    Root(Arc<Path>),
    Open(Arc<Folder>),
}

enum OpenBase<'a> {
    Root(Folder),
    Open(&'a Folder),
}

impl Deref for OpenBase<'_> {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        match self {
            OpenBase::Root(folder) => folder,
            OpenBase::Open(folder) => folder,
        }
    }
}

impl StorePath {
    /// The folder of a store, by its canonical path.
    pub(super) fn root(dir: &Path) -> StorePath {
        StorePath { base: Base::Root(dir.into()), name: PathBuf::new(), path: dir.to_owned() }
    }

    /// A folder that is open.
    pub(super) fn of(folder: Arc<Folder>) -> StorePath {
        StorePath { path: folder.path().to_owned(), base: Base::Open(folder), name: PathBuf::new() }
    }

    pub(super) fn join(&self, name: impl AsRef<Path>) -> StorePath {
        let name = name.as_ref();
        StorePath { base: self.base.clone(), name: self.name.join(name), path: self.path.join(name) }
    }

    /// Another name in the same folder.
    pub(super) fn with_file_name(&self, name: impl AsRef<OsStr>) -> StorePath {
        let name = name.as_ref();
        StorePath {
            base: self.base.clone(),
            name: self.name.with_file_name(name),
            path: self.path.with_file_name(name),
        }
    }

    /// Its folder.
    pub(super) fn parent(&self) -> StorePath {
        let parent = |path: &Path| path.parent().unwrap_or(Path::new("")).to_owned();
        StorePath { base: self.base.clone(), name: parent(&self.name), path: parent(&self.path) }
    }

    /// The name in its folder.
    pub(super) fn file_name(&self) -> Option<&OsStr> {
        self.name.file_name()
    }

    /// This folder, opened once for everything that is joined to it.
    pub(super) fn opened(&self) -> io::Result<StorePath> {
        Ok(StorePath::of(Arc::new(self.folder()?)))
    }

    fn base(&self) -> io::Result<OpenBase<'_>> {
        Ok(match &self.base {
            Base::Root(dir) => OpenBase::Root(Folder::reach_canonical(dir)?),
            Base::Open(folder) => OpenBase::Open(folder),
        })
    }

    /// The name as the base resolves it.
    fn name(&self) -> &Path {
        if self.name.as_os_str().is_empty() { Path::new(".") } else { &self.name }
    }

    pub(super) fn folder(&self) -> io::Result<Folder> {
        match (&self.base, self.name.as_os_str().is_empty()) {
            (Base::Root(dir), true) => Folder::open_canonical(dir),
            _ => self.base()?.folder(self.name()),
        }
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// The system's; `InvalidData` for anything but a regular file, `ELOOP` for a link.
    pub fn file(&self) -> io::Result<File> {
        self.file_with(OFlags::RDONLY)
    }

    pub(super) fn file_with(&self, flags: OFlags) -> io::Result<File> {
        self.base()?.file_with(self.name(), flags)
    }

    /// The contents of a regular file of at most `limit` bytes.
    pub(super) fn read(&self, limit: Bytes) -> io::Result<Vec<u8>> {
        self.base()?.read(self.name(), limit)
    }

    /// What has this name; a link is not followed.
    pub(super) fn metadata(&self) -> io::Result<Stat> {
        match self.name.as_os_str().is_empty() {
            true => self.base()?.own_metadata(),
            false => self.base()?.metadata(&self.name),
        }
    }

    fn is(&self, kind: FileType) -> bool {
        self.metadata().is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == kind)
    }

    /// True when something has this name.
    pub(super) fn exists(&self) -> bool {
        self.metadata().is_ok()
    }

    pub(super) fn is_dir(&self) -> bool {
        self.is(FileType::Directory)
    }

    pub(super) fn is_file(&self) -> bool {
        self.is(FileType::RegularFile)
    }

    /// True when `wanted` holds for some name in this folder; names behind the first one are not read.
    pub(super) fn has_name(&self, wanted: impl Fn(&OsStr) -> bool) -> io::Result<bool> {
        self.folder()?.has_name(wanted)
    }

    /// Names in this folder, in no order.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        self.folder()?.names()
    }

    /// Creates a file that must not exist yet, for reading and writing.
    pub(super) fn create(&self) -> io::Result<File> {
        let (folder, name) = self.in_folder()?;
        let file = folder.create(name, FILE_MODE)?;
        give_to_owner_of(&folder, &file)?;
        Ok(file)
    }

    /// Opens a file for reading and writing; creates it where it does not exist.
    pub(super) fn open_or_create(&self) -> io::Result<File> {
        let (folder, name) = self.in_folder()?;
        let (file, created) = folder.open_or_create(name, FILE_MODE)?;
        // A file that exists may be a hard link to one that lies elsewhere: it stays with its owner.
        if created {
            give_to_owner_of(&folder, &file)?;
        }
        Ok(file)
    }

    /// Creates a folder that must not exist yet, and opens it.
    pub(super) fn create_folder(&self) -> io::Result<Folder> {
        let (folder, name) = self.in_folder()?;
        let made = folder.create_folder(name, FOLDER_MODE)?;
        give_to_owner_of(&folder, &made)?;
        Ok(made)
    }

    fn in_folder(&self) -> io::Result<(Folder, &OsStr)> {
        let name = self.name.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = self.name.parent().unwrap_or(Path::new(""));
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Ok((self.base()?.folder(parent)?, name))
    }

    /// Moves it to `to`, over what is there.
    pub(super) fn rename(&self, to: &StorePath) -> io::Result<()> {
        self.base()?.rename(self.name(), &*to.base()?, to.name())
    }

    /// Removes a file, link or anything else that is no folder.
    pub(super) fn remove_file(&self) -> io::Result<()> {
        self.base()?.remove_file(self.name())
    }

    /// Removes an empty folder.
    pub(super) fn remove_folder(&self) -> io::Result<()> {
        self.base()?.remove_folder(self.name())
    }

    /// Removes a folder with everything below it; links are not followed.
    pub(super) fn remove_tree(&self) -> io::Result<()> {
        self.base()?.remove_tree(self.name())
    }

    /// Makes creations, renames and removals in this folder durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.folder()?.sync()
    }

    /// The error for an access that failed. It is damage where something else than a file or folder of the store has this name.
    pub(super) fn error(&self, what: impl Into<String>, error: io::Error) -> Error {
        match is_misplaced(&error) {
            true => Error::damage(what).at(&self.path).because(error).remedy(
                "the files of a store are regular files and folders: links, FIFOs, sockets and devices are not followed or \
                 opened. Put back what was there, or remove it and import the same memory again",
            ),
            false => Error::io(what, &self.path, error),
        }
    }
}

/// True when what was met is of another type than was expected: a link, a folder, a FIFO, a file without end.
pub(super) fn is_misplaced(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
        || matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR | libc::EISDIR))
}

/// Gives what root has just created to the owner of the folder it lies in: a store belongs to one user, with whose
/// rights it is served, and who must be able to go on with it. Nobody else can give files away.
fn give_to_owner_of(folder: &Folder, made: impl AsFd) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let (folder, made_by) = (folder.own_metadata()?, fstat(&made)?);
    if (made_by.st_uid, made_by.st_gid) == (folder.st_uid, folder.st_gid) {
        return Ok(());
    }
    Ok(fchown(made, Some(Uid::from_raw(folder.st_uid)), Some(Gid::from_raw(folder.st_gid)))?)
}

/// The path, for messages.
impl AsRef<Path> for StorePath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl PartialEq for StorePath {
    fn eq(&self, other: &StorePath) -> bool {
        self.path == other.path
    }
}

impl Eq for StorePath {}

impl PartialOrd for StorePath {
    fn partial_cmp(&self, other: &StorePath) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for StorePath {
    fn cmp(&self, other: &StorePath) -> Ordering {
        self.path.cmp(&other.path)
    }
}

/// Opens the folder of a store that may not exist yet, and creates what is missing of it. Every component that is
/// created is entered through its descriptor.
///
/// # Errors
/// When it cannot be created.
pub(super) fn create_root(dir: &Path) -> Result<StorePath> {
    let fail = |e| Error::io("cannot create the store", dir, e);
    let absolute = std::path::absolute(dir).map_err(fail)?;
    let mut existing = absolute.as_path();
    let mut missing = Vec::new();
    let found = loop {
        match std::fs::canonicalize(existing) {
            Ok(found) => break found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
                    return Err(fail(e));
                };
                missing.push(name);
                existing = parent;
            }
            Err(e) => return Err(fail(e)),
        }
    };
    let mut folder = Folder::open_canonical(&found).map_err(fail)?;
    for name in missing.into_iter().rev() {
        folder = match folder.create_folder(name, FOLDER_MODE) {
            // Another command creates it at the same time.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => folder.folder(name).map_err(fail)?,
            made => made.map_err(fail)?,
        };
    }
    Ok(StorePath::of(Arc::new(folder)))
}
