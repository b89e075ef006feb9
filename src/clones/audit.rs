//! Holds the accounting against what the kernel says by other ways: page frames found from every process
//! (not from the list of clones), and the fall of the host's available memory since before the first clone.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};

use super::accounting::{Survey, Totals, residency};
use super::find::{self, Inodes, Search, ServedFile};
use crate::control::Mount;
use crate::control::runtime::{self, MAX_RECORD};
use crate::error::{Code, Error, Result};
use crate::store::Serving;
use crate::sys::cachestat;
use crate::sys::kpage::{FrameKind, Frames};
use crate::sys::mapping::{Advice, Mapping, Request};
use crate::sys::pagemap::Pagemap;
use crate::sys::procfs::{self, MapLine};
use crate::sys::users::{self, PATIENCE};
use crate::units::{Bytes, PageCount};

/// File of the runtime directory that keeps the host's free memory before its first clone.
const BASELINE: &str = "memory-baseline.json";

/// The answer of `density --audit`.
#[derive(Debug, Clone, Serialize)]
pub struct Audit {
    /// Page frames against the accounting.
    pub frames: FrameAudit,
    /// The fall of available memory against the accounting; null when no baseline was taken.
    pub memory: Option<MemoryAudit>,
}

/// Frames counted one by one, in bytes, beside the accounting's figures.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FrameAudit {
    /// Anonymous frames in template mappings of any process.
    pub private_bytes: Bytes,
    /// What the accounting says.
    pub private_accounted: Bytes,
    /// Anonymous frames elsewhere in the processes that map a template.
    pub overhead_bytes: Bytes,
    /// What the accounting says.
    pub overhead_accounted: Bytes,
    /// Page cache frames of the templates.
    pub template_bytes: Bytes,
    /// What the accounting says.
    pub template_accounted: Bytes,
    /// Processes found that the accounting does not have.
    pub unknown_processes: u64,
    /// Page table entries (kpagecount) on private frames that no process explains.
    pub unexplained_mappings: u64,
    /// Difference of the sums, in percent of the accounting's.
    pub error_percent: f64,
}

/// Available memory then and now, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MemoryAudit {
    /// MemAvailable and per-CPU free pages before the first clone.
    pub available_before: Bytes,
    /// The same now.
    pub available_now: Bytes,
    /// How much less it is.
    pub fall_bytes: i64,
    /// What the accounting says of the clones: private + page tables + overhead + disks in RAM. Template pages are
    /// page cache, which the kernel counts as available; what a tmpfs holds it does not.
    pub accounted_bytes: Bytes,
    /// Difference in percent of the accounting's figure.
    pub error_percent: f64,
}

/// Audits a survey that was just made of these mounts.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`, or when a process or file cannot be looked into.
pub fn audit(mounts: &[Mount], survey: &Survey) -> Result<Audit> {
    let totals = &survey.density.totals;
    // Read before the walk, which itself takes memory.
    let memory =
        Baseline::load()?.map(|before| MemoryAudit::new(before, Baseline::now()?, totals)).transpose()?;
    Ok(Audit { frames: frame_audit(mounts, survey)?, memory })
}

#[derive(Default)]
struct Walk {
    private: HashMap<u64, u64>,
    overhead: HashSet<u64>,
    processes: HashSet<u32>,
}

fn frame_audit(mounts: &[Mount], survey: &Survey) -> Result<FrameAudit> {
    let frames = Frames::open()?;
    let mut walk = Walk::default();
    for (pid, lines) in mappings_of_all(&survey.inodes)? {
        match walk_process(pid, &lines, &survey.inodes, &frames, &mut walk) {
            Err(error) if error.code() == Code::NotFound => {}
            other => other?,
        }
    }
    let template = template_frames(mounts, survey)?;
    let mut unexplained = 0;
    for (&frame, &seen) in &walk.private {
        unexplained += frames.mappings(frame)?.saturating_sub(seen);
    }
    let private: HashSet<u64> = walk.private.keys().copied().collect();
    let bytes = |count: usize| PageCount::new(count as u64).bytes();
    let known: HashSet<u32> = survey.clones.iter().map(|(clone, _)| clone.pid).collect();
    let totals = &survey.density.totals;
    let mut audit = FrameAudit {
        private_bytes: bytes(private.len()),
        private_accounted: totals.private_bytes,
        overhead_bytes: bytes(walk.overhead.difference(&private).count()),
        overhead_accounted: totals.overhead_bytes,
        template_bytes: bytes(template),
        template_accounted: totals.template_bytes,
        unknown_processes: walk.processes.difference(&known).count() as u64,
        unexplained_mappings: unexplained,
        error_percent: 0.0,
    };
    let counted = audit.private_bytes + audit.overhead_bytes + audit.template_bytes;
    let accounted = audit.private_accounted + audit.overhead_accounted + audit.template_accounted;
    audit.error_percent = percent(counted.get() as i64 - accounted.get() as i64, accounted);
    Ok(audit)
}

/// All mappings of every process that maps one of these files.
fn mappings_of_all(inodes: &Inodes) -> Result<Vec<(u32, Vec<MapLine>)>> {
    let wanted = inodes.wanted()?;
    let sight = users::look_at_all(PATIENCE, move |pid| {
        let lines = procfs::maps(pid, |_, _| true).map_err(io::Error::other)?.unwrap_or_default();
        Ok(lines.iter().any(|line| wanted.has(line.dev, line.ino)).then_some(lines))
    })?;
    Search { clones: Vec::new(), unseen: sight.unseen }.complete()?;
    Ok(sight.seen)
}

/// Looks at every page of one process, entry by entry.
fn walk_process(
    pid: u32,
    lines: &[MapLine],
    inodes: &Inodes,
    frames: &Frames,
    walk: &mut Walk,
) -> Result<()> {
    walk.processes.insert(pid);
    let pagemap = Pagemap::open(pid)?;
    for line in lines.iter().filter(|line| !line.path.starts_with("[v")) {
        let template = inodes.lookup(line.dev, line.ino).is_some();
        let mut anonymous = Vec::new();
        pagemap.each_entry(line.start..line.end, |_, entry| anonymous.extend(entry.frame()))?;
        for frame in anonymous {
            if frames.kind(frame)? != FrameKind::Anonymous {
                continue;
            }
            if template {
                *walk.private.entry(frame).or_default() += 1;
            } else {
                walk.overhead.insert(frame);
            }
        }
    }
    Ok(())
}

/// Number of distinct frames that hold pages of templates: maps every file and looks at the frames of the
/// pages that are in the page cache already.
fn template_frames(mounts: &[Mount], survey: &Survey) -> Result<usize> {
    let mut frames = HashSet::new();
    let clones: Vec<_> = survey.clones.iter().map(|(clone, _)| clone.clone()).collect();
    let backings = residency::backings(mounts)?;
    let wanted = |file: &ServedFile| {
        file.serving == Serving::Decode
            || backings.iter().any(|backing| backing.digest == file.digest && backing.file == file.name)
    };
    residency::each_inode(mounts, &survey.inodes, &clones, wanted, |_, file| {
        collect_resident(&file, &mut frames)
    })?;
    Ok(frames.len())
}

fn collect_resident(file: &File, frames: &mut HashSet<u64>) -> Result<()> {
    let size = file.metadata().map_err(|e| Error::failed("cannot ask for a file's size").because(e))?.len();
    if size == 0 {
        return Ok(());
    }
    let whole_pages = Bytes::new(size).pages().bytes();
    let view = Mapping::new(&Request::view(file.as_fd(), whole_pages))
        .map_err(|e| Error::failed("cannot map a template to look at its frames").because(e))?;
    // A fault on a page that readahead has marked would read further pages in.
    let advised = view.advise_all(Advice::Random);
    advised.map_err(|e| Error::failed("cannot switch readahead off to look at frames").because(e))?;
    let pagemap = Pagemap::this_process()?;
    for range in cachestat::in_core(&view)? {
        // Only what is in RAM already: the audit must not change what it measures.
        view.advise(range.clone(), Advice::PopulateRead)
            .map_err(|e| Error::failed("cannot fill page tables to look at frames").because(e))?;
        let start = view.address();
        pagemap
            .each_entry(start + range.start..start + range.end, |_, entry| frames.extend(entry.frame()))?;
    }
    Ok(())
}

impl MemoryAudit {
    fn new(before: Baseline, now: Baseline, totals: &Totals) -> Result<MemoryAudit> {
        let accounted = totals.of_the_clones();
        let fall = before.available().get() as i64 - now.available().get() as i64;
        Ok(MemoryAudit {
            available_before: before.available(),
            available_now: now.available(),
            fall_bytes: fall,
            accounted_bytes: accounted,
            error_percent: percent(fall - accounted.get() as i64, accounted),
        })
    }
}

fn percent(difference: i64, of: Bytes) -> f64 {
    match of.get() {
        0 if difference == 0 => 0.0,
        0 => 100.0,
        of => 100.0 * difference.unsigned_abs() as f64 / of as f64,
    }
}

/// The host's free memory at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    mem_available: Bytes,
    per_cpu_free: Bytes,
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

    /// Keeps the present state as the baseline of later audits, if no clone of these mounts lives.
    ///
    /// # Errors
    /// When the host cannot be asked or the runtime directory cannot be written.
    pub fn keep_if_idle(inodes: &Inodes) -> Result<()> {
        if !find::search(inodes)?.complete()?.is_empty() {
            return Ok(());
        }
        let folder = runtime::create("")?;
        let text = serde_json::to_vec(&Baseline::now()?).unwrap_or_default();
        runtime::replace(&folder, BASELINE, &text).map_err(|e| {
            runtime::failed("cannot keep the baseline of the audit", &folder.path_of(BASELINE), e)
        })
    }

    fn load() -> Result<Option<Baseline>> {
        let Some(folder) = runtime::open("")? else { return Ok(None) };
        match runtime::read(&folder, BASELINE, MAX_RECORD) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                let path = folder.path_of(BASELINE);
                Err(runtime::failed("cannot read the baseline of the audit", &path, error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_lowers_available_memory_is_accounted_for() {
        let [private_bytes, page_table_bytes, overhead_bytes, disk_bytes] =
            [1, 10, 100, 1000].map(Bytes::new);
        let shared = Bytes::new(7777);
        let (template_bytes, store_cache_bytes) = (shared, shared);
        let totals = Totals {
            private_bytes,
            page_table_bytes,
            overhead_bytes,
            disk_bytes,
            template_bytes,
            store_cache_bytes,
            ..Totals::default()
        };
        let free = |bytes| Baseline { mem_available: Bytes::new(bytes), per_cpu_free: Bytes::ZERO };
        let audit = MemoryAudit::new(free(5000), free(3889), &totals).unwrap();
        assert_eq!((audit.accounted_bytes.get(), audit.fall_bytes), (1111, 1111));
        assert_eq!(audit.error_percent, 0.0);
    }
}
