//! Code that the scenarios share.

pub mod actor;
pub mod debian;
pub mod drill;
pub mod guest;
pub mod holder;
pub mod host;
pub mod hosts;
pub mod imports;
pub mod inflight;
pub mod kvm;
pub mod libvirt;
pub mod link;
pub mod mount;
pub mod notify;
pub mod object_files;
pub mod page;
pub mod passing;
pub mod qemu_object;
pub mod readers;
pub mod session;
pub mod store;
pub mod stream;
pub mod svg;
pub mod tables;
pub mod userfault;
