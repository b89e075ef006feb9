//! Logs as JSON.

pub mod json_log;
