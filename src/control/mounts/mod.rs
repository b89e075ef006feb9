//! Mounts: their records, their supervisors, and the requests to them.

pub(super) mod client;
pub(super) mod condemn;
pub(super) mod daemon;
pub(super) mod listing;
pub(super) mod mount_lock;
pub mod places;
pub(super) mod registry;
pub(super) mod residency;
pub(super) mod status;
