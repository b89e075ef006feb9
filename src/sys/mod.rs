//! Interfaces to the kernel: the only unsafe code of the library, one kernel interface per file.
//! Callers receive an errno as [`std::io::Error`] or as an [`Error`](crate::error::Error) with its code and remedy.
#![allow(unsafe_code)]

pub mod address_space;
pub mod alloc;
pub mod attempt;
pub mod cachestat;
pub mod cgroup;
pub mod clock;
pub mod descriptor;
pub mod exit_status;
pub mod folder;
pub mod fuse_dev;
pub mod fusectl;
pub mod handle;
pub mod inherited;
pub mod kpage;
pub mod locks;
pub mod loops;
pub mod map_file;
pub mod mapping;
pub mod memfd;
pub mod mount;
pub mod pagemap;
pub mod pause;
pub mod peer;
pub mod probe;
pub mod process;
mod process_id;
pub mod procfs;
pub mod stream;
pub mod tasks;
pub mod threads;
pub mod trust;
pub mod unix_socket;
pub mod users;
pub mod wait;
