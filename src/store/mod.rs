//! The template store: verified, deduplicated, without stored zeros.
//!
//! The store separates three parts of a template. The *image* is the content: names, sizes and block hashes; its hash
//! is the template's digest. The *placement* locates the blocks in packs, and may be rewritten. The *policy* (mode,
//! owner, labels, recipe) and the tags may be changed. `docs/reference/store-format.md` describes the bytes on disk.

mod disk;
mod format;
#[cfg(all(feature = "cli", any(test, fuzzing)))]
pub(crate) mod fuzz;
#[cfg(feature = "internals")]
mod maintain;
mod names;
mod read;
#[cfg(feature = "internals")]
mod transfer;
#[cfg(feature = "internals")]
mod write;

pub use disk::open::{ContentLock, Store};
pub use disk::path::StorePath;
#[cfg(feature = "internals")]
pub use disk::verified::Proof;
pub use format::BLOCK_SIZE;
pub use format::codec::Compression;
pub use format::digest::Digest;
#[cfg(feature = "internals")]
pub use format::firecracker::FirecrackerState;
pub use format::name::{DEFAULT_TAG, TagName, check_name};
pub use format::template_file::{FileKind, MANIFEST, TemplateFile};
#[cfg(feature = "internals")]
pub use maintain::gc::{Collect, Collected};
#[cfg(feature = "internals")]
pub use maintain::remove::{Refused, Removal, Removed};
#[cfg(feature = "internals")]
pub use maintain::usage::{StoreUsage, TemplateUsage};
#[cfg(feature = "internals")]
pub use maintain::verify::{Affected, Damage, Verified};
pub use names::owner::{Owner, parse_mode};
pub use names::policy::{DEFAULT_MODE, Policy};
pub use names::reference::TemplateRef;
pub use names::serving::{ROOT_INODE, Serving, inode_number, path_inode_number};
#[cfg(feature = "internals")]
pub use names::tags::{Moved, TagEntry};
pub use names::working_set::{DEFAULT_SET, Extent, Extents, FileSet, Used, WorkingSet};
#[cfg(feature = "internals")]
pub use read::export::Target;
#[cfg(feature = "internals")]
pub use read::kernel_image::{KERNEL_IMAGE_FILE, KernelProbe};
#[cfg(feature = "internals")]
pub use read::roles::Roles;
pub use read::scratch::Scratch;
pub use read::template::Template;
#[cfg(feature = "internals")]
pub use transfer::{Incoming, LoadRequest, Loaded, LoadedTemplate, SaveRequest, Saved, SavedTemplate};
#[cfg(feature = "internals")]
pub use write::import::{
    Base, Folder, ImportFile, ImportFormat, ImportRequest, Imported, Later, Recognized, Snapshot, Source,
};

/// Returns a unique name: 32 random hex digits.
///
/// # Errors
/// Returns an error if the kernel's random source cannot be read.
pub fn random_name() -> crate::error::Result<String> {
    disk::publish::random_hex()
}
