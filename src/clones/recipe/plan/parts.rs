//! Input and result types of the command line conversion.

use std::path::PathBuf;

use crate::clones::recipe::disks::PlannedDisk;
use crate::clones::recipe::host::LiveDisk;
use crate::clones::recipe::libvirt::Secrets;
use crate::clones::recipe::memory::{Ram, Rom};
use crate::error::Error;

/// Facts about a VM that its command line does not contain.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The versioned machine type (`pc-q35-10.0`, not the alias `q35`), so that a newer QEMU can resume the state.
    pub machine_type: Option<String>,
    /// The media that are inserted now.
    pub disks: Vec<LiveDisk>,
}

/// A file that clones need besides RAM and device state, stored in the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Name of the template file.
    pub file: String,
    /// Path of the source file, as in the command line.
    pub path: PathBuf,
}

/// The command line of clones, and the files that the template needs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Arguments with placeholders.
    pub argv: Vec<String>,
    /// RAM backends; at least one.
    pub ram: Vec<Ram>,
    /// Read-only memory.
    pub roms: Vec<Rom>,
    /// Other files (kernel, firmware tables…).
    pub blobs: Vec<Blob>,
    /// Disks.
    pub disks: Vec<PlannedDisk>,
    /// Number of devices that the command line creates.
    pub devices: usize,
    /// Warnings for the user. A text after `; ` is the advice.
    pub warnings: Vec<String>,
}

/// An obstacle to a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Index of the option in the command line, if the obstacle is one option.
    pub at: Option<usize>,
    /// The obstacle; for RAM, the change to make.
    pub what: String,
}

/// The result of examining a command line.
#[derive(Debug)]
pub struct Examined {
    /// The command line of clones; complete only if there is no obstacle.
    pub plan: Plan,
    /// RAM that is not in a file mapped with `share=on`.
    pub ram_problems: Vec<Refusal>,
    /// Options, devices and disks that are unsupported for clones.
    pub refused: Vec<Refusal>,
    /// Media of the VM that no option of the command line names.
    pub absent: Vec<LiveDisk>,
    /// Size of the RAM, in the syntax of an object's `size=`.
    pub ram_size: String,
    pub(super) secrets: Secrets,
}

impl Examined {
    /// Returns the obstacles to a capture as one error: only those of the RAM if there are any, otherwise all others.
    pub fn error(&self) -> Option<Error> {
        let texts = |all: &[Refusal]| all.iter().map(|one| one.what.clone()).collect::<Vec<_>>();
        if !self.ram_problems.is_empty() {
            return Some(
                Error::usage("the RAM of this VM is not in a file mapped with share=on")
                    .hint(self.secrets.share_ram(&texts(&self.ram_problems))),
            );
        }
        let refused = texts(&self.refused);
        (!refused.is_empty()).then(|| {
            Error::usage(format!("unsupported for clones: {}", refused.join("; ")))
                .hint(self.secrets.start_without(&refused))
        })
    }

    /// Returns the advice for one of [`ram_problems`](Self::ram_problems).
    pub fn share_ram(&self, problem: &Refusal) -> String {
        self.secrets.share_ram(std::slice::from_ref(&problem.what))
    }

    /// Returns the advice for one of [`refused`](Self::refused).
    pub fn start_without(&self, refused: &Refusal) -> String {
        self.secrets.start_without(std::slice::from_ref(&refused.what))
    }

    /// Returns true if libvirt started the VM, so that the user edits a domain and not a command line.
    pub fn is_libvirt(&self) -> bool {
        self.secrets.is_libvirt()
    }
}
