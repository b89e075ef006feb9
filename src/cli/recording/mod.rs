//! Recordings of the memory of clones, and reports about them.

pub mod record;
pub mod report;
