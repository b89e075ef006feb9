//! The exit record of a clone: exit code or signal, and time. The launch's watchdog writes it into the clone's folder.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{CLONES, Entry};
use crate::control::runtime::{self, MAX_RECORD, trusted_folder};
use crate::sys::exit_status::ExitStatus;

const ENDING: &str = "ending.json";

/// How the process of a clone has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Its exit code; none if a signal ended it, or if the kernel (before Linux 6.15) does not say.
    pub exit_code: Option<u8>,
    /// The signal that ended it.
    pub signal: Option<u8>,
}

impl Ending {
    /// Now.
    pub fn now(status: Option<ExitStatus>) -> Ending {
        let (exit_code, signal) = match status {
            Some(ExitStatus::Code(code)) => (Some(code), None),
            Some(ExitStatus::Signal(signal)) => (None, Some(signal)),
            None => (None, None),
        };
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ending { at, exit_code, signal }
    }

    /// Notes it for a clone.
    ///
    /// # Errors
    /// When the clone's folder is gone, or cannot be written.
    pub fn save(&self, entry: &Entry) -> io::Result<()> {
        let all = runtime::open(CLONES).map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
        let folder = trusted_folder(&all, &entry.id)?;
        runtime::replace(&folder, ENDING, &serde_json::to_vec(self)?)
    }

    /// How the process of a clone has ended; `None` while it lives, or where nobody has noted it.
    pub fn of(entry: &Entry) -> Option<Ending> {
        let all = runtime::open(CLONES).ok()??;
        let folder = trusted_folder(&all, &entry.id).ok()?;
        let text = runtime::read(&folder, ENDING, MAX_RECORD).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|e| log::warn!("{}: {e}", folder.path_of(ENDING).display()))
            .ok()
    }
}
