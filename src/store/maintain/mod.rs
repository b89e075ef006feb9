//! Maintenance of a store: removal, collection, verification, usage.

pub(super) mod gc;
pub(super) mod liveness;
pub(super) mod remove;
pub(super) mod usage;
pub(super) mod verify;
