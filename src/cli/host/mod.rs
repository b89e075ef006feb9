//! Commands about the host and the installation.

pub(super) mod doctor;
pub(super) mod generate;
