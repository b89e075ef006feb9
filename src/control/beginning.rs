//! One mount begins at a time: from the look at its place until its record is there for the next one to see.

use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::registry::folder_of_records;
use crate::error::{Error, Result};
use crate::sys::{locks, users};

/// A mount has begun within this time, or hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// The turn of a mount that begins; it ends when this is dropped. No process that is started meanwhile may inherit it.
#[derive(Debug)]
pub struct Beginning {
    _folder: File,
}

impl Beginning {
    /// Waits for its turn.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) where another one does not come to an end; when the runtime
    /// directory cannot be made.
    pub fn wait() -> Result<Beginning> {
        let path = folder_of_records()?;
        let fail = |e| Error::io("cannot lock the records of mounts", &path, e);
        let folder = File::open(&path).map_err(fail)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Beginning { _folder: folder }),
                Err(Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(Duration::from_millis(5)),
                Err(Errno::WOULDBLOCK) => {
                    let who = users::list_pids(&locks::flock_holders(&folder));
                    return Err(Error::try_again(format!(
                        "another mount has been about to begin for {} s: it has locked the records: {who}",
                        PATIENCE.as_secs()
                    ))
                    .at(&path)
                    .remedy("run it again when that one is mounted, or has given up"));
                }
                Err(e) => return Err(fail(e.into())),
            }
        }
    }
}
