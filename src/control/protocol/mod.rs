//! The data that the processes of a mount send and share: messages, the mount state, the ledger, the in-flight table.

pub(super) mod in_flight;
pub mod ledger;
pub(super) mod messages;
pub(super) mod options;
pub(super) mod snapshot;
pub(super) mod wire;
