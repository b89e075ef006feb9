//! Reasons to stop an import.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};

/// Reasons to stop the pipeline: an interrupt, or a failure in another thread.
pub(super) struct Stop<'a> {
    pub failed: AtomicBool,
    pub interrupt: Option<&'a AtomicBool>,
    /// Longest time without bytes from a pipe.
    pub stall: Option<Duration>,
}

impl Stop<'_> {
    pub fn check(&self) -> Result<()> {
        if self.interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
            return Err(Error::failed("interrupted; nothing was imported"));
        }
        match self.failed.load(Ordering::Relaxed) {
            true => Err(Error::failed("stopped, because another thread of the import failed")),
            false => Ok(()),
        }
    }
}
