//! Capture of running VMs.

pub mod check;
pub mod failures;
pub mod meddled;
pub mod peer;
pub mod qemu;
pub mod replaced;
pub mod settings;
