//! The audit of the accounting. It compares the figures with page frames, found from all processes (not from the list
//! of clones), and with the decrease of the host's available memory since the launch.

use std::collections::{HashMap, HashSet};
use std::io;

use serde::Serialize;

use super::accounting::{self, Survey, Totals, residency};
use super::baseline::Baseline;
use super::find::{self, Inodes, Search, ServedFile, TemplateMapping};
use super::ranges::joined;
use super::zero_memory::ZeroMemory;
use crate::control::Mount;
use crate::error::{Code, Result};
use crate::store::{Digest, Serving};
use crate::sys::memory::page_flags::{FrameKind, Frames};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::procfs::{self, MapLine};
use crate::units::{Bytes, PageCount, approximate, whole};

/// Maximum accepted difference between page frames and the accounting, in percent.
const FRAMES_TOLERANCE: f64 = 0.5;

/// Maximum accepted change of the accounting during the count of frames, in percent. Beyond, agreement proves little.
const CHANGE_TOLERANCE: f64 = 5.0;

/// Maximum accepted difference of available memory, in percent. All other processes of the host change this figure too.
const MEMORY_TOLERANCE: f64 = 5.0;

/// The result of an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Both figures agree within the tolerance.
    Ok,
    /// The figures differ, possibly because of processes other than clones.
    Doubtful,
    /// The accounting has missed memory, or has counted memory twice.
    Wrong,
}

impl Verdict {
    /// Returns the verdict as a word.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Doubtful => "doubtful",
            Verdict::Wrong => "wrong",
        }
    }
}

/// The result of `density --audit`.
#[derive(Debug, Clone, Serialize)]
pub struct Audit {
    /// The worse of both verdicts.
    pub verdict: Verdict,
    /// Comparison of page frames with the accounting.
    pub frames: FrameAudit,
    /// Comparison of available memory with the accounting; null if the measured clones have no baseline.
    pub memory: Option<MemoryAudit>,
}

/// Frames counted one by one, in bytes, with the figures of the accounting.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FrameAudit {
    /// Anonymous frames in template mappings of any process, and in place of replaced pages.
    pub private_bytes: Bytes,
    /// Figure of the accounting.
    pub private_accounted: Bytes,
    /// Anonymous frames elsewhere in the processes that map a template.
    pub overhead_bytes: Bytes,
    /// Figure of the accounting.
    pub overhead_accounted: Bytes,
    /// Page cache frames of the templates.
    pub template_bytes: Bytes,
    /// Figure of the accounting.
    pub template_accounted: Bytes,
    /// Page tables of the processes that map a template, counted once for each address space.
    pub page_table_bytes: Bytes,
    /// Figure of the accounting, without the page tables of KVM.
    pub page_table_accounted: Bytes,
    /// Number of address spaces that map a template. Processes in which one singly mapped frame appears share one.
    pub address_spaces: u64,
    /// Figure of the accounting: the number of clones.
    pub address_spaces_accounted: u64,
    /// Number of processes that the accounting does not have.
    pub unknown_processes: u64,
    /// Page table entries of private frames (/proc/kpagecount) that belong to none of the processes.
    pub unexplained_mappings: u64,
    /// Change of the accounting's sum during the count of frames, in percent. The clones run during the count.
    pub changed_percent: f64,
    /// Distance of the sum of frames from the range between the accounting's sums before and after, in percent.
    pub error_percent: f64,
    /// Maximum accepted `error_percent`, which also applies to page tables alone.
    pub tolerance_percent: f64,
    /// `wrong` beyond the tolerance, or if processes or address spaces differ; `doubtful` with unexplained mappings, or
    /// if the sum has changed by more than 5 %.
    pub verdict: Verdict,
}

/// Figures of the accounting at one moment.
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

/// Available memory before the launch and now, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MemoryAudit {
    /// MemAvailable and per-CPU free pages before the launch.
    pub available_before: Bytes,
    /// The same now.
    pub available_now: Bytes,
    /// Decrease of the available memory.
    pub fall_bytes: i64,
    /// Figure of the accounting for the clones: private + page tables + overhead + disks in RAM. The kernel counts
    /// template pages as available, because they are page cache, but not the pages of a tmpfs.
    pub accounted_bytes: Bytes,
    /// Difference in percent of the accounting's figure.
    pub error_percent: f64,
    /// Maximum accepted `error_percent`.
    pub tolerance_percent: f64,
    /// `doubtful` beyond the tolerance: other processes of the host change the available memory too.
    pub verdict: Verdict,
}

/// Audits a survey that was just made of these mounts.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`, or if a process or a file cannot be inspected.
pub fn audit(mounts: &[Mount], survey: &Survey) -> Result<Audit> {
    let totals = &survey.density.totals;
    // The baseline is read first: counting the frames allocates memory.
    let now = Baseline::now()?;
    let memory = survey.baseline.map(|before| MemoryAudit::new(before, now, totals));
    let frames = frame_audit(mounts, survey)?;
    let verdict = memory.map_or(Verdict::Ok, |memory| memory.verdict).max(frames.verdict);
    Ok(Audit { verdict, frames, memory })
}

#[derive(Default)]
struct Walk {
    /// Frames, with the number of page table entries in the walked processes that map each.
    private: HashMap<u64, u64>,
    overhead: HashMap<u64, u64>,
    processes: Vec<Walked>,
    /// Devices of dead mounts, and the frames of file pages in mappings of them.
    dead: (Vec<u64>, HashSet<u64>),
}

struct Walked {
    pid: u32,
    page_tables: Bytes,
    /// A frame that one page table entry of the host maps, so that all processes in which it appears share one address
    /// space. Every process that has run has such a frame.
    exclusive: Option<u64>,
}

impl Walk {
    /// Returns the number of address spaces of the processes, and the size of their page tables.
    fn address_spaces(&self) -> (u64, Bytes) {
        let (mut count, mut page_tables) = (0.0, 0.0);
        for walked in &self.processes {
            let sharers = |frame| self.private.get(&frame).or_else(|| self.overhead.get(&frame)).copied();
            let processes = approximate(walked.exclusive.and_then(sharers).unwrap_or(1).max(1));
            count += 1.0 / processes;
            page_tables += approximate(walked.page_tables.get()) / processes;
        }
        (whole(count.round()), Bytes::new(whole(page_tables.round())))
    }
}

fn frame_audit(mounts: &[Mount], survey: &Survey) -> Result<FrameAudit> {
    let frames = Frames::open()?;
    let mut walk = Walk::default();
    walk.dead.0 = mounts.iter().filter(|mount| mount.is_dead()).map(|mount| mount.device).collect();
    let zeros = ZeroMemory::new(&survey.inodes);
    // The memory of these processes is a part of the store cache, as that of the servers.
    let is_handler = |pid| survey.density.handlers.iter().any(|handler| handler.pid == pid);
    for (pid, lines) in mappings_of_all(&survey.inodes)?.into_iter().filter(|(pid, _)| !is_handler(*pid)) {
        match walk_process(pid, &lines, &zeros, &frames, &mut walk) {
            Err(error) if error.code() == Code::NotFound => {}
            other => other?,
        }
    }
    let template = template_frames(mounts, survey, |_| true)?.len();
    let mut unexplained = 0;
    for (&frame, &seen) in &walk.private {
        unexplained += frames.mappings(frame)?.saturating_sub(seen);
    }
    let bytes = |count: usize| PageCount::new(count as u64).bytes();
    let overhead = walk.overhead.keys().filter(|frame| !walk.private.contains_key(frame)).count();
    let (before, later) = (Accounted::of(survey), accounting::survey(mounts, None)?);
    let clones = survey.clones.iter().chain(&later.clones);
    let accounted: HashSet<u32> =
        clones.flat_map(|(clone, _)| clone.processes()).map(|process| process.pid).collect();
    let unknown = walk.processes.iter().filter(|walked| !accounted.contains(&walked.pid)).count();
    let (address_spaces, page_table_bytes) = walk.address_spaces();
    let totals = &survey.density.totals;
    let mut audit = FrameAudit {
        private_bytes: bytes(walk.private.len()),
        private_accounted: totals.private_bytes,
        overhead_bytes: bytes(overhead),
        overhead_accounted: totals.overhead_bytes,
        template_bytes: bytes(template + walk.dead.1.len()),
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
        self.changed_percent = percent(difference(after.sum, before.sum), before.sum);
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

/// Returns the distance of a figure from the range of two others, in percent of the first of the two.
fn distance(counted: Bytes, before: Bytes, after: Bytes) -> f64 {
    let nearest = counted.clamp(before.min(after), before.max(after));
    percent(difference(counted, nearest), before)
}

/// Returns all mappings of every process that maps one of these files.
fn mappings_of_all(inodes: &Inodes) -> Result<Vec<(u32, Vec<MapLine>)>> {
    let wanted = inodes.wanted()?;
    let sight = holders::look_at_all(SCAN_TIMEOUT, move |pid| {
        let lines = procfs::maps(pid, |_, _| true).map_err(io::Error::other)?.unwrap_or_default();
        Ok(lines.iter().any(|line| wanted.has(line.dev, line.ino)).then_some(lines))
    })?;
    Search { clones: Vec::new(), unseen: sight.unseen }.complete()?;
    Ok(sight.seen)
}

/// Reads every page table entry of one process.
fn walk_process(
    pid: u32,
    lines: &[MapLine],
    zeros: &ZeroMemory<'_>,
    frames: &Frames,
    walk: &mut Walk,
) -> Result<()> {
    let pagemap = Pagemap::open(pid)?;
    let mut exclusive = None;
    let mut maps = lines.iter().filter_map(|line| find::mapping(line, zeros.inodes())).collect();
    zeros.add(&mut maps, || Ok(lines.to_vec()))?;
    let replaced = accounting::replaced(&maps, || Ok(lines.to_vec()), || accounting::runs_kvm(pid))?;
    let in_place =
        maps.iter().map(TemplateMapping::range).chain(replaced.into_iter().map(|found| found.range));
    let in_place = joined(in_place.collect());
    for line in lines.iter().filter(|line| !line.path.starts_with("[v")) {
        let mut anonymous = Vec::new();
        pagemap.each_entry(line.start..line.end, |address, entry| {
            anonymous.extend(entry.frame().map(|frame| (address, frame)));
        })?;
        for (address, frame) in anonymous {
            if frames.kind(frame)? != FrameKind::Anonymous {
                if walk.dead.0.contains(&line.dev) {
                    walk.dead.1.insert(frame);
                }
                continue;
            }
            if exclusive.is_none() && frames.mappings(frame)? == 1 {
                exclusive = Some(frame);
            }
            let next = in_place.partition_point(|range| range.end <= address);
            let is_in_place = in_place.get(next).is_some_and(|range| range.contains(&address));
            let frames = if is_in_place { &mut walk.private } else { &mut walk.overhead };
            *frames.entry(frame).or_default() += 1;
        }
    }
    let page_tables = procfs::status(pid)?.map_or(Bytes::ZERO, |status| status.page_tables);
    walk.processes.push(Walked { pid, page_tables, exclusive });
    Ok(())
}

/// Returns the frames that hold pages of these templates: maps every file, and reads the frames of the pages that are in
/// the page cache.
pub(super) fn template_frames(
    mounts: &[Mount],
    survey: &Survey,
    is_wanted: impl Fn(&Digest) -> bool,
) -> Result<HashSet<u64>> {
    let mut frames = HashSet::new();
    let clones: Vec<_> = survey.clones.iter().map(|(clone, _)| clone).collect();
    let backings = residency::backings(mounts)?;
    let wanted = |file: &ServedFile| {
        is_wanted(&file.digest)
            && (file.serving == Serving::Decode
                || backings.iter().any(|(mount, backing)| {
                    (*mount, backing.digest, &backing.file) == (file.mount, file.digest, &file.name)
                }))
    };
    residency::each_inode(mounts, &survey.inodes, &clones, wanted, |served, file| {
        let insert = |_, frame| {
            frames.insert(frame);
        };
        residency::each_page(&file, insert).map_err(|e| {
            e.context(format!(
                "cannot count the frames of file '{}' of template {}",
                served.name, served.digest
            ))
        })
    })?;
    Ok(frames)
}

impl MemoryAudit {
    fn new(before: Baseline, now: Baseline, totals: &Totals) -> MemoryAudit {
        let accounted = totals.of_the_clones();
        let fall = difference(before.available(), now.available());
        let error_percent = percent(fall - accounted.get().cast_signed(), accounted);
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

fn difference(one: Bytes, other: Bytes) -> i64 {
    one.get().cast_signed() - other.get().cast_signed()
}

fn percent(difference: i64, of: Bytes) -> f64 {
    match of.get() {
        0 if difference == 0 => 0.0,
        0 => 100.0,
        of => 100.0 * approximate(difference.unsigned_abs()) / approximate(of),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compares_frames_with_the_accounting_before_and_after() {
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
            // The clones have written in the meantime, or one clone has exited.
            (frames(9200, 1010, 8), at(10_300, 1020, 8), Verdict::Ok),
            (frames(9500, 1010, 8), at(10_300, 1020, 8), Verdict::Wrong),
            (frames(8800, 990, 7), at(9700, 980, 7), Verdict::Ok),
            // The change is so large that any figure would be in the range.
            (frames(9500, 1010, 8), at(12_000, 1020, 8), Verdict::Doubtful),
        ] {
            let mut audit = counted;
            audit.conclude(quiet, after);
            assert_eq!(audit.verdict, verdict, "{audit:?} {after:?}");
        }
    }

    #[test]
    fn accounts_for_all_memory_that_lowers_available_memory() {
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
        let free =
            |bytes| Baseline { mem_available: Bytes::new(bytes), per_cpu_free: Bytes::ZERO, read_by: 0 };
        let audit = MemoryAudit::new(free(5000), free(3889), &totals);
        assert_eq!((audit.accounted_bytes.get(), audit.fall_bytes), (1111, 1111));
        assert_eq!((audit.error_percent, audit.verdict), (0.0, Verdict::Ok));
        assert_eq!(MemoryAudit::new(free(5000), free(3000), &totals).verdict, Verdict::Doubtful);
    }
}
