//! What supervisor and server share: messages, descriptors by name, the ledger, the counters.

pub mod fds;
pub mod ledger;
pub mod link;
mod messages;
pub mod named_fds;
pub mod stats;

pub use messages::{Cache, FileKey, MAX_KEYS, Numbered, ServerReply, ServerRequest};

/// First argument of a server that is started beside a server that serves.
pub const BESIDE: &str = "--beside";
