//! FUSE: the parts of its protocol and of its control file system that no crate covers.

pub mod control_fs;
pub mod device;
