//! Converts attributes of nodes to the types of fuser.

use std::time::{Duration, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use stencilfs::units::PAGE_SIZE;

use crate::server::node::{Attributes, Kind};

/// [`PAGE_SIZE`] as FUSE encodes block sizes.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
pub const PAGE: u32 = PAGE_SIZE as u32;

/// Converts the attributes of a node.
pub fn attr(attributes: &Attributes) -> FileAttr {
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

/// Converts the kind of a node.
pub fn kind(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}
