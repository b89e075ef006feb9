//! Attributes of page frames: `/proc/kpageflags`, `/proc/kpagecount` and `/proc/kpagecgroup`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::units::PageCount;

/// Bits of `/proc/kpageflags` (`linux/kernel-page-flags.h`).
const ANON: u64 = 1 << 12;
const ZERO_PAGE: u64 = 1 << 24;

/// Open descriptors of both files.
#[derive(Debug)]
pub struct Frames {
    flags: File,
    counts: File,
}

/// Kind of memory in a page frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Anonymous memory, including private copies of file pages.
    Anonymous,
    /// The shared zero page.
    Zero,
    /// Any other memory: page cache, shared memory, kernel memory.
    Other,
}

impl Frames {
    /// Opens both files.
    ///
    /// # Errors
    /// Returns an error without `CAP_SYS_ADMIN`.
    pub fn open() -> Result<Frames> {
        let open = |path: &str| {
            File::open(path).map_err(|e| Error::io("cannot open", path, e).hint("run the command as root"))
        };
        Ok(Frames { flags: open("/proc/kpageflags")?, counts: open("/proc/kpagecount")? })
    }

    /// Returns the kind of memory in a frame.
    ///
    /// # Errors
    /// Returns an error if the frame does not exist.
    pub fn kind(&self, frame: u64) -> Result<FrameKind> {
        let flags = entry(&self.flags, "/proc/kpageflags", frame)?;
        Ok(match flags {
            f if f & ZERO_PAGE != 0 => FrameKind::Zero,
            f if f & ANON != 0 => FrameKind::Anonymous,
            _ => FrameKind::Other,
        })
    }

    /// Returns the number of page table entries that map a frame.
    ///
    /// # Errors
    /// Returns an error if the frame does not exist.
    pub fn mappings(&self, frame: u64) -> Result<u64> {
        entry(&self.counts, "/proc/kpagecount", frame)
    }
}

/// The memory cgroups to which page frames are charged.
#[derive(Debug)]
pub struct Charges(File);

impl Charges {
    /// Opens `/proc/kpagecgroup`; `None` if the kernel has no memory cgroups.
    ///
    /// # Errors
    /// Returns an error without `CAP_SYS_ADMIN`.
    pub fn open() -> Result<Option<Charges>> {
        let path = "/proc/kpagecgroup";
        match File::open(path) {
            Ok(file) => Ok(Some(Charges(file))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("cannot open", path, e).hint("run the command as root")),
        }
    }

    /// Returns the inode number of the cgroup's directory, 0 for a frame that is charged to none.
    ///
    /// # Errors
    /// Returns an error if the frame does not exist.
    pub fn of(&self, frame: u64) -> Result<u64> {
        entry(&self.0, "/proc/kpagecgroup", frame)
    }
}

/// Counts the frames that memory cgroups with these inode numbers pay for. Returns `None` if the kernel has no memory
/// cgroups.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`, or if a frame does not exist.
pub fn charged(frames: impl IntoIterator<Item = u64>, cgroups: &BTreeSet<u64>) -> Result<Option<PageCount>> {
    let Some(charges) = Charges::open()? else { return Ok(None) };
    let mut pages = 0;
    for frame in frames {
        pages += u64::from(cgroups.contains(&charges.of(frame)?));
    }
    Ok(Some(PageCount::new(pages)))
}

fn entry(file: &File, path: &str, frame: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, frame.saturating_mul(8)).map_err(|e| {
        Error::io(format!("cannot read the entry of page frame {frame:#x}"), Path::new(path), e)
    })?;
    Ok(u64::from_ne_bytes(bytes))
}
