//! Servers that are killed, their requests and their readers.

pub mod drill;
pub mod inflight;
pub mod link;
pub mod notify;
pub mod passing;
pub mod readers;
pub mod userfault;
