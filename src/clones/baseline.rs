//! Free memory of the host before a launch, for the audit of the memory that the clones take.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, procfs};
use crate::units::Bytes;

/// Free memory of the host at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    pub(super) mem_available: Bytes,
    pub(super) per_cpu_free: Bytes,
    /// Identity of the process that read the figures. A process with a greater identity started later.
    pub(super) read_by: u64,
}

impl Baseline {
    /// Reads the present figures.
    ///
    /// # Errors
    /// Returns an error if the figures of the host cannot be read.
    pub fn now() -> Result<Baseline> {
        let mem_available = procfs::meminfo("MemAvailable")?
            .ok_or_else(|| Error::failed("missing MemAvailable in /proc/meminfo"))?;
        let read_by = ProcessId::current()?.identity;
        Ok(Baseline { mem_available, per_cpu_free: procfs::per_cpu_free()?, read_by })
    }

    /// Returns true if a process with this identity had no memory when the figures were read.
    pub fn is_before(&self, identity: u64) -> bool {
        self.read_by < identity
    }

    /// Returns the memory that a new process could get: `MemAvailable`, and free pages in per-CPU lists, which
    /// `MemAvailable` does not include.
    pub fn available(&self) -> Bytes {
        self.mem_available + self.per_cpu_free
    }
}
