//! Files, directories, locks and mounts.

pub mod descriptor;
pub mod directory;
pub mod file_handle;
pub mod file_locks;
pub mod loop_devices;
pub mod mount;
pub mod stream;
pub mod trust;
