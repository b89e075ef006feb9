//! The runtime directory: records, sockets, logs and locks of what runs now.
//!
//! ```text
//!   runtime_dir()             0755
//!     mounts/ clones/ …       0700, so that nobody but the owner opens a record, a socket or a file with a lock
//! ```
//! Records say whom a command signals and what it removes. What another user owns, or can write, is refused with its
//! name ([`trust`]); a FIFO, device or endless file in a record's place is refused by [`Folder`].

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, fchmod, fcntl_setfl, fstat, mkdirat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::folder::Folder;
use crate::sys::trust;
use crate::units::Bytes;

/// No record is longer.
pub const MAX_RECORD: Bytes = Bytes::new(1 << 20);

/// Largest process number (`PID_MAX_LIMIT` of the kernel).
const MAX_PID: u32 = 1 << 22;

const OWNED_ELSEWHERE: &str = "only root and you may own the runtime directory, and nobody else may write it: look at \
     what is there, then chown and chmod it, or name another one in STENCIL_RUNTIME_DIR";

/// Where running things of Stencil leave their records: `$STENCIL_RUNTIME_DIR`, else `/run/stencil`.
pub fn runtime_dir() -> PathBuf {
    match std::env::var_os("STENCIL_RUNTIME_DIR") {
        // Absolute: daemons leave their working directory.
        Some(dir) if !dir.is_empty() => std::path::absolute(&dir).unwrap_or(PathBuf::from(dir)),
        _ => PathBuf::from("/run/stencil"),
    }
}

/// A folder of the runtime directory, `""` for itself; `None` when it does not exist.
///
/// # Errors
/// When it cannot be opened, or another user owns it or can write it.
pub fn open(name: &str) -> Result<Option<Folder>> {
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

/// The same; folders that do not exist are created, with modes that do not depend on the umask.
///
/// # Errors
/// As [`open`]; when a folder cannot be created.
pub fn create(name: &str) -> Result<Folder> {
    let created = create_top().and_then(|mut folder| {
        for part in Path::new(name) {
            let below = match folder.create_folder(part, 0o700) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => trusted_folder(&folder, part)?,
                created => created?,
            };
            close_to_others(&below)?;
            folder = below;
        }
        Ok(folder)
    });
    created.map_err(|e| unusable(name, e))
}

fn create_top() -> io::Result<Folder> {
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

/// Others could open a folder of an older build, and lock it for ever.
fn close_to_others(folder: &Folder) -> io::Result<()> {
    let stat = folder.own_metadata()?;
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    match ours && stat.st_mode & 0o077 != 0 {
        true => Ok(fchmod(folder, Mode::RWXU)?),
        false => Ok(()),
    }
}

fn unusable(name: &str, e: io::Error) -> Error {
    let refused = matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP));
    let e = if refused { io::Error::new(e.kind(), "it is not a folder") } else { e };
    failed("cannot use the runtime directory", &runtime_dir().join(name), e)
}

/// A failed call on something in the runtime directory, with what to do about the directory.
pub fn failed(what: &str, path: &Path, e: io::Error) -> Error {
    let remedy = match e.kind() {
        // A refusal of this program's own has no number.
        io::ErrorKind::PermissionDenied if e.raw_os_error().is_none() => OWNED_ELSEWHERE.to_owned(),
        io::ErrorKind::PermissionDenied => {
            "run it as root, whose records are there; or set STENCIL_RUNTIME_DIR to a directory that you can write"
                .to_owned()
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!(
            "make room on the file system of the runtime directory, {}, then run this again",
            runtime_dir().display()
        ),
        io::ErrorKind::ReadOnlyFilesystem => {
            "the runtime directory is on a read-only file system: name another one in STENCIL_RUNTIME_DIR".to_owned()
        }
        _ => "STENCIL_RUNTIME_DIR names the directory with the records of mounts and clones: see what is there"
            .to_owned(),
    };
    Error::io(what, path, e).remedy(remedy)
}

/// A folder in a folder of the runtime directory.
///
/// # Errors
/// The system's; `PermissionDenied` where another user owns it or can write it.
pub fn trusted_folder(parent: &Folder, name: impl AsRef<Path>) -> io::Result<Folder> {
    let folder = parent.folder(name)?;
    trust::expect(&folder.own_metadata()?)?;
    Ok(folder)
}

/// A regular file of the runtime directory, open for reading.
///
/// # Errors
/// As [`Folder::file`]; `PermissionDenied` where another user owns it or can write it.
pub fn trusted_file(folder: &Folder, name: impl AsRef<Path>) -> io::Result<File> {
    let file = folder.file(name)?;
    trust::expect(&fstat(&file)?)?;
    Ok(file)
}

/// The contents of a regular file of at most `limit` bytes. Nobody but its owner can put another one there in between: the
/// folder is trusted.
///
/// # Errors
/// As [`trusted_file`]; `InvalidData` for a longer file.
pub fn read(folder: &Folder, name: impl AsRef<Path>, limit: Bytes) -> io::Result<Vec<u8>> {
    trusted_file(folder, &name)?;
    folder.read(name, limit)
}

/// Writes a file, for its owner alone: readers see the old contents or the new ones.
///
/// # Errors
/// The system's; then the old contents are there.
pub fn replace(folder: &Folder, name: &str, contents: &[u8]) -> io::Result<()> {
    let fresh = format!("{name}.{}.new", std::process::id());
    let write = || -> io::Result<()> {
        folder.create(&fresh, 0o600)?.write_all(contents)?;
        folder.rename(&fresh, folder, name)
    };
    write()
        .or_else(|e| match e.kind() {
            // Of a process that was killed, and had this one's number.
            io::ErrorKind::AlreadyExists => {
                folder.remove_tree(&fresh)?;
                write()
            }
            _ => Err(e),
        })
        .inspect_err(|_| drop(folder.remove_file(&fresh)))
}

/// Opens a regular file to write at its end; creates it, for its owner alone, where it does not exist.
///
/// # Errors
/// As [`Folder::file`].
pub fn append(folder: &Folder, name: &str) -> io::Result<File> {
    let (file, _) = folder.open_or_create(name, 0o600)?;
    fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

/// True for a number that a process can have.
pub fn is_pid(pid: u32) -> bool {
    (1..=MAX_PID).contains(&pid)
}

/// True for one component of a path that has letters, digits, `.`, `_` and `-` only, and does not begin with a dot.
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(plain)
}

/// True for an absolute path without `..`.
pub fn is_whole_path(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir)
}
