//! What the scenarios share.

pub mod host;
