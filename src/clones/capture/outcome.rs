//! The report of a capture (the template and the state of the VM), and the report of a check.

use std::path::PathBuf;

use serde::Serialize;

use crate::store::Imported;
use crate::units::Bytes;

/// The state of the VM after a capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AfterCapture {
    /// Running if it was running before.
    #[default]
    AsBefore,
    /// Paused.
    Pause,
    /// Terminated.
    Quit,
}

/// The result of a capture.
#[derive(Debug, Serialize)]
pub struct Captured {
    /// The template.
    #[serde(flatten)]
    pub imported: Imported,
    /// Length of the pause in seconds; `null` if the VM was paused before or is paused or terminated now.
    pub pause_seconds: Option<f64>,
    /// True if the RAM files of a QEMU were cloned within their file system, so that the VM ran during the import.
    pub cloned: bool,
    /// Size of the device state.
    pub state_bytes: Bytes,
    /// State of the VM afterwards, as QEMU reports it (`running` or `paused` for Firecracker); `quit` if its VMM was
    /// terminated.
    pub vm: String,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// A finding of the check.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Subject of the finding: `state`, `busy`, `ram`, `device`, `disk`, `option`, `file`, `tool`, `clone`, `settings`.
    pub about: &'static str,
    /// True if the finding prevents a capture.
    pub blocks: bool,
    /// Description of the finding.
    pub what: String,
    /// Advice to the user.
    pub remedy: String,
}

/// The result of the check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Process id of the VMM.
    pub pid: u32,
    /// True if no finding prevents a capture.
    pub can_be_captured: bool,
    /// All findings.
    pub findings: Vec<Finding>,
    /// The directory to run the corrected command in.
    pub directory: PathBuf,
    /// The corrected command line, beginning with the program; empty for a VM that libvirt started and for a
    /// Firecracker.
    pub command: Vec<String>,
}
