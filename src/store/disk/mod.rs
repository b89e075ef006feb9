//! The directory of a store: paths below it, locks, atomic publication, the header, packs.

pub(super) mod header;
pub(super) mod lock;
pub(super) mod open;
pub(super) mod pack;
pub(super) mod path;
pub(super) mod publish;
pub(super) mod session;
