//! Opens the backing store as QEMU does: an existing file, a new file, or an unnamed file in a directory.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FsWord, fstatfs};

use crate::error::{Code, Error, Result, errno_text};
use crate::sys::memory::mapping::Sharing;
use crate::sys::process::procfs::{self, FS_TYPE};
use crate::units::PAGE_SIZE;

use super::plan::{FileFacts, Plan};
use super::row::OpenMode;

const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;

/// An open backing store.
#[derive(Debug)]
pub struct Opened {
    /// The open file.
    pub file: File,
    /// Unlinks the file on drop if this module created it.
    pub undo: Undo,
    pub facts: FileFacts,
    /// True if the file is on a FUSE file system.
    pub fuse: bool,
}

/// A created file that is unlinked on drop, unless [`Undo::disarm`] was called.
#[derive(Debug, Default)]
pub struct Undo(Option<PathBuf>);

impl Undo {
    /// Keeps the file.
    pub fn disarm(&mut self) {
        self.0 = None;
    }

    /// Returns true if a file would be unlinked.
    pub fn is_armed(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// QEMU's hint after `Permission denied`.
const TEMPLATING_HINT: &str = "Consider opening the backing store read-only but still creating writable RAM \
    using '-object memory-backend-file,readonly=on,rom=off...' (see \"VM templating\" documentation)";

/// Opens the backing store of a plan.
///
/// # Errors
/// Returns an error with QEMU's text and hint.
pub fn open(plan: &Plan, path: &Path, mode: OpenMode) -> Result<Opened> {
    match open_or_create(path, mode, &plan.region) {
        Ok((file, created)) => describe(file, created).map_err(|e| open_error(path, &e)),
        Err(cause) => {
            let mut error = open_error(path, &cause);
            let private = plan.sharing == Sharing::Private;
            let denied = cause.raw_os_error() == Some(libc::EACCES);
            if denied
                && private
                && mode == OpenMode::ReadWrite
                && open_plain(path, OpenMode::ReadOnly).is_ok()
            {
                error = error.hint(TEMPLATING_HINT);
            }
            Err(error)
        }
    }
}

fn open_error(path: &Path, cause: &io::Error) -> Error {
    let code = match cause.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        _ => Code::Failed,
    };
    let words = errno_text(cause);
    Error::new(code, format!("can't open backing store {} for guest RAM: {words}", path.display()))
}

/// Opens with O_NONBLOCK, so that a FIFO cannot block the caller: the later mmap reports that it cannot be mapped.
fn open_plain(path: &Path, mode: OpenMode) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(mode == OpenMode::ReadWrite)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if mode == OpenMode::ReadOnly && file.metadata()?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    Ok(file)
}

fn open_or_create(path: &Path, mode: OpenMode, region: &str) -> io::Result<(File, Option<PathBuf>)> {
    loop {
        let cause = match open_plain(path, mode) {
            Ok(file) => return Ok((file, None)),
            Err(cause) => cause,
        };
        let created = match (cause.raw_os_error(), mode) {
            (Some(libc::ENOENT), OpenMode::ReadWrite) => {
                create(path).map(|file| (file, Some(path.to_owned())))
            }
            (Some(libc::EISDIR), OpenMode::ReadWrite) => {
                create_unnamed(path, region).map(|file| (file, None))
            }
            _ => Err(cause),
        };
        match created {
            // Another process created the file between the two calls: open that file.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::EINTR)) => {}
            other => return other,
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o644).open(path)
}

/// Creates a file in the directory and removes its name, like mkstemp(3) and unlink(2). The caller tries again if the
/// name exists.
fn create_unnamed(directory: &Path, region: &str) -> io::Result<File> {
    // Each RandomState has other keys.
    let suffix = RandomState::new().hash_one(region);
    let path = directory.join(format!("qemu_back_mem.{}.{suffix:x}", region.replace('/', "_")));
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Returns true if the file is on a Stencil mount, whose files never change.
pub fn is_on_stencil_mount(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    let mounts = procfs::mounts().unwrap_or_default();
    mounts.iter().any(|mount| mount.dev == metadata.dev() && mount.fs_type == FS_TYPE)
}

fn describe(file: File, created: Option<PathBuf>) -> io::Result<Opened> {
    let undo = Undo(created);
    let metadata = file.metadata()?;
    let filesystem = fstatfs(&file)?;
    let kind = metadata.file_type();
    let size = if kind.is_file() {
        metadata.size()
    } else if kind.is_block_device() {
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?
    } else {
        0
    };
    let page_size = match filesystem.f_type {
        HUGETLBFS_MAGIC => u64::try_from(filesystem.f_bsize).unwrap_or(PAGE_SIZE),
        _ => PAGE_SIZE,
    };
    let facts = FileFacts { size, page_size, regular: kind.is_file() };
    Ok(Opened { file, undo, facts, fuse: filesystem.f_type == FUSE_SUPER_MAGIC })
}
