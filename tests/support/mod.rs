//! What the scenarios share.

pub mod host;
pub mod qemu_object;
pub mod store;
pub mod tables;
