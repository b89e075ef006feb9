//! What the kernel says of page frames: `/proc/kpageflags` and `/proc/kpagecount`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Bits of `/proc/kpageflags` (`linux/kernel-page-flags.h`).
const ANON: u64 = 1 << 12;
const ZERO_PAGE: u64 = 1 << 24;

/// Both files, opened.
#[derive(Debug)]
pub struct Frames {
    flags: File,
    counts: File,
}

/// Whose content a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Anonymous memory; a copy of a file's page is that too.
    Anonymous,
    /// The page of zeros that everybody shares.
    Zero,
    /// Anything else: page cache, shared memory, the kernel's own.
    Other,
}

impl Frames {
    /// Opens both files.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`.
    pub fn open() -> Result<Frames> {
        let open = |path: &str| {
            File::open(path).map_err(|e| Error::io("cannot open", path, e).remedy("the audit needs root"))
        };
        Ok(Frames { flags: open("/proc/kpageflags")?, counts: open("/proc/kpagecount")? })
    }

    /// Whose content a frame holds.
    ///
    /// # Errors
    /// When the kernel knows no such frame.
    pub fn kind(&self, frame: u64) -> Result<FrameKind> {
        let flags = word(&self.flags, "/proc/kpageflags", frame)?;
        Ok(match flags {
            f if f & ZERO_PAGE != 0 => FrameKind::Zero,
            f if f & ANON != 0 => FrameKind::Anonymous,
            _ => FrameKind::Other,
        })
    }

    /// How many page table entries map a frame.
    ///
    /// # Errors
    /// When the kernel knows no such frame.
    pub fn mappings(&self, frame: u64) -> Result<u64> {
        word(&self.counts, "/proc/kpagecount", frame)
    }
}

fn word(file: &File, path: &str, frame: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, frame.saturating_mul(8))
        .map_err(|e| Error::io(format!("cannot read of frame {frame:#x}"), Path::new(path), e))?;
    Ok(u64::from_ne_bytes(bytes))
}
