//! What `/proc` shows of one process at one time.

use std::ops::Range;

use super::samples::Samples;
use crate::clones::accounting::{self, Measured};
use crate::clones::find::handlers::{self, Handler};
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
    /// Set if the process is a page-fault handler.
    pub handler: Option<Handler>,
    /// All mappings, by address.
    pub mappings: Vec<FlaggedMapping>,
    /// True if the process may have 2 MiB entries.
    pub may_have_huge_pages: bool,
    /// Comparison of pages with the store.
    pub samples: Samples,
}

impl Facts {
    /// Returns the parts of an address range that are plain anonymous memory, such as the pages of a balloon. Other
    /// memory may have the bytes of a copy of the template.
    pub fn unnamed_memory<'a>(&'a self, range: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        let first = self.mappings.partition_point(|mapping| mapping.line.end <= range.start);
        let lines = self.mappings[first..].iter().map(|mapping| &mapping.line);
        let memory = lines.take_while(|line| line.start < range.end).filter(|line| line.is_unnamed_memory());
        memory.map(|line| line.start.max(range.start)..line.end.min(range.end))
    }
}

/// Inspects a process.
pub fn look(pid: u32, inodes: &Inodes) -> Look {
    let Some((process, pidfd)) = ProcessId::living(pid)? else { return Ok(None) };
    let measured = accounting::measure_of(pid, inodes)?;
    let Some(mappings) = smaps::of(pid)? else { return Ok(None) };
    let Some(status) = procfs::status(pid)? else { return Ok(None) };
    let (samples, handler) = match &measured {
        Some((clone, measured)) => (Samples::take(clone, measured, inodes)?, handlers::handler(clone)?),
        None => (Samples::default(), None),
    };
    // If the process is still alive, its id was not reused, so all reads were of this process.
    let is_same = measured.as_ref().is_none_or(|(clone, _)| clone.process() == process);
    if has_ended(&pidfd) || !is_same {
        return Ok(None);
    }
    let may_have_huge_pages = status.may_have_huge_pages;
    Ok(Some(Facts { measured, handler, mappings, may_have_huge_pages, samples }))
}

/// Returns true for a command of this program that keeps a working set in RAM: it can write to none of these mappings.
pub fn is_command(pid: u32, lines: &[MapLine]) -> bool {
    let is_named_so =
        || procfs::status(pid).is_ok_and(|status| status.is_some_and(|its| its.name == COMMAND_NAME));
    lines.iter().all(|line| !line.perms.contains('w')) && is_named_so()
}
