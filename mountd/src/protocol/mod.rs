//! The protocol between supervisor and server: messages, named descriptors, the ledger, and the counters.

pub mod fds;
pub mod ledger;
pub mod link;
mod messages;
pub mod named_fds;
pub mod stats;

pub use messages::{Cache, FileKey, MAX_KEYS, Numbered, ServerReply, ServerRequest};

/// First argument of a server that is started while another server serves the mount (a candidate).
pub const BESIDE: &str = "--beside";
