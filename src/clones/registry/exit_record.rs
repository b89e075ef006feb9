//! The exit record of a clone: exit code or signal, and time. The launch's watchdog writes it into the clone's
//! directory.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::entry::Entry;
use super::layout::CLONES;
use crate::control::runtime::{self, MAX_RECORD, trusted_folder};
use crate::sys::files::directory::Directory;
use crate::sys::process::exit_status::ExitStatus;

const ENDING: &str = "ending.json";

/// How the process of a clone ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Time of the exit, in seconds since 1970.
    pub at: u64,
    /// Exit code; `None` if a signal ended the process, or if the kernel (before Linux 6.15) does not report the code.
    pub exit_code: Option<u8>,
    /// Number of the signal that ended the process.
    pub signal: Option<u8>,
}

impl Ending {
    /// Creates the exit record of a process that has just ended with this status.
    pub fn now(status: Option<ExitStatus>) -> Ending {
        let (exit_code, signal) = match status {
            Some(ExitStatus::Code(code)) => (Some(code), None),
            Some(ExitStatus::Signal(signal)) => (None, Some(signal)),
            None => (None, None),
        };
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ending { at, exit_code, signal }
    }

    /// Writes the exit record into the clone's directory below the directory of all clones.
    ///
    /// # Errors
    /// Returns an error if the directory does not exist or cannot be written.
    pub fn save(&self, clones: &Directory, id: &str) -> io::Result<()> {
        let directory = trusted_folder(clones, id)?;
        runtime::replace(&directory, ENDING, &serde_json::to_vec(self)?)
    }

    /// Reads the exit record of a clone. Returns `None` if the clone is alive or has no exit record.
    pub fn of(entry: &Entry) -> Option<Ending> {
        let all = runtime::open(CLONES).ok()??;
        let directory = trusted_folder(&all, &entry.id).ok()?;
        let text = runtime::read(&directory, ENDING, MAX_RECORD).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|e| log::warn!("{}: {e}", directory.path_of(ENDING).display()))
            .ok()
    }
}
