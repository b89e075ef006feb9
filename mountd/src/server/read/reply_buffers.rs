//! Buffers for replies, allocated and locked before the server gives up the privilege to lock memory.

use std::sync::{Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memory::memfd::LockedBuffer;
use stencilfs::units::Bytes;

/// Locked memory for other purposes: the pages that a server shares with its supervisor, and a reserve.
const OTHER_LOCKED: Bytes = Bytes::new(4 << 20);

/// One buffer for each thread that answers READs.
#[derive(Debug)]
pub struct Replies(Mutex<Vec<LockedBuffer>>);

impl Replies {
    /// Locks `count` buffers of `length` bytes. Raises the limit on locked memory if possible. With CAP_IPC_LOCK no
    /// limit applies, and memory that is locked stays locked when the capability is dropped.
    ///
    /// # Errors
    /// Returns an error if neither the limit nor a capability allows locking so much memory.
    pub fn lock(count: usize, length: Bytes) -> Result<Replies> {
        let needed = (length.get() * count as u64).saturating_add(OTHER_LOCKED.get());
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
            Error::failed(format!("cannot lock {count} reply buffers of {length}")).because(e).hint(format!(
                "allow {needed} bytes of locked memory (ulimit -l, LimitMEMLOCK=), or grant CAP_IPC_LOCK"
            ))
        })?;
        Ok(Replies(Mutex::new(buffers)))
    }

    /// Returns the buffer for a thread; `None` if all buffers are taken.
    pub fn take(&self) -> Option<LockedBuffer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_each_buffer_once() {
        let replies = Replies::lock(2, Bytes::new(10_000)).unwrap();
        let first = replies.take().unwrap();
        assert_eq!(first.len(), 12_288);
        assert!(replies.take().is_some());
        assert!(replies.take().is_none());
    }
}
