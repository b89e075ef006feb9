//! Packages and units.

pub mod packages;
pub mod systemd;
