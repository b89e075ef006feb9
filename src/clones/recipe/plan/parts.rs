//! What a command line is made of, and what became of it.

use std::path::PathBuf;

use crate::clones::recipe::disks::PlannedDisk;
use crate::clones::recipe::host::LiveDisk;
use crate::clones::recipe::libvirt::Secrets;
use crate::error::Error;

/// What the command line does not say.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The machine type without alias (`pc-q35-10.0`), so that a newer QEMU resumes it too.
    pub machine_type: Option<String>,
    /// The media that it has.
    pub disks: Vec<LiveDisk>,
}

/// A RAM backend of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram {
    /// Its object id.
    pub id: String,
    /// Its file in the template: `memory`, further ones `memory-ID`.
    pub file: String,
    /// Where QEMU keeps it.
    pub mem_path: String,
}

/// Memory of the VM that nobody writes: the file of a read-only NVDIMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rom {
    /// Its object id.
    pub id: String,
    /// Its file in the template: `rom-ID`.
    pub file: String,
    /// Where QEMU keeps it.
    pub mem_path: String,
}

/// A file that clones need besides RAM and device state, kept in the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name in the template.
    pub file: String,
    /// Path of the file, as the command line has it.
    pub path: PathBuf,
}

/// The command line of clones, and what the template needs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Arguments with placeholders.
    pub argv: Vec<String>,
    /// RAM backends, at least one.
    pub ram: Vec<Ram>,
    /// Memory that is only read.
    pub roms: Vec<Rom>,
    /// Further files.
    pub blobs: Vec<Blob>,
    /// Disks.
    pub disks: Vec<PlannedDisk>,
    /// Devices named on the command line.
    pub devices: usize,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Something that stands against a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Where the option is that it is about, where it is about one.
    pub at: Option<usize>,
    /// What it is; of RAM, what to do.
    pub what: String,
}

/// What a command line comes to.
#[derive(Debug)]
pub struct Examined {
    /// The command line of clones; whole only when nothing stands against it.
    pub plan: Plan,
    /// RAM that is not in a file which QEMU shares.
    pub ram_problems: Vec<Refusal>,
    /// What clones cannot have.
    pub refused: Vec<Refusal>,
    /// Media of the VM that no option names.
    pub absent: Vec<LiveDisk>,
    /// Size of the RAM, as an object takes it.
    pub ram_size: String,
    pub(super) secrets: Secrets,
}

impl Examined {
    /// What stands against a capture, RAM first.
    pub fn error(&self) -> Option<Error> {
        let texts = |all: &[Refusal]| all.iter().map(|one| one.what.clone()).collect::<Vec<_>>();
        if !self.ram_problems.is_empty() {
            return Some(
                Error::usage("the RAM of this VM is not in a file that QEMU shares")
                    .remedy(self.secrets.share_ram(&texts(&self.ram_problems))),
            );
        }
        let refused = texts(&self.refused);
        (!refused.is_empty()).then(|| {
            Error::usage(format!("clones cannot have: {}", refused.join("; ")))
                .remedy(self.secrets.start_without(&refused))
        })
    }

    /// What to do about one of [`ram_problems`](Self::ram_problems).
    pub fn share_ram(&self, problem: &Refusal) -> String {
        self.secrets.share_ram(std::slice::from_ref(&problem.what))
    }

    /// What to do about one of [`refused`](Self::refused).
    pub fn start_without(&self, refused: &Refusal) -> String {
        self.secrets.start_without(std::slice::from_ref(&refused.what))
    }

    /// True for a VM that libvirt started, whose command line is libvirt's.
    pub fn is_libvirt(&self) -> bool {
        self.secrets.is_libvirt()
    }
}
