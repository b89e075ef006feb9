//! Locks of a store: files in `locks/`, locked with flock(2).

use std::fmt;
use std::fs::File;
use std::time::{Duration, Instant};

use super::path::StorePath;
use crate::error::{Error, Result};
use crate::sys::files::file_locks;
use crate::sys::process::holders;

/// Longer waits are logged.
const LOG_AFTER: Duration = Duration::from_secs(1);

/// Timeout for a lock that is held for short times only.
const MAX_SHORT_WAIT: Duration = Duration::from_secs(30);

/// A locked file. The kernel releases the lock when the process ends, in whatever way.
#[derive(Debug)]
pub(in crate::store) struct Lock(#[allow(dead_code)] File);

/// Formats the holders of a flock(2) lock for messages.
pub(in crate::store) struct Holders<'a>(pub &'a File);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another command that writes to the store")?;
        match &file_locks::flock_holders(self.0)[..] {
            [] => Ok(()),
            pids @ [_] => write!(f, " (process {})", holders::list_pids(pids)),
            pids => write!(f, " (processes {})", holders::list_pids(pids)),
        }
    }
}

impl Lock {
    /// Waits for the lock, exclusive or `shared`. The wait has no timeout, and ends when `check` returns an error.
    /// Other processes may hold the lock for hours.
    pub fn wait_while(
        path: &StorePath,
        shared: bool,
        mut check: impl FnMut(&File) -> Result<()>,
    ) -> Result<Lock> {
        let file = path.open_or_create().map_err(|e| path.error("cannot open lock", e))?;
        file_locks::wait_while(&file, !shared, || check(&file))
            .map_err(|e| path.error("cannot lock", e))??;
        Ok(Lock(file))
    }

    /// Waits for an exclusive lock that is held for short times only. The wait ends when `check` returns an error.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code) after [`MAX_SHORT_WAIT`], with the holder of the lock.
    pub fn wait(path: &StorePath, check: impl Fn() -> Result<()>) -> Result<Lock> {
        let started = Instant::now();
        let mut logged = false;
        Lock::wait_while(path, false, |file| {
            if started.elapsed() > MAX_SHORT_WAIT {
                let waited = MAX_SHORT_WAIT.as_secs();
                return Err(Error::try_again(format!(
                    "timed out after {waited} s waiting for {}",
                    Holders(file)
                ))
                .at(path)
                .hint("run the command again after that process has ended"));
            }
            if !logged && started.elapsed() > LOG_AFTER {
                logged = true;
                log::warn!("waiting for {}", Holders(file));
            }
            check()
        })
    }
}
