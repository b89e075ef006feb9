//! The memory that replies leave from: made and locked once, before the server gives up the right to.

use std::sync::{Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memfd::LockedBuffer;
use stencilfs::units::Bytes;

/// Locked memory beside the replies: the pages that a server shares with its supervisor, and room to spare.
const BESIDE: Bytes = Bytes::new(4 << 20);

/// One buffer for each thread that answers reads.
#[derive(Debug)]
pub struct Replies(Mutex<Vec<LockedBuffer>>);

impl Replies {
    /// Locks `count` buffers of `length` bytes. The limit of locked memory is raised where that is allowed; with
    /// CAP_IPC_LOCK none holds, and what is locked now stays so when the capability is given up.
    ///
    /// # Errors
    /// When neither the limit nor a capability allows it.
    pub fn lock(count: usize, length: Bytes) -> Result<Replies> {
        let needed = (length.get() * count as u64).saturating_add(BESIDE.get());
        let now = getrlimit(Resource::Memlock);
        let raised = Rlimit {
            current: now.current.map(|limit| limit.max(needed)),
            maximum: now.maximum.map(|limit| limit.max(needed)),
        };
        if setrlimit(Resource::Memlock, raised).is_err() {
            let _ = setrlimit(Resource::Memlock, Rlimit { current: now.maximum, maximum: now.maximum });
        }
        let buffers: std::io::Result<Vec<_>> = (0..count).map(|_| LockedBuffer::new(length)).collect();
        let buffers = buffers.map_err(|e| {
            Error::failed(format!("cannot lock {count} reply buffers of {length}")).because(e).remedy(
                format!("allow {needed} bytes of locked memory (ulimit -l, LimitMEMLOCK=), or CAP_IPC_LOCK"),
            )
        })?;
        Ok(Replies(Mutex::new(buffers)))
    }

    /// The buffer of a thread that begins to answer; `None` when there are more threads than there were to be.
    pub fn take(&self) -> Option<LockedBuffer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_as_were_asked_for() {
        let replies = Replies::lock(2, Bytes::new(10_000)).unwrap();
        let first = replies.take().unwrap();
        assert_eq!(first.len(), 12_288);
        assert!(replies.take().is_some());
        assert!(replies.take().is_none());
    }
}
