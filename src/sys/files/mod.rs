//! Files, directories, locks and mounts.

#[cfg(feature = "internals")]
pub mod descriptor;
pub mod directory;
#[cfg(feature = "internals")]
pub mod erofs;
#[cfg(feature = "internals")]
pub mod file_handle;
pub mod file_locks;
#[cfg(feature = "internals")]
pub mod immutable;
#[cfg(feature = "internals")]
pub mod loop_devices;
#[cfg(feature = "internals")]
pub mod mount;
#[cfg(feature = "internals")]
pub mod private_mounts;
pub mod read_ahead;
#[cfg(feature = "internals")]
pub mod stream;
#[cfg(feature = "internals")]
pub mod trust;
