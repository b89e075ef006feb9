//! Locks of a store: files in `locks/`, locked with flock(2).

use std::fmt;
use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::path::StorePath;
use crate::error::{Error, Result};
use crate::sys::{locks, users};

/// Time between two attempts to take a lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Waits that last longer are logged.
const LOG_AFTER: Duration = Duration::from_secs(1);

/// Longest wait for a lock that is held for moments only.
const MAX_SHORT_WAIT: Duration = Duration::from_secs(30);

/// A locked file; the kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code)] File);

/// The processes that hold a lock.
pub(super) struct Holders<'a>(pub &'a File);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another command that writes to the store")?;
        match &locks::flock_holders(self.0)[..] {
            [] => Ok(()),
            pids => write!(f, " (process {})", users::list_pids(pids)),
        }
    }
}

impl Lock {
    /// Waits for the lock, alone or shared, for as long as `go_on` says so: others may hold it for hours.
    pub fn wait_while(
        path: &StorePath,
        shared: bool,
        mut go_on: impl FnMut(&File) -> Result<()>,
    ) -> Result<Lock> {
        let file = path.open_or_create().map_err(|e| path.error("cannot open the lock", e))?;
        let operation = match shared {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Lock(file)),
                Err(Errno::INTR | Errno::WOULDBLOCK) => go_on(&file)?,
                Err(e) => return Err(path.error("cannot lock", e.into())),
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Waits for a lock that is held for moments only, as long as `go_on` says so. A process that holds it longer is
    /// named in the error.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code) after [`MAX_SHORT_WAIT`].
    pub fn wait(path: &StorePath, go_on: impl Fn() -> Result<()>) -> Result<Lock> {
        let begun = Instant::now();
        let mut logged = false;
        Lock::wait_while(path, false, |file| {
            if begun.elapsed() > MAX_SHORT_WAIT {
                let waited = MAX_SHORT_WAIT.as_secs();
                return Err(Error::try_again(format!("{} has held the lock for {waited} s", Holders(file)))
                    .at(path)
                    .remedy("run it again when that process has ended"));
            }
            if !logged && begun.elapsed() > LOG_AFTER {
                logged = true;
                log::warn!("waiting for {}", Holders(file));
            }
            go_on()
        })
    }
}
