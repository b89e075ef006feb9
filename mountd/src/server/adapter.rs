//! The adapter between fuser and the file system: converts requests and replies, and decides nothing.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::OFlags;
use stencilfs::control::{Op, RequestInfo};
use stencilfs::units::PAGE_SIZE;

use crate::server::fs::{ATTRIBUTE_TTL, FileSystem};
use crate::server::pending::Opened;
use crate::server::read::decode::MAX_READ;
use crate::server::refusal::Refusal;
use crate::server::tree::node::{Attributes, Kind};

/// Largest number of pending background requests of the kernel (`max_background`): readahead of many clones at once.
const MAX_BACKGROUND: u16 = 128;

/// [`PAGE_SIZE`] as FUSE encodes block sizes.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: u32 = PAGE_SIZE as u32;

/// The file system as an implementation of fuser's [`Filesystem`].
#[derive(Debug)]
pub struct Adapter(pub FileSystem);

fn info(req: &Request, op: Op, ino: INodeNo) -> RequestInfo {
    RequestInfo { unique: req.unique().0, op, ino: ino.0, offset: 0, size: 0, thread: req.pid() }
}

fn errno(refusal: Refusal) -> Errno {
    Errno::from_i32(refusal.errno())
}

fn attr(attributes: &Attributes) -> FileAttr {
    let time = UNIX_EPOCH + Duration::from_secs(attributes.created);
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size.get(),
        blocks: attributes.data.get().div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: kind(attributes.kind),
        perm: (attributes.mode & 0o7777) as u16,
        nlink: if attributes.kind == Kind::Directory { 2 } else { 1 },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: PAGE,
        flags: 0,
    }
}

fn kind(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

/// Replies to an OPEN with a backing that the supervisor keeps registered on this connection.
#[allow(unsafe_code)]
fn opened_backing(reply: ReplyOpen, id: u32) {
    // SAFETY: the supervisor registered the id on this connection, and keeps the id registered while a server answers
    // opens with it. `into_raw` below consumes the wrapper, which therefore never closes the id.
    let backing = unsafe { reply.wrap_backing(id) };
    reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), &backing);
    let _ = backing.into_raw();
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // All flags are optional: an old kernel does not offer some of them. The reply must be the same from every
        // server of a mount, so it depends on the kernel's request only.
        for flag in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PASSTHROUGH,
        ] {
            let _ = config.add_capabilities(flag);
        }
        // One level of stacking: the kernel rejects a backing on a file system that is itself stacked (overlayfs).
        let _ = config.set_max_stack_depth(1);
        let _ = config.set_max_write(u32::try_from(MAX_READ).unwrap_or(u32::MAX));
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.0.lookup(info(req, Op::Lookup, parent), name, |found| match found {
            Ok(entry) => {
                let attr = attr(&entry.attributes);
                reply.entry_with_ttls(&ATTRIBUTE_TTL, &entry.ttl, &attr, Generation(0));
            }
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.0.attributes(info(req, Op::GetAttr, ino), |found| match found {
            Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attr(&attributes)),
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        self.0.read_link(info(req, Op::ReadLink, ino), |found| match found {
            Ok(target) => reply.data(target.as_bytes()),
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let flags = OFlags::from_bits_retain(flags.0.cast_unsigned());
        let send = Box::new(|opened| match opened {
            Ok(Opened::Decode) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Ok(Opened::Backing(id)) => opened_backing(reply, id),
            Err(refusal) => reply.error(errno(refusal)),
        });
        self.0.open(info(req, Op::Open, ino), flags, send);
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let request = RequestInfo { offset, size, ..info(req, Op::Read, ino) };
        self.0.read(request, |read| match read {
            Ok(bytes) => reply.data(bytes),
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn lseek(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.0.seek(info(req, Op::LSeek, ino), (offset, whence), |found| match found {
            Ok(position) => reply.offset(position),
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.0.list(info(req, Op::ReadDir, ino), offset, |found| match found {
            Ok(entries) => {
                for entry in entries {
                    if reply.add(INodeNo(entry.ino), entry.cookie, kind(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn statfs(&self, req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.0.totals(info(req, Op::StatFs, ino), |found| match found {
            Ok((templates, data)) => {
                reply.statfs(data.pages().get(), 0, 0, templates, 0, PAGE, 255, PAGE);
            }
            Err(refusal) => reply.error(errno(refusal)),
        });
    }

    fn flush(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::Flush, ino), |refusal| reply.error(errno(refusal)));
    }

    fn fsync(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::FSync, ino), |refusal| reply.error(errno(refusal)));
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::FSyncDir, ino), |refusal| reply.error(errno(refusal)));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.0.set_attributes(info(req, Op::SetAttr, ino), size.is_some(), |refusal| {
            reply.error(errno(refusal))
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        self.0.refuse(info(req, Op::MkNod, parent), |refusal| reply.error(errno(refusal)));
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        self.0.refuse(info(req, Op::MkDir, parent), |refusal| reply.error(errno(refusal)));
    }

    fn unlink(&self, req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::Unlink, parent), |refusal| reply.error(errno(refusal)));
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::RmDir, parent), |refusal| reply.error(errno(refusal)));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        self.0.refuse(info(req, Op::Symlink, parent), |refusal| reply.error(errno(refusal)));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.0.refuse(info(req, Op::Rename, parent), |refusal| reply.error(errno(refusal)));
    }

    fn link(&self, req: &Request, ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        self.0.refuse(info(req, Op::Link, ino), |refusal| reply.error(errno(refusal)));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.0.refuse(info(req, Op::Create, parent), |refusal| reply.error(errno(refusal)));
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.refuse(info(req, Op::Write, ino), |refusal| reply.error(errno(refusal)));
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        self.0.refuse(info(req, Op::FAllocate, ino), |refusal| reply.error(errno(refusal)));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.0.refuse(info(req, Op::CopyFileRange, ino_in), |refusal| reply.error(errno(refusal)));
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.0.refuse(info(req, Op::SetXAttr, ino), |refusal| reply.error(errno(refusal)));
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        self.0.refuse(info(req, Op::GetXAttr, ino), |refusal| reply.error(errno(refusal)));
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, _size: u32, reply: ReplyXattr) {
        self.0.refuse(info(req, Op::ListXAttr, ino), |refusal| reply.error(errno(refusal)));
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.0.refuse(info(req, Op::RemoveXAttr, ino), |refusal| reply.error(errno(refusal)));
    }

    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.0.refuse(info(req, Op::IoCtl, ino), |refusal| reply.error(errno(refusal)));
    }
}
