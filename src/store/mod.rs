//! The template store: verified, deduplicated, without stored zeros.
//!
//! The store separates three parts of a template. The *image* is the content: names, sizes and block hashes; its hash
//! is the template's digest. The *placement* locates the blocks in packs, and may be rewritten. The *policy* (mode,
//! owner, labels, recipe) and the tags may be changed. `docs/reference/store-format.md` describes the bytes on disk.

mod disk;
mod format;
mod maintain;
mod names;
mod read;
mod transfer;
mod write;

pub use disk::open::{ContentLock, Store};
pub use disk::path::StorePath;
pub use format::BLOCK_SIZE;
pub use format::codec::{ChunkSize, Compression};
pub use format::digest::Digest;
pub use format::name::{DEFAULT_TAG, TagName, check_name};
pub use format::template_file::{FileKind, MANIFEST, TemplateFile};
pub use maintain::gc::{Collect, Collected};
pub use maintain::remove::{Refused, Removal, Removed};
pub use maintain::usage::{StoreUsage, TemplateUsage};
pub use maintain::verify::{Affected, Damage, Verified};
pub use names::owner::{Owner, parse_mode};
pub use names::policy::{DEFAULT_MODE, Policy};
pub use names::reference::TemplateRef;
pub use names::serving::{ROOT_INODE, Serving, inode_number, path_inode_number};
pub use read::export::Target;
pub use read::scratch::Scratch;
pub use read::template::Template;
pub use transfer::{Incoming, LoadRequest, Loaded, LoadedTemplate, Moved, SaveRequest, Saved, SavedTemplate};
pub use write::import::firecracker::FirecrackerState;
pub use write::import::{ImportFile, ImportFormat, ImportRequest, Imported, Later, Source};

/// Returns a unique name: 32 random hex digits.
///
/// # Errors
/// Returns an error if the kernel's random source cannot be read.
pub fn random_name() -> crate::error::Result<String> {
    disk::publish::random_hex()
}
