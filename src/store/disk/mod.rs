//! The directory of a store: paths below it, locks, atomic publication, the header, packs.

pub(super) mod header;
pub(super) mod lock;
pub(super) mod open;
pub(super) mod pack;
pub(super) mod path;
pub(super) mod publish;
#[cfg(feature = "internals")]
pub(super) mod seal;
pub(super) mod session;
#[cfg(feature = "internals")]
pub(super) mod verified;
