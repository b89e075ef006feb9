//! The host's free memory before a launch, for the audit of what its clones have taken.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys::procfs;
use crate::units::Bytes;

/// The host's free memory at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    pub(super) mem_available: Bytes,
    pub(super) per_cpu_free: Bytes,
}

impl Baseline {
    /// Now.
    ///
    /// # Errors
    /// When the host's figures cannot be read.
    pub fn now() -> Result<Baseline> {
        let mem_available = procfs::meminfo("MemAvailable")?
            .ok_or_else(|| Error::failed("this kernel does not say how much memory is available"))?;
        Ok(Baseline { mem_available, per_cpu_free: procfs::per_cpu_free()? })
    }

    /// What a new process could get: `MemAvailable`, and the pages in per-CPU lists that it leaves out.
    pub fn available(&self) -> Bytes {
        self.mem_available + self.per_cpu_free
    }
}
