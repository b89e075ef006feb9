//! One mount begins at a time: from the look at its place until its record is there for the next one to see.

use std::time::Duration;

use super::registry::MOUNTS;
use super::runtime;
use crate::error::{Error, Result};
use crate::sys::folder::Folder;
use crate::sys::{locks, users};

/// A mount has begun within this time, or hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// The turn of a mount that begins; it ends when this is dropped. No process that is started meanwhile may inherit it.
#[derive(Debug)]
pub struct Beginning {
    _folder: Folder,
}

impl Beginning {
    /// Waits for its turn.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) where another one does not come to an end; when the runtime
    /// directory cannot be made.
    pub fn wait() -> Result<Beginning> {
        // Only its owner can open it, and lock it.
        let folder = runtime::create(MOUNTS)?;
        match locks::wait(&folder, true, PATIENCE, || false) {
            Ok(true) => Ok(Beginning { _folder: folder }),
            Ok(false) => {
                let holders = users::list_pids(&locks::flock_holders(&folder));
                Err(Error::try_again(format!(
                    "another mount has been about to begin for {} s: it has locked the records: {holders}",
                    PATIENCE.as_secs()
                ))
                .at(folder.path())
                .remedy("run it again when that one is mounted, or has given up"))
            }
            Err(e) => Err(Error::io("cannot lock the records of mounts", folder.path(), e)),
        }
    }
}
