//! Nodes of a mount and their attributes, independent of store and FUSE.

use stencilfs::store::{Digest, Serving, TagName};
pub use stencilfs::store::{MANIFEST, ROOT_INODE as ROOT};
use stencilfs::units::Bytes;

/// The object that an inode number stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// The root directory.
    Root,
    /// `by-id`.
    ById,
    /// `templates`.
    Templates,
    /// `by-id/<digest>`.
    Template(Digest),
    /// `by-id/<digest>/manifest.json`.
    Manifest(Digest),
    /// `by-id/<digest>/<file>`: index of the file in the template, and how this inode number is served.
    File(Digest, usize, Serving),
    /// `templates/<name>`.
    Name(String),
    /// `templates/<name>/<tag>`.
    Tag(TagName),
}

/// Type of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// How long the kernel may cache a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameLifetime {
    /// Zero: tags may move, and a file that is served by decode may get a backing.
    Zero,
    /// Long: the content of the named file never changes.
    Long,
}

/// Attributes for stat(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// Type.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length, in bytes.
    pub size: Bytes,
    /// Bytes that are stored: pages that are not zero.
    pub data: Bytes,
    /// Time of the import, in seconds since 1970.
    pub created: u64,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Position after the entry. Depends on the name only, so that a listing can continue after other names have
    /// changed.
    pub cookie: u64,
    /// Inode number.
    pub ino: u64,
    /// Type.
    pub kind: Kind,
    /// Name.
    pub name: String,
}

impl Node {
    /// Returns the parent directory; the root is its own parent.
    pub fn parent(&self) -> Node {
        match self {
            Node::Root | Node::ById | Node::Templates => Node::Root,
            Node::Template(_) => Node::ById,
            Node::Manifest(digest) | Node::File(digest, ..) => Node::Template(*digest),
            Node::Name(_) => Node::Templates,
            Node::Tag(tag) => Node::Name(tag.name().to_owned()),
        }
    }

    /// Returns the type.
    pub fn kind(&self) -> Kind {
        match self {
            Node::Root | Node::ById | Node::Templates | Node::Template(_) | Node::Name(_) => Kind::Directory,
            Node::Manifest(_) | Node::File(..) => Kind::File,
            Node::Tag(_) => Kind::Symlink,
        }
    }
}
