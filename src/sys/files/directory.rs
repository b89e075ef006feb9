//! Access to files below a directory that another user may own (`openat2(2)`).
//!
//! Every name is resolved from the descriptor of the directory with `RESOLVE_BENEATH`, `RESOLVE_NO_SYMLINKS` and
//! `RESOLVE_NO_MAGICLINKS`. The owner of the directory therefore cannot redirect a privileged process by replacing a
//! file or directory with a link. Files are opened with `O_NONBLOCK` and must be regular: a FIFO, a device or a leased
//! file cannot block the caller.
//!
//! If a seccomp filter fails `openat2` with `ENOSYS`, names are resolved one component at a time with `O_NOFOLLOW`. The
//! rules are the same; `openat` takes its flags in a register, where a filter can check them.

mod resolve;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat, fchmod, fstat, fsync, mkdirat,
    renameat, statat, unlinkat,
};
use rustix::io::Errno;

use crate::units::Bytes;
use resolve::{BENEATH, DIRECTORY, not_regular, resolve};

/// Maximum depth for [`Directory::remove_tree`]. Stencil's own trees are at most four directories deep.
const MAX_DEPTH: usize = 32;

/// An open directory. Names are relative to the directory; `..` and symbolic links in names are errors.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// Opens the directory at a path that the user chose. Symbolic links in the path are followed.
    ///
    /// # Errors
    /// Returns an error if the system call fails: `ENOTDIR` for anything but a directory.
    pub fn open(path: &Path) -> io::Result<Directory> {
        Ok(Directory {
            fd: resolve(CWD, path, DIRECTORY, Mode::empty(), ResolveFlags::empty())?,
            path: path.to_owned(),
        })
    }

    /// Opens the directory at an absolute path without symbolic links, such as a result of [`std::fs::canonicalize`].
    ///
    /// # Errors
    /// Same as [`open`](Self::open), and `ELOOP` if a component is a symbolic link.
    pub fn open_canonical(path: &Path) -> io::Result<Directory> {
        let links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(Directory { fd: resolve(CWD, path, DIRECTORY, Mode::empty(), links)?, path: path.to_owned() })
    }

    /// Wraps the descriptor of an open directory. `path` is for messages.
    pub fn from_fd(fd: OwnedFd, path: &Path) -> Directory {
        Directory { fd, path: path.to_owned() }
    }

    /// Changes the path for messages.
    #[must_use]
    pub fn named(self, path: &Path) -> Directory {
        Directory { path: path.to_owned(), ..self }
    }

    /// Same as [`open_canonical`](Self::open_canonical), but opens the directory with `O_PATH`, which requires search
    /// but not read permission. The directory itself cannot be listed, synced or locked.
    ///
    /// # Errors
    /// Same as [`open_canonical`](Self::open_canonical).
    pub fn reach_canonical(path: &Path) -> io::Result<Directory> {
        let links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        Ok(Directory { fd: resolve(CWD, path, flags, Mode::empty(), links)?, path: path.to_owned() })
    }

    /// Returns the path of the directory, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of `name`, for messages.
    pub fn path_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a directory below this one.
    ///
    /// # Errors
    /// Returns an error if the system call fails: `ENOTDIR` for a file; `ELOOP` for a symbolic link, or
    /// `ENOTDIR` where openat2(2) is not available.
    pub fn folder(&self, name: impl AsRef<Path>) -> io::Result<Directory> {
        let name = name.as_ref();
        Ok(Directory { fd: self.resolve(name, DIRECTORY, Mode::empty())?, path: self.path_of(name) })
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Returns an error if the system call fails: `ELOOP` for a symbolic link. Returns `InvalidData` for anything but a
    /// regular file.
    pub fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        self.file_with(name, OFlags::RDONLY)
    }

    /// Opens an existing regular file with the given access flags.
    ///
    /// # Errors
    /// Same as [`file`](Self::file).
    pub fn file_with(&self, name: impl AsRef<Path>, flags: OFlags) -> io::Result<File> {
        regular(self.resolve(name.as_ref(), flags, Mode::empty())?)
    }

    /// Reads a regular file of at most `limit` bytes.
    ///
    /// # Errors
    /// Same as [`file`](Self::file), and `InvalidData` for a longer file.
    pub fn read(&self, name: impl AsRef<Path>, limit: Bytes) -> io::Result<Vec<u8>> {
        read_file(self.file(name)?, limit)
    }

    /// Creates a new file for reading and writing. Its mode is exactly `mode`, independent of the umask.
    ///
    /// # Errors
    /// Returns an error if the system call fails: `EEXIST` if the name exists, even as a symbolic link.
    pub fn create(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let file = regular(self.resolve(name.as_ref(), flags, Mode::RUSR | Mode::WUSR)?)?;
        fchmod(&file, Mode::from_raw_mode(mode))?;
        Ok(file)
    }

    /// Creates an unnamed file for reading and writing (`O_TMPFILE`).
    ///
    /// # Errors
    /// Returns an error if the system call fails: `EOPNOTSUPP` if the file system does not support `O_TMPFILE`.
    pub fn create_unnamed(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        regular(self.resolve(Path::new("."), flags, Mode::from_raw_mode(mode))?)
    }

    /// Opens a regular file for reading and writing, or creates it with this mode. The boolean is true if this call
    /// created the file.
    ///
    /// # Errors
    /// Same as [`file`](Self::file).
    pub fn open_or_create(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<(File, bool)> {
        let name = name.as_ref();
        loop {
            match self.file_with(name, OFlags::RDWR) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                opened => return opened.map(|file| (file, false)),
            }
            match self.create(name, mode) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created.map(|file| (file, true)),
            }
        }
    }

    /// Creates a new directory and opens it. Its mode is exactly `mode`, independent of the umask.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn create_folder(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<Directory> {
        let (parent, last) = self.parent_of(name.as_ref())?;
        mkdirat(parent.as_fd(), last, Mode::RWXU)?;
        let created = self.folder(name.as_ref())?;
        fchmod(&created.fd, Mode::from_raw_mode(mode))?;
        Ok(created)
    }

    /// Returns type, owner, mode, size and inode of a name. A symbolic link is not followed.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn metadata(&self, name: impl AsRef<Path>) -> io::Result<Stat> {
        let (parent, last) = self.parent_of(name.as_ref())?;
        Ok(statat(parent.as_fd(), last, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Returns type, owner, mode and inode of the directory itself.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn own_metadata(&self) -> io::Result<Stat> {
        Ok(fstat(&self.fd)?)
    }

    /// Returns true if the name exists. A symbolic link exists even if its target does not.
    pub fn has(&self, name: impl AsRef<Path>) -> bool {
        self.metadata(name).is_ok()
    }

    /// Returns the names in the directory in no particular order, without `.` and `..`.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        self.has_name(|name| {
            names.push(name.to_owned());
            false
        })?;
        Ok(names)
    }

    /// Returns true if `wanted` accepts a name in this directory. The search stops at the first match.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn has_name(&self, mut wanted: impl FnMut(&OsStr) -> bool) -> io::Result<bool> {
        // A separate open file description, because the position of a directory stream belongs to the description.
        let fd = self.resolve(Path::new("."), DIRECTORY, Mode::empty())?;
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." && wanted(OsStr::from_bytes(name)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes a file, a symbolic link or any other object that is not a directory.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn remove_file(&self, name: impl AsRef<Path>) -> io::Result<()> {
        let (parent, last) = self.parent_of(name.as_ref())?;
        Ok(unlinkat(parent.as_fd(), last, AtFlags::empty())?)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn remove_folder(&self, name: impl AsRef<Path>) -> io::Result<()> {
        let (parent, last) = self.parent_of(name.as_ref())?;
        Ok(unlinkat(parent.as_fd(), last, AtFlags::REMOVEDIR)?)
    }

    /// Removes a name; for a directory, its whole tree too. Symbolic links are removed, not followed.
    ///
    /// # Errors
    /// Returns an error if a system call fails, or if the tree is more than 32 directories deep.
    pub fn remove_tree(&self, name: impl AsRef<Path>) -> io::Result<()> {
        self.remove_tree_within(name.as_ref(), MAX_DEPTH)
    }

    fn remove_tree_within(&self, name: &Path, depth: usize) -> io::Result<()> {
        match self.remove_file(name) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EISDIR | libc::EPERM)) && depth > 0 => {}
            done => return done,
        }
        let directory = self.folder(name)?;
        for below in directory.names()? {
            match directory.remove_tree_within(Path::new(&below), depth - 1) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        self.remove_folder(name)
    }

    /// Renames `name` to `new_name` below another directory, and replaces an existing file.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn rename(
        &self,
        name: impl AsRef<Path>,
        to: &Directory,
        new_name: impl AsRef<Path>,
    ) -> io::Result<()> {
        let (from_parent, from) = self.parent_of(name.as_ref())?;
        let (to_parent, to) = to.parent_of(new_name.as_ref())?;
        Ok(renameat(from_parent.as_fd(), from, to_parent.as_fd(), to)?)
    }

    /// Makes creations, renames and removals in the directory durable.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.fd)?)
    }

    fn resolve(&self, name: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        resolve(&self.fd, name, flags, mode, BENEATH)
    }

    /// Returns the open directory that contains the last component of `name`, and that component.
    fn parent_of<'a>(&'a self, name: &'a Path) -> io::Result<(Parent<'a>, &'a OsStr)> {
        let last = name.file_name().filter(|last| !last.is_empty()).ok_or(Errno::INVAL)?;
        match name.parent() {
            None => Err(Errno::INVAL.into()),
            Some(parent) if parent.as_os_str().is_empty() => Ok((Parent::This(&self.fd), last)),
            Some(parent) => Ok((Parent::Below(self.folder(parent)?), last)),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

enum Parent<'a> {
    This(&'a OwnedFd),
    Below(Directory),
}

impl AsFd for Parent<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Parent::This(fd) => fd.as_fd(),
            Parent::Below(directory) => directory.as_fd(),
        }
    }
}

/// Reads an open regular file of at most `limit` bytes.
///
/// # Errors
/// Returns an error if a system call fails, and `InvalidData` for a longer file.
pub fn read_file(file: File, limit: Bytes) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The file may grow between the two checks.
    let fits = |length: u64| length <= limit.get();
    if fits(file.metadata()?.len()) && fits(file.take(limit.get() + 1).read_to_end(&mut bytes)? as u64) {
        return Ok(bytes);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("file is larger than {limit}")))
}

fn regular(fd: OwnedFd) -> io::Result<File> {
    match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
        FileType::RegularFile => Ok(fd.into()),
        FileType::Directory => Err(not_regular("a directory")),
        FileType::Fifo => Err(not_regular("a FIFO")),
        _ => Err(not_regular("a device or socket")),
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::files::directory::*;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn outside_and_inside() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("inside/sub")).unwrap();
        std::fs::write(dir.path().join("outside"), "kept").unwrap();
        let inside = Directory::open(&dir.path().join("inside")).unwrap();
        (dir, inside)
    }

    #[test]
    fn resolution_stays_beneath_the_directory() {
        let (dir, inside) = outside_and_inside();
        symlink(dir.path(), dir.path().join("inside/link")).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("inside/file")).unwrap();
        let errno = |result: io::Result<File>| result.unwrap_err().raw_os_error().unwrap();
        assert_eq!(errno(inside.file("link/outside")), libc::ELOOP);
        assert_eq!(errno(inside.file("file")), libc::ELOOP);
        assert_eq!(errno(inside.file("../outside")), libc::EXDEV);
        assert_eq!(errno(inside.file("/etc/passwd")), libc::EXDEV);
        assert_eq!(errno(inside.create("file", 0o600)), libc::EEXIST);
        assert_eq!(errno(inside.open_or_create("file", 0o600).map(|(file, _)| file)), libc::ELOOP);
        assert!(inside.rename("sub", &inside, "link/sub").is_err());
        assert!(inside.remove_file("link/outside").is_err());
        inside.remove_tree("link").unwrap();
        assert_eq!(std::fs::read(dir.path().join("outside")).unwrap(), b"kept");
    }

    #[test]
    fn reads_only_regular_files_up_to_the_limit() {
        let (dir, inside) = outside_and_inside();
        let fifo = dir.path().join("inside/fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("inside/socket")).unwrap();
        for name in ["fifo", "socket", "sub"] {
            let read = inside.read(name, Bytes::new(10)).unwrap_err();
            assert_eq!(read.kind(), io::ErrorKind::InvalidData, "{name}: {read}");
            assert!(inside.open_or_create(name, 0o600).is_err(), "{name}");
        }
        inside.create("ten", 0o640).unwrap().write_all(b"0123456789").unwrap();
        assert_eq!(inside.read("ten", Bytes::new(10)).unwrap(), b"0123456789");
        assert!(
            inside.read("ten", Bytes::new(9)).unwrap_err().to_string().contains("file is larger than 9 B")
        );
        let mode = std::fs::metadata(dir.path().join("inside/ten")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
    }

    #[test]
    fn creates_lists_renames_and_removes_trees() {
        let (dir, inside) = outside_and_inside();
        symlink(dir.path(), dir.path().join("inside/sub/link")).unwrap();
        inside.create_folder("sub/deep", 0o750).unwrap().create("file", 0o600).unwrap();
        let mut names = inside.folder("sub").unwrap().names().unwrap();
        names.sort();
        assert_eq!(names, ["deep", "link"]);
        inside.rename("sub/deep/file", &inside, "moved").unwrap();
        assert!(inside.has("moved") && !inside.has("sub/deep/file"));
        inside.remove_tree("sub").unwrap();
        assert_eq!(inside.names().unwrap(), ["moved"]);
        assert!(dir.path().join("outside").exists());
        assert_eq!(inside.remove_tree("sub").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
