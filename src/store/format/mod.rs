//! The on-disk format, version 1. No other module encodes or decodes these bytes.
//!
//! `docs/reference/store-format.md` has the byte tables. All numbers are little endian. Every length is bounded before
//! it is used, and every header has its own checksum, so that a decoder returns either a trustworthy value or an
//! [`Invalid`] with the reason.

mod block;
pub mod codec;
pub mod digest;
#[cfg(feature = "internals")]
pub mod erofs;
mod fields;
#[cfg(feature = "internals")]
pub mod firecracker;
pub mod image;
pub mod name;
pub mod pack;
pub mod placement;
#[cfg(feature = "internals")]
pub mod stream;
pub mod superblock;
pub mod template_file;

pub use block::{BLOCK_SHIFT, BLOCK_SIZE, BlockKind, PackId, Stored};
pub use fields::{Invalid, Preamble};
