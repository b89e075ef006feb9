//! Progress of long work, seen from the inside: the work reports, the command line draws.

use crate::units::Bytes;

/// Something that watches long work. Called from several threads.
pub trait Progress: Sync {
    /// A phase begins; `total` is its size in bytes where that is known.
    fn start(&self, phase: &str, total: Option<Bytes>);
    /// A phase begins that counts things instead of bytes; each is then one byte of [`advance`](Self::advance).
    fn start_count(&self, phase: &str, total: u64);
    /// So many more bytes of the phase are done.
    fn advance(&self, done: Bytes);
    /// The phase has ended.
    fn finish(&self);
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _phase: &str, _total: Option<Bytes>) {}
    fn start_count(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _done: Bytes) {}
    fn finish(&self) {}
}
