//! A file system that does nothing: each READ is answered with zeros at once, by fuser and the kernel alone.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request, spawn_mount,
};
use stencilfs::error::{Error, Result};

const FILE: INodeNo = INodeNo(2);
const NAME: &str = "zeros";
const TTL: Duration = Duration::from_secs(3600);
/// Longest READ in bytes.
const MAX_READ: usize = 1 << 20;

struct Zeros {
    size: u64,
    reply: Vec<u8>,
}

impl Zeros {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_file = ino == FILE;
        FileAttr {
            ino,
            size: if is_file { self.size } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o400 } else { 0o500 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Zeros {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        reply.data(&self.reply[..left.min(size as usize).min(MAX_READ)]);
    }
}

/// The file system, mounted until this value is dropped.
pub struct StaticFs {
    file: PathBuf,
    _session: BackgroundSession,
}

impl StaticFs {
    /// Mounts a file of `size` zeros at an empty directory.
    pub fn mount(mountpoint: &Path, size: u64) -> Result<StaticFs> {
        let zeros = Zeros { size, reply: vec![0; MAX_READ] };
        let session = spawn_mount(zeros, mountpoint, &Config::default())
            .map_err(|e| Error::io("cannot mount a file system at", mountpoint, e))?;
        Ok(StaticFs { file: mountpoint.join(NAME), _session: session })
    }

    /// The file of zeros.
    pub fn file(&self) -> &Path {
        &self.file
    }
}
