//! The runtime directory: records, sockets, logs and locks of running mounts and clones.
//!
//! ```text
//!   runtime_dir()             0755
//!     mounts/ clones/ …       0700, so that only the owner can open a record, a socket or a locked file
//! ```
//! Records determine which processes a command signals and which files it removes. A file that another user owns or can
//! write is therefore refused with an error that names the file ([`trust`]); [`Directory`] refuses a FIFO, a device or
//! an endless file in place of a record.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, fchmod, fcntl_setfl, fstat, mkdirat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::files::directory::{Directory, read_file};
use crate::sys::files::trust;
use crate::units::Bytes;

/// Largest record.
pub const MAX_RECORD: Bytes = Bytes::new(1 << 20);

/// Largest PID (`PID_MAX_LIMIT` in the kernel's `include/linux/threads.h`).
const MAX_PID: u32 = 1 << 22;

const OWNED_ELSEWHERE: &str = "the runtime directory must be owned by root or by you, and not be writable by others: \
     check its contents, then fix owner and mode, or set STENCIL_RUNTIME_DIR to another directory";

/// Returns the path of the runtime directory: `$STENCIL_RUNTIME_DIR`, else `/run/stencil`.
pub fn runtime_dir() -> PathBuf {
    match std::env::var_os("STENCIL_RUNTIME_DIR") {
        // Absolute, as daemons change their working directory.
        Some(dir) if !dir.is_empty() => std::path::absolute(&dir).unwrap_or(PathBuf::from(dir)),
        _ => PathBuf::from("/run/stencil"),
    }
}

/// Opens a subdirectory of the runtime directory, or the runtime directory itself if `name` is empty. Returns `None` if
/// it does not exist.
///
/// # Errors
/// Returns an error if the directory cannot be opened, or another user owns it or can write it.
pub fn open(name: &str) -> Result<Option<Directory>> {
    let opened = trust::open(&runtime_dir()).and_then(|mut folder| {
        for part in Path::new(name) {
            folder = trusted_folder(&folder, part)?;
        }
        Ok(folder)
    });
    match opened {
        Ok(folder) => Ok(Some(folder)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(unusable(name, e)),
    }
}

/// Same as [`open`], but creates missing directories, with modes that do not depend on the umask.
///
/// # Errors
/// Same as [`open`]; returns an error if a directory cannot be created.
pub fn create(name: &str) -> Result<Directory> {
    let created = create_top().and_then(|mut folder| {
        for part in Path::new(name) {
            folder = match folder.create_folder(part, 0o700) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => trusted_folder(&folder, part)?,
                created => created?,
            };
        }
        Ok(folder)
    });
    created.map_err(|e| unusable(name, e))
}

fn create_top() -> io::Result<Directory> {
    let path = runtime_dir();
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    let created = match mkdirat(CWD, &path, Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(e) => return Err(e.into()),
    };
    let folder = trust::open(&path)?;
    if created {
        fchmod(&folder, Mode::from_raw_mode(0o755))?;
    }
    Ok(folder)
}

fn unusable(name: &str, e: io::Error) -> Error {
    let refused = matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP));
    let e = if refused { io::Error::new(e.kind(), "not a directory") } else { e };
    failed("cannot use the runtime directory", &runtime_dir().join(name), e)
}

/// Creates the error of a failed call on a file in the runtime directory, with a remedy that fits the cause.
pub fn failed(what: &str, path: &Path, e: io::Error) -> Error {
    let remedy = match e.kind() {
        // `trust` returns PermissionDenied without an errno.
        io::ErrorKind::PermissionDenied if e.raw_os_error().is_none() => OWNED_ELSEWHERE.to_owned(),
        io::ErrorKind::PermissionDenied => {
            "run the command as root, or set STENCIL_RUNTIME_DIR to a directory that you can write"
                .to_owned()
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!(
            "free space on the file system of the runtime directory {}, then retry",
            runtime_dir().display()
        ),
        io::ErrorKind::ReadOnlyFilesystem => {
            "the runtime directory is on a read-only file system: set STENCIL_RUNTIME_DIR to another directory"
                .to_owned()
        }
        _ => "check the contents of the runtime directory (STENCIL_RUNTIME_DIR), which holds the records of mounts and clones"
            .to_owned(),
    };
    Error::io(what, path, e).hint(remedy)
}

/// Opens a subdirectory of a directory in the runtime directory.
///
/// # Errors
/// Returns `PermissionDenied` if another user owns the directory or can write it, and an error if a system call fails.
pub fn trusted_folder(parent: &Directory, name: impl AsRef<Path>) -> io::Result<Directory> {
    let folder = parent.folder(name)?;
    trust::expect(&folder.own_metadata()?)?;
    Ok(folder)
}

/// Opens a regular file in the runtime directory for reading.
///
/// # Errors
/// Same as [`Directory::file`], and `PermissionDenied` if another user owns the file or can write it.
pub fn trusted_file(folder: &Directory, name: impl AsRef<Path>) -> io::Result<File> {
    let file = folder.file(name)?;
    trust::expect(&fstat(&file)?)?;
    Ok(file)
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// Same as [`trusted_file`], and `InvalidData` for a longer file.
pub fn read(folder: &Directory, name: impl AsRef<Path>, limit: Bytes) -> io::Result<Vec<u8>> {
    read_file(trusted_file(folder, name)?, limit)
}

/// Replaces the contents of a file of mode 0600 atomically: readers see the old or the new contents.
///
/// # Errors
/// Returns an error if a system call fails; the old contents are kept.
pub fn replace(folder: &Directory, name: &str, contents: &[u8]) -> io::Result<()> {
    let temporary = format!("{name}.{}.new", std::process::id());
    let write = || -> io::Result<()> {
        folder.create(&temporary, 0o600)?.write_all(contents)?;
        folder.rename(&temporary, folder, name)
    };
    write()
        .or_else(|e| match e.kind() {
            // The file was left by a killed process with the same PID.
            io::ErrorKind::AlreadyExists => {
                folder.remove_tree(&temporary)?;
                write()
            }
            _ => Err(e),
        })
        .inspect_err(|_| drop(folder.remove_file(&temporary)))
}

/// Opens a regular file for appending; creates a missing file with mode 0600.
///
/// # Errors
/// Same as [`Directory::file`].
pub fn append(folder: &Directory, name: &str) -> io::Result<File> {
    let (file, _) = folder.open_or_create(name, 0o600)?;
    fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

/// Returns true if `pid` is a possible PID.
pub fn is_pid(pid: u32) -> bool {
    (1..=MAX_PID).contains(&pid)
}

/// Returns true if `name` is one path component of ASCII letters, digits, `.`, `_` and `-` without a leading dot.
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(plain)
}

/// Returns true if `path` is absolute and has no `..` component.
pub fn is_whole_path(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir)
}
