//! A thin adapter from FUSE requests to the tree and the two ways to serve. Makes no decisions.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use stencilfs::control::{Op, RequestInfo};
use stencilfs::store::Serving;

use crate::protocol::stats::{Counter, Stats};
use crate::server::attr::{PAGE, attr, kind};
use crate::server::condemned::Condemned;
use crate::server::decode::MAX_READ;
use crate::server::in_flight::{Flight, Flights};
use crate::server::node::{NameLifetime, Node};
use crate::server::passthrough::{Opening, Passthrough};
use crate::server::read::Reader;
use crate::server::refusal::Refusal;
use crate::server::store_outage::StoreOutage;
use crate::server::tree::Tree;

/// Validity of entries whose content never changes. Limits how long the kernel keeps the entries of a removed template.
const ENTRY_TTL: Duration = Duration::from_secs(3600);

/// Validity of attributes: the policy in the store may change mode and owner.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);

/// Most pending background requests of the kernel (`max_background`): readahead of many clones at once.
const MAX_BACKGROUND: u16 = 128;

/// The file system, as fuser calls it.
#[derive(Debug)]
pub struct Templates {
    /// Names, attributes and inode numbers.
    pub tree: Arc<Tree>,
    /// Answers READs.
    pub reader: Arc<Reader>,
    /// READs that wait for the store.
    pub source: Arc<StoreOutage>,
    /// Backings, and opens that wait for them.
    pub passthrough: Arc<Passthrough>,
    /// Condemned templates.
    pub condemned: Arc<Condemned>,
    /// Counters.
    pub stats: Stats,
    /// Pending requests.
    pub flights: &'static Flights,
}

impl Templates {
    fn refuse(&self, refusal: Refusal) -> Errno {
        match refusal {
            Refusal::Damaged => self.stats.count(Counter::Damaged),
            Refusal::Failed | Refusal::NoSpace => self.stats.count(Counter::Failed),
            Refusal::Away => {
                self.source.note_outage();
                self.stats.count(Counter::Failed);
            }
            Refusal::Writes | Refusal::Policy => self.stats.count(Counter::WritesRefused),
            Refusal::NoEntry
            | Refusal::Stale
            | Refusal::NotDirectory
            | Refusal::IsDirectory
            | Refusal::Invalid
            | Refusal::NoPosition
            | Refusal::Crowded
            | Refusal::Unsupported => {}
        }
        refusal.errno()
    }

    /// Returns the node of a file that may be opened.
    fn openable(&self, ino: INodeNo) -> Result<Node, Refusal> {
        let node = self.tree.node(ino.0)?;
        match node {
            Node::File(digest, ..) | Node::Manifest(digest) if self.tree.gone(&digest)? => {
                Err(Refusal::Stale)
            }
            Node::File(..) | Node::Manifest(_) => Ok(node),
            Node::Tag(_) => Err(Refusal::Invalid),
            _ => Err(Refusal::IsDirectory),
        }
    }

    fn take(&self, req: &Request, op: Op, ino: INodeNo) -> Flight {
        self.take_range(req, op, ino, 0, 0)
    }

    fn take_range(&self, req: &Request, op: Op, ino: INodeNo, offset: u64, size: u32) -> Flight {
        self.flights.take(RequestInfo { unique: req.unique().0, op, ino: ino.0, offset, size })
    }
}

/// Refuses a request, in general one that would change something.
macro_rules! refuse_writes {
    ($self:ident, $req:ident, $op:ident, $ino:ident, $reply:ident, $why:expr) => {{
        let flight = $self.take($req, Op::$op, $ino);
        flight.replying();
        $reply.error($self.refuse($why));
    }};
}

impl Filesystem for Templates {
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
        // One level: the kernel rejects a backing on a file system that is itself stacked (overlayfs).
        let _ = config.set_max_stack_depth(1);
        let _ = config.set_max_write(u32::try_from(MAX_READ).unwrap_or(u32::MAX));
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let flight = self.take(req, Op::Lookup, parent);
        self.stats.count(Counter::Lookups);
        let _guard = self.condemned.guard();
        let found = self.tree.lookup(parent.0, name, &*self.passthrough);
        flight.replying();
        match found {
            Ok((attributes, lifetime)) => {
                let entry_ttl = match lifetime {
                    NameLifetime::Zero => Duration::ZERO,
                    NameLifetime::Long => ENTRY_TTL,
                };
                reply.entry_with_ttls(&ATTRIBUTE_TTL, &entry_ttl, &attr(&attributes), Generation(0));
            }
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let flight = self.take(req, Op::GetAttr, ino);
        let found = self.tree.attributes(ino.0);
        flight.replying();
        match found {
            Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attr(&attributes)),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let flight = self.take(req, Op::ReadLink, ino);
        let found = self.tree.read_link(ino.0);
        flight.replying();
        match found {
            Ok(target) => reply.data(target.as_bytes()),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let flight = self.take(req, Op::Open, ino);
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            self.stats.count(Counter::OpensRefused);
            flight.replying();
            reply.error(Refusal::Writes.errno());
            return;
        }
        let _guard = self.condemned.guard();
        let openable = self.openable(ino);
        if let Ok(Node::File(digest, ..)) = &openable {
            self.condemned.opened(digest);
        }
        let refusal = match openable {
            Ok(Node::File(digest, file, Serving::Passthrough)) => match self.tree.template(&digest) {
                // Replies later if the backing has to be made first.
                Ok(template) => return self.passthrough.open(&template, file, Opening::new(reply, flight)),
                Err(refusal) => refusal,
            },
            Ok(node) => {
                if matches!(node, Node::File(..)) {
                    self.stats.count(Counter::OpensDecode);
                }
                flight.replying();
                return reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(refusal) => refusal,
        };
        flight.replying();
        reply.error(self.refuse(refusal));
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
        let flight = self.take_range(req, Op::Read, ino, offset, size);
        let mut unsent = Some(reply);
        let done = self.reader.read(&flight, |bytes| {
            if let Some(reply) = unsent.take() {
                reply.data(bytes);
            }
        });
        let (Err(refusal), Some(reply)) = (done, unsent) else { return };
        if refusal == Refusal::Away {
            // Replies later, when the store can be reached again.
            return self.source.wait(flight, reply);
        }
        flight.replying();
        reply.error(self.refuse(refusal));
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
        let flight = self.take(req, Op::LSeek, ino);
        let found = match self.tree.node(ino.0) {
            Ok(Node::File(digest, file, _)) => self
                .tree
                .template(&digest)
                .and_then(|t| crate::server::decode::seek(&t, file, offset, whence)),
            Ok(_) => Err(Refusal::Unsupported),
            Err(refusal) => Err(refusal),
        };
        flight.replying();
        match found {
            Ok(position) => reply.offset(position),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let flight = self.take(req, Op::ReadDir, ino);
        let found = self.tree.list(ino.0, offset, &*self.passthrough);
        flight.replying();
        match found {
            Ok(entries) => {
                for entry in entries {
                    if reply.add(INodeNo(entry.ino), entry.cookie, kind(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    fn statfs(&self, req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let flight = self.take(req, Op::StatFs, ino);
        let found = self.tree.totals();
        flight.replying();
        match found {
            Ok((templates, data)) => {
                reply.statfs(data.pages().get(), 0, 0, templates, 0, PAGE, 255, PAGE);
            }
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
    }

    // Nothing to flush: after ENOSYS the kernel no longer sends these requests.
    fn flush(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        refuse_writes!(self, req, Flush, ino, reply, Refusal::Unsupported);
    }

    fn fsync(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        refuse_writes!(self, req, FSync, ino, reply, Refusal::Unsupported);
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        refuse_writes!(self, req, FSyncDir, ino, reply, Refusal::Unsupported);
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
        refuse_writes!(
            self,
            req,
            SetAttr,
            ino,
            reply,
            if size.is_some() { Refusal::Writes } else { Refusal::Policy }
        );
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
        refuse_writes!(self, req, MkNod, parent, reply, Refusal::Writes);
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
        refuse_writes!(self, req, MkDir, parent, reply, Refusal::Writes);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, req, Unlink, parent, reply, Refusal::Writes);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, req, RmDir, parent, reply, Refusal::Writes);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        refuse_writes!(self, req, Symlink, parent, reply, Refusal::Writes);
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
        refuse_writes!(self, req, Rename, parent, reply, Refusal::Writes);
    }

    fn link(&self, req: &Request, ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        refuse_writes!(self, req, Link, ino, reply, Refusal::Writes);
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
        refuse_writes!(self, req, Create, parent, reply, Refusal::Writes);
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
        refuse_writes!(self, req, Write, ino, reply, Refusal::Writes);
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
        refuse_writes!(self, req, FAllocate, ino, reply, Refusal::Writes);
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
        refuse_writes!(self, req, CopyFileRange, ino_in, reply, Refusal::Unsupported);
    }

    // No extended attributes and no ioctls: after ENOSYS the kernel itself returns EOPNOTSUPP and ENOTTY.
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
        refuse_writes!(self, req, SetXAttr, ino, reply, Refusal::Unsupported);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        refuse_writes!(self, req, GetXAttr, ino, reply, Refusal::Unsupported);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, _size: u32, reply: ReplyXattr) {
        refuse_writes!(self, req, ListXAttr, ino, reply, Refusal::Unsupported);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, req, RemoveXAttr, ino, reply, Refusal::Unsupported);
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
        refuse_writes!(self, req, IoCtl, ino, reply, Refusal::Unsupported);
    }
}
