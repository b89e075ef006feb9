//! Serializes the startup of mounts: from the check of the mountpoint until the record of the new mount is written.

use std::time::Duration;

use super::registry::MOUNTS;
use crate::control::runtime;
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::sys::process::holders;

/// Longest time that a startup may hold the lock before other startups give up.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The lock on the records of mounts, held during a startup and released on drop. A process that is started meanwhile
/// must not inherit the descriptor.
#[derive(Debug)]
pub struct MountLock {
    _records: Directory,
}

impl MountLock {
    /// Waits for the lock.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if another startup holds the lock for longer than 10
    /// seconds, and an error if the runtime directory cannot be created.
    pub fn acquire() -> Result<MountLock> {
        // Mode 0700: other users can neither open nor lock the directory.
        let records = runtime::create(MOUNTS)?;
        match file_locks::wait(&records, true, STARTUP_TIMEOUT, || false) {
            Ok(true) => Ok(MountLock { _records: records }),
            Ok(false) => {
                let holders = holders::list_pids(&file_locks::flock_holders(&records));
                Err(Error::try_again(format!(
                    "timed out after {} s waiting for the startup of another mount: the mount records are locked by \
                     {holders}",
                    STARTUP_TIMEOUT.as_secs()
                ))
                .at(records.path())
                .hint("retry when the other mount has started or failed"))
            }
            Err(e) => Err(Error::io("cannot lock the mount records", records.path(), e)),
        }
    }
}
