//! Access to the files of a store.
//!
//! A store may belong to a user whom its readers and writers do not trust. Therefore no file below the store is opened,
//! created, renamed, removed or chowned by its path: every access resolves the name beneath a descriptor of the store's
//! directory (`sys::files::directory`). The root is opened for each access, or once by [`StorePath::opened`] for a
//! longer operation. The next access therefore notices that a store was moved, unmounted or replaced.

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
use crate::sys::files::directory::Directory;
use crate::units::Bytes;

/// Mode of a store's files; packs hold guest memory.
const FILE_MODE: u32 = 0o600;
/// Mode of a store's directories.
const DIRECTORY_MODE: u32 = 0o700;

/// A file or directory of a store. Its path is used in messages only; the methods access the file.
#[derive(Debug, Clone)]
pub struct StorePath {
    base: Base,
    /// Name relative to the base; empty for the base itself.
    name: PathBuf,
    path: PathBuf,
}

#[derive(Debug, Clone)]
enum Base {
    /// The store's directory, opened for each access. The path is absolute and has no symbolic links.
    Root(Arc<Path>),
    /// An open directory.
    Open(Arc<Directory>),
}

enum OpenBase<'a> {
    Root(Directory),
    Open(&'a Directory),
}

impl Deref for OpenBase<'_> {
    type Target = Directory;

    fn deref(&self) -> &Directory {
        match self {
            OpenBase::Root(folder) => folder,
            OpenBase::Open(folder) => folder,
        }
    }
}

impl StorePath {
    /// Creates the path of a store's directory from the canonical path.
    pub(in crate::store) fn root(dir: &Path) -> StorePath {
        StorePath { base: Base::Root(dir.into()), name: PathBuf::new(), path: dir.to_owned() }
    }

    /// Creates the path of an open directory.
    pub(in crate::store) fn of(folder: Arc<Directory>) -> StorePath {
        StorePath { path: folder.path().to_owned(), base: Base::Open(folder), name: PathBuf::new() }
    }

    pub(in crate::store) fn join(&self, name: impl AsRef<Path>) -> StorePath {
        let name = name.as_ref();
        StorePath { base: self.base.clone(), name: self.name.join(name), path: self.path.join(name) }
    }

    /// Returns the path with another file name in the same directory.
    pub(in crate::store) fn with_file_name(&self, name: impl AsRef<OsStr>) -> StorePath {
        let name = name.as_ref();
        StorePath {
            base: self.base.clone(),
            name: self.name.with_file_name(name),
            path: self.path.with_file_name(name),
        }
    }

    /// Returns the directory of the file.
    pub(in crate::store) fn parent(&self) -> StorePath {
        let parent = |path: &Path| path.parent().unwrap_or(Path::new("")).to_owned();
        StorePath { base: self.base.clone(), name: parent(&self.name), path: parent(&self.path) }
    }

    /// Returns the file name.
    pub(in crate::store) fn file_name(&self) -> Option<&OsStr> {
        self.name.file_name()
    }

    /// Opens this directory once for all accesses below it.
    pub(in crate::store) fn opened(&self) -> io::Result<StorePath> {
        Ok(StorePath::of(Arc::new(self.folder()?)))
    }

    fn base(&self) -> io::Result<OpenBase<'_>> {
        Ok(match &self.base {
            Base::Root(dir) => OpenBase::Root(Directory::reach_canonical(dir)?),
            Base::Open(folder) => OpenBase::Open(folder),
        })
    }

    /// Returns the name for resolution below the base.
    fn name(&self) -> &Path {
        if self.name.as_os_str().is_empty() { Path::new(".") } else { &self.name }
    }

    pub(in crate::store) fn folder(&self) -> io::Result<Directory> {
        match (&self.base, self.name.as_os_str().is_empty()) {
            (Base::Root(dir), true) => Directory::open_canonical(dir),
            _ => self.base()?.folder(self.name()),
        }
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Returns `InvalidData` for anything but a regular file, `ELOOP` for a symbolic link, or an error if the system
    /// call fails.
    pub fn file(&self) -> io::Result<File> {
        self.file_with(OFlags::RDONLY)
    }

    pub(in crate::store) fn file_with(&self, flags: OFlags) -> io::Result<File> {
        self.base()?.file_with(self.name(), flags)
    }

    /// Reads a regular file of at most `limit` bytes.
    pub(in crate::store) fn read(&self, limit: Bytes) -> io::Result<Vec<u8>> {
        self.base()?.read(self.name(), limit)
    }

    /// Returns the metadata of the file. A symbolic link is not followed.
    pub(in crate::store) fn metadata(&self) -> io::Result<Stat> {
        match self.name.as_os_str().is_empty() {
            true => self.base()?.own_metadata(),
            false => self.base()?.metadata(&self.name),
        }
    }

    fn is(&self, kind: FileType) -> bool {
        self.metadata().is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == kind)
    }

    /// Returns true if a file of any type has this name.
    pub fn exists(&self) -> bool {
        self.metadata().is_ok()
    }

    pub(in crate::store) fn is_dir(&self) -> bool {
        self.is(FileType::Directory)
    }

    pub(in crate::store) fn is_file(&self) -> bool {
        self.is(FileType::RegularFile)
    }

    /// Returns true if `wanted` accepts a name in this directory. Stops reading at the first such name.
    pub(in crate::store) fn has_name(&self, wanted: impl Fn(&OsStr) -> bool) -> io::Result<bool> {
        self.folder()?.has_name(wanted)
    }

    /// Returns the names in this directory, unsorted.
    pub(in crate::store) fn names(&self) -> io::Result<Vec<OsString>> {
        self.folder()?.names()
    }

    /// Creates a file for reading and writing. Fails if the file exists.
    pub(in crate::store) fn create(&self) -> io::Result<File> {
        let (folder, name) = self.in_folder()?;
        let file = folder.create(name, FILE_MODE)?;
        give_to_owner_of(&folder, &file)?;
        Ok(file)
    }

    /// Opens a file for reading and writing, and creates the file if it does not exist.
    pub(in crate::store) fn open_or_create(&self) -> io::Result<File> {
        let (folder, name) = self.in_folder()?;
        let (file, created) = folder.open_or_create(name, FILE_MODE)?;
        // An existing file keeps its owner: it may be a hard link to a file outside the store.
        if created {
            give_to_owner_of(&folder, &file)?;
        }
        Ok(file)
    }

    /// Creates and opens a directory. Fails if the directory exists.
    pub(in crate::store) fn create_folder(&self) -> io::Result<Directory> {
        let (folder, name) = self.in_folder()?;
        let created = folder.create_folder(name, DIRECTORY_MODE)?;
        give_to_owner_of(&folder, &created)?;
        Ok(created)
    }

    fn in_folder(&self) -> io::Result<(Directory, &OsStr)> {
        let name = self.name.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = self.name.parent().unwrap_or(Path::new(""));
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Ok((self.base()?.folder(parent)?, name))
    }

    /// Renames the file to `to`, replacing an existing file.
    pub(in crate::store) fn rename(&self, to: &StorePath) -> io::Result<()> {
        self.base()?.rename(self.name(), &*to.base()?, to.name())
    }

    /// Removes a file of any type except a directory.
    pub(in crate::store) fn remove_file(&self) -> io::Result<()> {
        self.base()?.remove_file(self.name())
    }

    /// Removes an empty directory.
    pub(in crate::store) fn remove_folder(&self) -> io::Result<()> {
        self.base()?.remove_folder(self.name())
    }

    /// Removes a directory and everything below it. Symbolic links are not followed.
    pub(in crate::store) fn remove_tree(&self) -> io::Result<()> {
        self.base()?.remove_tree(self.name())
    }

    /// Makes creations, renames and removals in this directory durable.
    pub(in crate::store) fn sync(&self) -> io::Result<()> {
        self.folder()?.sync()
    }

    /// Returns the error for a failed access: damage if a file of an unexpected type has this name.
    pub(in crate::store) fn error(&self, what: impl Into<String>, error: io::Error) -> Error {
        match is_misplaced(&error) {
            true => Error::damage(what).at(&self.path).because(error).hint(
                "remove or replace the file: a store consists of regular files and directories, and links, FIFOs, sockets \
                 and devices are not opened; then import the same memory again if a template was damaged",
            ),
            false => Error::io(what, &self.path, error),
        }
    }
}

/// Returns true if a file of an unexpected type was found: a link, a directory, a FIFO, or a file without an end.
pub(in crate::store) fn is_misplaced(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
        || matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR | libc::EISDIR))
}

/// Chowns a file that root has just created to the owner of its directory. A store belongs to one user and is served
/// with the rights of this user, who must therefore keep access to all files. Other users cannot chown files.
fn give_to_owner_of(folder: &Directory, created: impl AsFd) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let (folder, created_as) = (folder.own_metadata()?, fstat(&created)?);
    if (created_as.st_uid, created_as.st_gid) == (folder.st_uid, folder.st_gid) {
        return Ok(());
    }
    Ok(fchown(created, Some(Uid::from_raw(folder.st_uid)), Some(Gid::from_raw(folder.st_gid)))?)
}

/// Returns the path, for use in messages.
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

/// Opens the directory of a store, and creates missing components. Each new component is entered through its
/// descriptor.
///
/// # Errors
/// Returns an error if the directory cannot be created.
pub(in crate::store) fn create_root(dir: &Path) -> Result<StorePath> {
    let fail = |e| Error::io("cannot create store", dir, e);
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
    let mut folder = Directory::open_canonical(&found).map_err(fail)?;
    for name in missing.into_iter().rev() {
        folder = match folder.create_folder(name, DIRECTORY_MODE) {
            // Another command has created the directory at the same time.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => folder.folder(name).map_err(fail)?,
            created => created.map_err(fail)?,
        };
    }
    Ok(StorePath::of(Arc::new(folder)))
}
