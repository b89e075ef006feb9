//! Reading templates: each block is compared with its hash before a byte of it leaves.

#[cfg(feature = "internals")]
pub(super) mod export;
#[cfg(feature = "internals")]
pub(super) mod kernel_image;
#[cfg(feature = "internals")]
pub(super) mod roles;
pub(super) mod scratch;
mod tables;
pub(super) mod template;
pub(super) mod tree;
