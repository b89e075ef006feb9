//! Holds the accounting against what the kernel says by other ways: page frames found from every process
//! (not from the list of clones), and the fall of the host's available memory since before the launch.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use serde::Serialize;

use super::accounting::{self, Survey, Totals, residency};
use super::baseline::Baseline;
use super::find::{Inodes, Search, ServedFile};
use crate::control::Mount;
use crate::error::{Code, Error, Result};
use crate::store::Serving;
use crate::sys::cachestat;
use crate::sys::kpage::{FrameKind, Frames};
use crate::sys::mapping::{Advice, Mapping, Request};
use crate::sys::pagemap::Pagemap;
use crate::sys::procfs::{self, MapLine};
use crate::sys::users::{self, PATIENCE};
use crate::units::{Bytes, PageCount};

/// Largest accepted difference between page frames and the accounting, in percent.
const FRAMES_TOLERANCE: f64 = 0.5;

/// Largest change of the accounting during the count of frames, in percent. Beyond it, agreement proves little.
const CHANGE_TOLERANCE: f64 = 5.0;

/// The same for available memory, which everything else on the host changes too.
const MEMORY_TOLERANCE: f64 = 5.0;

/// What an audit says of the accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Both ways agree within the tolerance.
    Ok,
    /// They differ in what something other than clones may explain.
    Doubtful,
    /// The accounting has missed something, or has counted it twice.
    Wrong,
}

impl Verdict {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Doubtful => "doubtful",
            Verdict::Wrong => "wrong",
        }
    }
}

/// The answer of `density --audit`.
#[derive(Debug, Clone, Serialize)]
pub struct Audit {
    /// The worse of both.
    pub verdict: Verdict,
    /// Page frames against the accounting.
    pub frames: FrameAudit,
    /// The fall of available memory against the accounting; null when no launch of the measured clones has a baseline.
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
    /// Page tables of the processes that map a template, once for each address space.
    pub page_table_bytes: Bytes,
    /// What the accounting says of the processes' own.
    pub page_table_accounted: Bytes,
    /// Address spaces that map a template: processes in which a frame that is mapped once appears have the same one.
    pub address_spaces: u64,
    /// What the accounting says: its number of clones.
    pub address_spaces_accounted: u64,
    /// Processes found that the accounting does not have.
    pub unknown_processes: u64,
    /// Page table entries (kpagecount) on private frames that no process explains.
    pub unexplained_mappings: u64,
    /// Change of the accounting's sum from before to after the count of frames, in percent. Clones run on during the count.
    pub changed_percent: f64,
    /// Distance of the sum of frames from the range between the accounting's sums before and after, in percent.
    pub error_percent: f64,
    /// Largest accepted `error_percent`; page tables alone are held to the same limit.
    pub tolerance_percent: f64,
    /// `wrong` beyond the tolerance, or where processes or address spaces differ; `doubtful` with unexplained mappings, or
    /// where the sum has changed by more than 5 %.
    pub verdict: Verdict,
}

/// What the accounting says at one moment.
#[derive(Debug, Clone, Copy)]
struct Accounted {
    sum: Bytes,
    page_tables: Bytes,
    clones: u64,
}

impl Accounted {
    fn of(survey: &Survey) -> Accounted {
        let totals = &survey.density.totals;
        let page_tables = survey.clones.iter().map(|(_, clone)| clone.memory.page_table_bytes).sum();
        let sum = totals.private_bytes + totals.overhead_bytes + totals.template_bytes + page_tables;
        Accounted { sum, page_tables, clones: totals.clones }
    }
}

/// Available memory then and now, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MemoryAudit {
    /// MemAvailable and per-CPU free pages before the launch.
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
    /// Most that it may be.
    pub tolerance_percent: f64,
    /// `doubtful` beyond the tolerance: what else starts or ends on the host is in the fall too.
    pub verdict: Verdict,
}

/// Audits a survey that was just made of these mounts.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`, or when a process or file cannot be looked into.
pub fn audit(mounts: &[Mount], survey: &Survey) -> Result<Audit> {
    let totals = &survey.density.totals;
    // Read before the walk, which itself takes memory.
    let now = Baseline::now()?;
    let memory = survey.baseline.map(|before| MemoryAudit::new(before, now, totals));
    let frames = frame_audit(mounts, survey)?;
    let verdict = memory.map_or(Verdict::Ok, |memory| memory.verdict).max(frames.verdict);
    Ok(Audit { verdict, frames, memory })
}

#[derive(Default)]
struct Walk {
    /// Frames, and how many page table entries of the processes lead to each.
    private: HashMap<u64, u64>,
    overhead: HashMap<u64, u64>,
    processes: Vec<Walked>,
}

struct Walked {
    pid: u32,
    page_tables: Bytes,
    /// A frame that one page table entry of the host leads to: who shows it has this address space. Every process that
    /// has run has one.
    exclusive: Option<u64>,
}

impl Walk {
    /// The address spaces of the processes, and their page tables.
    fn address_spaces(&self) -> (u64, Bytes) {
        let (mut count, mut page_tables) = (0.0, 0.0);
        for walked in &self.processes {
            let seen = |frame| self.private.get(&frame).or_else(|| self.overhead.get(&frame)).copied();
            let processes = walked.exclusive.and_then(seen).unwrap_or(1).max(1) as f64;
            count += 1.0 / processes;
            page_tables += walked.page_tables.get() as f64 / processes;
        }
        (count.round() as u64, Bytes::new(page_tables.round() as u64))
    }
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
    let bytes = |count: usize| PageCount::new(count as u64).bytes();
    let overhead = walk.overhead.keys().filter(|frame| !walk.private.contains_key(frame)).count();
    let (before, later) = (Accounted::of(survey), accounting::survey(mounts, None)?);
    let clones = survey.clones.iter().chain(&later.clones);
    let known: HashSet<u32> =
        clones.flat_map(|(clone, _)| clone.processes()).map(|process| process.pid).collect();
    let unknown = walk.processes.iter().filter(|walked| !known.contains(&walked.pid)).count();
    let (address_spaces, page_table_bytes) = walk.address_spaces();
    let totals = &survey.density.totals;
    let mut audit = FrameAudit {
        private_bytes: bytes(walk.private.len()),
        private_accounted: totals.private_bytes,
        overhead_bytes: bytes(overhead),
        overhead_accounted: totals.overhead_bytes,
        template_bytes: bytes(template),
        template_accounted: totals.template_bytes,
        page_table_bytes,
        page_table_accounted: before.page_tables,
        address_spaces,
        address_spaces_accounted: totals.clones,
        unknown_processes: unknown as u64,
        unexplained_mappings: unexplained,
        changed_percent: 0.0,
        error_percent: 0.0,
        tolerance_percent: FRAMES_TOLERANCE,
        verdict: Verdict::Ok,
    };
    audit.conclude(before, Accounted::of(&later));
    Ok(audit)
}

impl FrameAudit {
    fn conclude(&mut self, before: Accounted, after: Accounted) {
        let counted = self.private_bytes + self.overhead_bytes + self.template_bytes + self.page_table_bytes;
        self.error_percent = distance(counted, before.sum, after.sum);
        self.changed_percent = percent(after.sum.get() as i64 - before.sum.get() as i64, before.sum);
        let tables = distance(self.page_table_bytes, before.page_tables, after.page_tables);
        let clones = before.clones.min(after.clones)..=before.clones.max(after.clones);
        let wrong = self.error_percent > self.tolerance_percent
            || tables > self.tolerance_percent
            || !clones.contains(&self.address_spaces)
            || self.unknown_processes > 0;
        let doubtful = self.unexplained_mappings > 0 || self.changed_percent > CHANGE_TOLERANCE;
        self.verdict = match (wrong, doubtful) {
            (true, _) => Verdict::Wrong,
            (false, true) => Verdict::Doubtful,
            (false, false) => Verdict::Ok,
        };
    }
}

/// How far a figure is from the range of two others, in percent of the first of them.
fn distance(counted: Bytes, before: Bytes, after: Bytes) -> f64 {
    let nearest = counted.clamp(before.min(after), before.max(after));
    percent(counted.get() as i64 - nearest.get() as i64, before)
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
    let pagemap = Pagemap::open(pid)?;
    let mut exclusive = None;
    for line in lines.iter().filter(|line| !line.path.starts_with("[v")) {
        let template = inodes.lookup(line.dev, line.ino).is_some();
        let mut anonymous = Vec::new();
        pagemap.each_entry(line.start..line.end, |_, entry| anonymous.extend(entry.frame()))?;
        for frame in anonymous {
            if frames.kind(frame)? != FrameKind::Anonymous {
                continue;
            }
            if exclusive.is_none() && frames.mappings(frame)? == 1 {
                exclusive = Some(frame);
            }
            let frames = if template { &mut walk.private } else { &mut walk.overhead };
            *frames.entry(frame).or_default() += 1;
        }
    }
    let page_tables = procfs::status(pid)?.map_or(Bytes::ZERO, |status| status.page_tables);
    walk.processes.push(Walked { pid, page_tables, exclusive });
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
            || backings.iter().any(|(mount, backing)| {
                (*mount, backing.digest, &backing.file) == (file.mount, file.digest, &file.name)
            })
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
    fn new(before: Baseline, now: Baseline, totals: &Totals) -> MemoryAudit {
        let accounted = totals.of_the_clones();
        let fall = before.available().get() as i64 - now.available().get() as i64;
        let error_percent = percent(fall - accounted.get() as i64, accounted);
        let tolerance_percent = MEMORY_TOLERANCE;
        MemoryAudit {
            available_before: before.available(),
            available_now: now.available(),
            fall_bytes: fall,
            accounted_bytes: accounted,
            error_percent,
            tolerance_percent,
            verdict: if error_percent <= tolerance_percent { Verdict::Ok } else { Verdict::Doubtful },
        }
    }
}

fn percent(difference: i64, of: Bytes) -> f64 {
    match of.get() {
        0 if difference == 0 => 0.0,
        0 => 100.0,
        of => 100.0 * difference.unsigned_abs() as f64 / of as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_held_against_the_accounting_before_and_after() {
        let at = |sum, page_tables, clones| Accounted {
            sum: Bytes::new(sum),
            page_tables: Bytes::new(page_tables),
            clones,
        };
        let frames = |private, page_tables, address_spaces| FrameAudit {
            private_bytes: Bytes::new(private),
            private_accounted: Bytes::ZERO,
            overhead_bytes: Bytes::ZERO,
            overhead_accounted: Bytes::ZERO,
            template_bytes: Bytes::ZERO,
            template_accounted: Bytes::ZERO,
            page_table_bytes: Bytes::new(page_tables),
            page_table_accounted: Bytes::ZERO,
            address_spaces,
            address_spaces_accounted: 0,
            unknown_processes: 0,
            unexplained_mappings: 0,
            changed_percent: 0.0,
            error_percent: 0.0,
            tolerance_percent: FRAMES_TOLERANCE,
            verdict: Verdict::Ok,
        };
        let quiet = at(10_000, 1000, 8);
        for (counted, after, verdict) in [
            (frames(9000, 1000, 8), quiet, Verdict::Ok),
            (frames(9040, 1000, 8), quiet, Verdict::Ok),
            (frames(9060, 1000, 8), quiet, Verdict::Wrong),
            (frames(8940, 1000, 8), quiet, Verdict::Wrong),
            (frames(9000, 1006, 8), quiet, Verdict::Wrong),
            (frames(9000, 1000, 9), quiet, Verdict::Wrong),
            // The clones have written meanwhile, or one has ended.
            (frames(9200, 1010, 8), at(10_300, 1020, 8), Verdict::Ok),
            (frames(9500, 1010, 8), at(10_300, 1020, 8), Verdict::Wrong),
            (frames(8800, 990, 7), at(9700, 980, 7), Verdict::Ok),
            // So much that any figure would agree.
            (frames(9500, 1010, 8), at(12_000, 1020, 8), Verdict::Doubtful),
        ] {
            let mut audit = counted;
            audit.conclude(quiet, after);
            assert_eq!(audit.verdict, verdict, "{audit:?} {after:?}");
        }
    }

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
        let audit = MemoryAudit::new(free(5000), free(3889), &totals);
        assert_eq!((audit.accounted_bytes.get(), audit.fall_bytes), (1111, 1111));
        assert_eq!((audit.error_percent, audit.verdict), (0.0, Verdict::Ok));
        assert_eq!(MemoryAudit::new(free(5000), free(3000), &totals).verdict, Verdict::Doubtful);
    }
}
