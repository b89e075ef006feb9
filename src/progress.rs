//! Progress of long operations: the operation reports, the command line draws.

use crate::units::Bytes;

/// A receiver of progress reports. Methods are called from several threads.
pub trait Progress: Sync {
    /// Starts a phase. `total` is the size of the phase in bytes, if known.
    fn start(&self, phase: &str, total: Option<Bytes>);
    /// Starts a phase that counts items of a kind, such as `clones`, instead of bytes.
    /// [`advance`](Self::advance) takes one byte per item.
    fn start_count(&self, phase: &str, unit: &'static str, total: u64);
    /// Adds `done` bytes to the current phase.
    fn advance(&self, done: Bytes);
    /// Ends the current phase.
    fn finish(&self);
}

/// Discards all reports.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _phase: &str, _total: Option<Bytes>) {}
    fn start_count(&self, _phase: &str, _unit: &'static str, _total: u64) {}
    fn advance(&self, _done: Bytes) {}
    fn finish(&self) {}
}
