//! What there is in a mount: nodes, and what is shown of them. Knows neither store nor FUSE.

use stencilfs::store::{Digest, Serving, TagName};
pub use stencilfs::store::{MANIFEST, TOP_NUMBER as ROOT};
use stencilfs::units::Bytes;

/// What an inode number stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// The top.
    Root,
    /// `by-id`.
    ById,
    /// `templates`.
    Templates,
    /// `by-id/<digest>`.
    Template(Digest),
    /// `by-id/<digest>/manifest.json`.
    Manifest(Digest),
    /// `by-id/<digest>/<file>`: which file of the template, and how it is served under this number.
    File(Digest, usize, Serving),
    /// `templates/<name>`.
    Name(String),
    /// `templates/<name>/<tag>`.
    Tag(TagName),
}

/// What kind of thing it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// How long a name may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// Asked again each time: tags move, and a file served by decode may be promoted.
    Not,
    /// Content that has this name has it for ever.
    Long,
}

/// What stat(2) shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length.
    pub size: Bytes,
    /// What it stores: pages that are not zero.
    pub data: Bytes,
    /// When it came into the store, in seconds since 1970.
    pub created: u64,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Position behind it: of the same name in every listing, whatever else comes and goes.
    pub cookie: u64,
    /// Inode number.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
    /// The name.
    pub name: String,
}

impl Node {
    /// The directory that it is in; the top is in itself.
    pub fn parent(&self) -> Node {
        match self {
            Node::Root | Node::ById | Node::Templates => Node::Root,
            Node::Template(_) => Node::ById,
            Node::Manifest(digest) | Node::File(digest, ..) => Node::Template(*digest),
            Node::Name(_) => Node::Templates,
            Node::Tag(tag) => Node::Name(tag.name().to_owned()),
        }
    }

    /// What kind of thing it is.
    pub fn kind(&self) -> Kind {
        match self {
            Node::Root | Node::ById | Node::Templates | Node::Template(_) | Node::Name(_) => Kind::Directory,
            Node::Manifest(_) | Node::File(..) => Kind::File,
            Node::Tag(_) => Kind::Symlink,
        }
    }
}
