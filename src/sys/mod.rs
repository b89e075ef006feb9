//! Interfaces to the kernel: the only unsafe code of the library, one kernel interface per file.
//! Callers receive an errno as [`std::io::Error`] or as an [`Error`](crate::error::Error) with its code and remedy.
#![allow(unsafe_code)]

#[cfg(feature = "internals")]
pub mod clock;
pub mod files;
#[cfg(feature = "internals")]
pub mod fuse;
#[cfg(feature = "internals")]
pub mod limits;
pub mod memory;
pub mod poll;
pub mod probe;
pub mod process;
#[cfg(feature = "internals")]
pub mod socket;
