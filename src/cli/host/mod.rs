//! Commands about the host and the installation.

mod check;
pub(super) mod doctor;
pub(super) mod generate;
mod kernel;
pub(super) mod version;
