//! The thin adapter: requests of the kernel to the tree and the two ways to serve. Decides nothing itself.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use stencilfs::store::{Digest, Serving};
use stencilfs::units::PAGE_SIZE;

use crate::decode::{Decoder, MAX_READ};
use crate::errno::Refusal;
use crate::passthrough::{Opening, Passthrough};
use crate::stats::{Counter, Stats};
use crate::tree::{Attributes, Kind, Lasting, Node, Tree};

/// Names of content are true for ever; an hour bounds what a removed template leaves in the kernel.
const LONG: Duration = Duration::from_secs(3600);

/// Mode and owner are policy and may change: they are asked for again after a second.
const ATTRIBUTES: Duration = Duration::from_secs(1);

/// Requests that the kernel may have in flight in the background: readahead of many clones at once.
const MAX_BACKGROUND: u16 = 128;

/// The filesystem, as fuser calls it.
#[derive(Debug)]
pub struct Templates {
    tree: Arc<Tree>,
    decoder: Decoder,
    passthrough: Arc<Passthrough>,
    stats: Stats,
}

impl Templates {
    /// Serves that tree.
    pub fn new(tree: Arc<Tree>, decoder: Decoder, passthrough: Arc<Passthrough>, stats: Stats) -> Templates {
        Templates { tree, decoder, passthrough, stats }
    }

    fn refuse(&self, refusal: Refusal) -> Errno {
        match refusal {
            Refusal::Damaged => self.stats.count(Counter::Damaged),
            Refusal::Failed | Refusal::NoSpace => self.stats.count(Counter::Failed),
            Refusal::Writes | Refusal::Policy => self.stats.count(Counter::WritesRefused),
            Refusal::NoEntry
            | Refusal::Stale
            | Refusal::NotDirectory
            | Refusal::IsDirectory
            | Refusal::Invalid
            | Refusal::NoPosition
            | Refusal::Unsupported => {}
        }
        refusal.errno()
    }

    fn read_file(
        &self,
        digest: &Digest,
        file: usize,
        offset: u64,
        size: u32,
        mut send: impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let template = self.tree.template(digest)?;
        match self.decoder.read(&template, file, offset, size as usize, &mut send) {
            Err(refusal) if !self.tree.gone(digest) => {
                // Its blocks may have been moved since it was opened; a second failure is the answer.
                let template = self.tree.reopen(digest).map_err(|_| refusal)?;
                self.decoder.read(&template, file, offset, size as usize, &mut send)
            }
            done => done,
        }
    }

    fn answered(&self) {
        self.stats.count(Counter::Answers);
    }
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
        perm: attributes.mode as u16,
        nlink: if attributes.kind == Kind::Directory { 2 } else { 1 },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: PAGE_SIZE as u32,
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

/// Answers a request that would change something, whatever it is.
macro_rules! refuse_writes {
    ($self:ident, $reply:ident, $why:expr) => {{
        $reply.error($self.refuse($why));
        $self.answered();
    }};
}

impl Filesystem for Templates {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is optional for us; what an old kernel lacks is simply not asked for. The reply must be the same from
        // every server of a mount: it depends on nothing but the kernel's request.
        for flag in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PASSTHROUGH,
        ] {
            let _ = config.add_capabilities(flag);
        }
        // One level: a backing on a filesystem that is itself stacked (overlayfs) is refused by the kernel.
        let _ = config.set_max_stack_depth(1);
        let _ = config.set_max_write(MAX_READ as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.stats.count(Counter::Lookups);
        match self.tree.lookup(parent.0, name, &*self.passthrough) {
            Ok((attributes, lasting)) => {
                let names = match lasting {
                    Lasting::Not => Duration::ZERO,
                    Lasting::Long => LONG,
                };
                reply.entry_with_ttls(&ATTRIBUTES, &names, &attr(&attributes), Generation(0));
            }
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.attributes(ino.0) {
            Ok(attributes) => reply.attr(&ATTRIBUTES, &attr(&attributes)),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.tree.read_link(ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            self.stats.count(Counter::OpensRefused);
            reply.error(Refusal::Writes.errno());
            return self.answered();
        }
        let stateless = FileHandle(0);
        match self.tree.node(ino.0) {
            Ok(Node::File(digest, ..) | Node::Manifest(digest)) if self.tree.gone(&digest) => {
                reply.error(self.refuse(Refusal::Stale));
            }
            Ok(Node::Manifest(_)) => reply.opened(stateless, FopenFlags::FOPEN_KEEP_CACHE),
            Ok(Node::File(_, _, Serving::Decode)) => {
                self.stats.count(Counter::OpensDecode);
                reply.opened(stateless, FopenFlags::FOPEN_KEEP_CACHE);
            }
            Ok(Node::File(digest, file, Serving::Passthrough)) => match self.tree.template(&digest) {
                // It answers later, when the backing has to be made first.
                Ok(template) => self.passthrough.open(&template, file, Opening::new(reply)),
                Err(refusal) => reply.error(self.refuse(refusal)),
            },
            Ok(Node::Tag(_)) => reply.error(self.refuse(Refusal::Invalid)),
            Ok(_) => reply.error(self.refuse(Refusal::IsDirectory)),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut reply = Some(reply);
        let mut send = |bytes: &[u8]| {
            if let Some(reply) = reply.take() {
                reply.data(bytes);
            }
        };
        let done = match self.tree.node(ino.0) {
            Ok(Node::File(digest, file, _)) => self.read_file(&digest, file, offset, size, &mut send),
            Ok(Node::Manifest(digest)) => self.tree.template(&digest).map(|template| {
                let text = template.manifest_json();
                let begin = (offset as usize).min(text.len());
                let end = begin.saturating_add(size as usize).min(text.len());
                send(&text.as_bytes()[begin..end]);
            }),
            Ok(_) => Err(Refusal::IsDirectory),
            Err(refusal) => Err(refusal),
        };
        if let (Err(refusal), Some(reply)) = (done, reply) {
            reply.error(self.refuse(refusal));
        }
        self.answered();
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = match self.tree.node(ino.0) {
            Ok(Node::File(digest, file, _)) => {
                self.tree.template(&digest).and_then(|t| crate::decode::seek(&t, file, offset, whence))
            }
            Ok(_) => Err(Refusal::Unsupported),
            Err(refusal) => Err(refusal),
        };
        match found {
            Ok(position) => reply.offset(position),
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        match self.tree.list(ino.0, offset, &*self.passthrough) {
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
        self.answered();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.tree.totals() {
            Ok((templates, data)) => {
                let page = PAGE_SIZE as u32;
                reply.statfs(data.pages().get(), 0, 0, templates, 0, page, 255, page);
            }
            Err(refusal) => reply.error(self.refuse(refusal)),
        }
        self.answered();
    }

    // Closing and syncing change nothing: the kernel asks once, hears that there is nothing to do, and stops asking.
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
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
        refuse_writes!(self, reply, if size.is_some() { Refusal::Writes } else { Refusal::Policy });
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        refuse_writes!(self, reply, Refusal::Writes);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    // No extended attributes and no ioctls: ENOSYS makes the kernel answer EOPNOTSUPP and ENOTTY itself from then on.
    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        refuse_writes!(self, reply, Refusal::Unsupported);
    }
}
