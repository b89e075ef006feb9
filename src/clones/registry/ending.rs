//! How the process of a clone ended: exit code or signal, and time.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::sys::process::exit_status::ExitStatus;

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
}
