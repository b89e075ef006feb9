//! What `/proc` shows of one process at one time.

use super::samples::Samples;
use crate::clones::accounting::{self, Measured};
use crate::clones::find::{COMMAND_NAME, CloneProcess, Inodes};
use crate::error::Result;
use crate::sys::memory::smaps::{self, FlaggedMapping};
use crate::sys::process::procfs::MapLine;
use crate::sys::process::{ProcessId, has_ended, procfs};

/// The result of an inspection; `None` for a process that does not exist or has exited meanwhile.
pub type Look = Result<Option<Facts>>;

/// The mappings of a process.
pub struct Facts {
    /// The template mappings and their pages; `None` if the process maps no template that a mount can serve.
    pub measured: Option<(CloneProcess, Measured)>,
    /// All mappings, by address.
    pub mappings: Vec<FlaggedMapping>,
    /// True if the process may have 2 MiB entries.
    pub may_have_huge_pages: bool,
    /// Comparison of pages with the store.
    pub samples: Samples,
}

/// Inspects a process.
pub fn look(pid: u32, inodes: &Inodes) -> Look {
    let Some((process, pidfd)) = ProcessId::living(pid)? else { return Ok(None) };
    let measured = accounting::measure_of(pid, inodes)?;
    let Some(mappings) = smaps::of(pid)? else { return Ok(None) };
    let Some(status) = procfs::status(pid)? else { return Ok(None) };
    let samples = match &measured {
        Some((clone, measured)) => Samples::take(clone, measured, inodes)?,
        None => Samples::default(),
    };
    // Everything was read of this process if it lives now.
    let is_same = measured.as_ref().is_none_or(|(clone, _)| clone.process() == process);
    if has_ended(&pidfd) || !is_same {
        return Ok(None);
    }
    let may_have_huge_pages = status.may_have_huge_pages;
    Ok(Some(Facts { measured, mappings, may_have_huge_pages, samples }))
}

/// Returns true for a command of this program that keeps a working set in RAM: it can write to none of these mappings.
pub fn is_command(pid: u32, lines: &[MapLine]) -> bool {
    let is_named_so =
        || procfs::status(pid).is_ok_and(|status| status.is_some_and(|its| its.name == COMMAND_NAME));
    lines.iter().all(|line| !line.perms.contains('w')) && is_named_so()
}
