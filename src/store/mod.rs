//! The template store: verified, deduplicated, without stored zeros.
//!
//! The store separates three parts of a template. The *image* is the content: names, sizes and block hashes; its hash
//! is the template's digest. The *placement* locates the blocks in packs, and may be rewritten. The *policy* (mode,
//! owner, labels, recipe) and the tags may be changed. `docs/reference/store-format.md` describes the bytes on disk.

mod census;
mod codec;
mod commit;
mod digest;
mod export;
mod firecracker;
mod format;
mod gc;
mod header;
mod image;
mod import;
mod known;
mod lock;
mod open;
mod ordered;
mod owner;
mod pack;
mod pack_writer;
mod path;
mod policy;
mod publish;
mod reference;
mod remove;
mod scratch;
mod serving;
mod session;
mod silence;
mod tables;
mod tags;
mod template;
mod travel;
mod tree;
mod usage;
mod verify;

pub use codec::{ChunkSize, Compression};
pub use digest::Digest;
pub use export::Target;
pub use firecracker::FirecrackerState;
pub use gc::{Collect, Collected};
pub use image::{FileKind, MANIFEST, TemplateFile};
pub use import::{ImportFile, ImportFormat, ImportRequest, Imported, Later, Source};
pub use open::{ContentHold, Store};
pub use owner::{Owner, parse_mode};
pub use path::StorePath;
pub use policy::{DEFAULT_MODE, Policy};
pub use reference::{DEFAULT_TAG, TagName, TemplateRef, check_name};
pub use remove::{Refused, Removal, Removed};
pub use scratch::Scratch;
pub use serving::{Serving, TOP_NUMBER, inode_number, path_number};
pub use tags::TagEntry;
pub use template::Template;
pub use travel::{Incoming, LoadRequest, Loaded, LoadedTemplate, Moved, SaveRequest, Saved, SavedTemplate};
pub use usage::{StoreUsage, TemplateUsage};
pub use verify::{Affected, Damage, Verified};

/// Returns a unique name: 32 random hex digits.
///
/// # Errors
/// Returns an error if the kernel's random source cannot be read.
pub fn random_name() -> crate::error::Result<String> {
    publish::random_hex()
}

/// Block size in bytes: the unit of hashing, verification and reading.
pub const BLOCK_SIZE: u64 = 1 << format::BLOCK_SHIFT;
