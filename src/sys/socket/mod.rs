//! Unix sockets.

pub mod peer;
pub mod unix;
