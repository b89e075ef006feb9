//! Distinct page frames: a page that several clones share after a fork or a KSM merge is counted once.
//!
//! Reading the frame numbers of all pages would take longer than the rest of a measurement. Only the frame numbers of
//! pages that another clone may share are read.

use std::collections::HashMap;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use super::records::{Records, is_simulated};
use crate::clones::find::CloneProcess;
use crate::error::{Error, Result};
use crate::sys::memory::ksm;
use crate::sys::memory::pagemap::{Entry, Pagemap};
use crate::sys::process::tasks;
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// The RAM of one clone. A frame of several clones is split between them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Distinct {
    /// Copies of template pages, and memory of replaced pages.
    pub private: Bytes,
    /// Private memory outside template mappings.
    pub overhead: Bytes,
}

/// The private pages of a clone that another clone may have too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Shared {
    /// None.
    #[default]
    Nothing,
    /// Pages outside the template mappings, by a fork.
    Outside,
    /// All pages, by a fork.
    ByFork,
    /// All pages, by KSM, which also merges pages of one process.
    ByKsm,
}

/// The frames of one clone.
#[derive(Debug, Clone)]
pub(super) struct Frames {
    pub private: Counted,
    pub overhead: Counted,
}

/// The frames of some pages.
#[derive(Debug, Clone, Default)]
pub(super) struct Counted {
    /// Pages in frames that no other process has.
    exclusive: PageCount,
    /// The other frames.
    others: Vec<u64>,
}

impl Counted {
    #[cfg(test)]
    pub fn of(exclusive: PageCount, others: Vec<u64>) -> Counted {
        Counted { exclusive, others }
    }

    /// Returns true if another process may have some of the frames.
    pub fn may_be_shared(&self) -> bool {
        !self.others.is_empty()
    }

    /// Creates the count of pages in frames that no other process has.
    pub fn exclusive(bytes: Bytes) -> Counted {
        Counted { exclusive: bytes.pages(), others: Vec::new() }
    }
}

/// Counts each frame once, and splits frames of several clones between these clones. Returns the RAM of each clone.
pub(super) fn distinct<'a>(clones: impl Iterator<Item = &'a Frames>) -> Vec<Distinct> {
    let mut rams = Vec::new();
    // Frame, false for a copied page, index of the clone.
    let mut others: Vec<(u64, bool, usize)> = Vec::new();
    for (clone, Frames { private, overhead }) in clones.enumerate() {
        rams.push(Distinct { private: private.exclusive.bytes(), overhead: overhead.exclusive.bytes() });
        others.extend(private.others.iter().map(|frame| (*frame, false, clone)));
        others.extend(overhead.others.iter().map(|frame| (*frame, true, clone)));
    }
    others.sort_unstable();
    let mut holders: Vec<usize> = Vec::new();
    for entries in others.chunk_by(|one, next| one.0 == next.0) {
        holders.clear();
        holders.extend(entries.iter().map(|(_, _, clone)| *clone));
        holders.sort_unstable();
        holders.dedup();
        // KSM may merge a copied page with a page outside the template mappings. The frame counts as a copy.
        let is_outside = entries.iter().all(|(_, outside, _)| *outside);
        for (holder, share) in holders.iter().zip(Bytes::new(PAGE_SIZE).split(holders.len())) {
            let ram = &mut rams[*holder];
            *(if is_outside { &mut ram.overhead } else { &mut ram.private }) += share;
        }
    }
    rams
}

/// Number of attempts, and time between them, to read a page that the kernel is moving to another frame.
const MOVE_RETRIES: u32 = 100;
const MOVE_INTERVAL: Duration = Duration::from_millis(1);

/// Ranges with less space between them are read by one system call, which takes longer than the pages between.
const MAX_SPACE: u64 = 16 * PAGE_SIZE;

/// Counts the frames of present anonymous pages in these ranges, which are in order.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`: the kernel then reports frame numbers as 0 (pagemap). Returns
/// [`Code::NotFound`](crate::error::Code::NotFound) if the process has exited.
pub(super) fn count(pagemap: &Pagemap, ranges: &[Range<u64>], shared: Shared) -> Result<Counted> {
    let (mut counted, mut hidden, mut moving) = (Counted::default(), false, Vec::new());
    let mut add = |entry: Entry| match entry.frame() {
        // KSM may have merged pages of one process only.
        Some(_) if entry.is_exclusive() && shared != Shared::ByKsm => counted.exclusive += PageCount::new(1),
        Some(frame) => counted.others.push(frame),
        None => hidden = true,
    };
    let mut read = |ranges: &[Range<u64>], moving: &mut Vec<u64>| {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Ok(()) };
        let mut next = ranges.iter().peekable();
        pagemap.each_entry(first.start..last.end, |address, entry| {
            while next.next_if(|range| range.end <= address).is_some() {}
            if !next.peek().is_some_and(|range| range.contains(&address)) {
                return;
            }
            if entry.is_moving() {
                moving.push(address);
            } else if entry.is_present() && !entry.is_file() {
                add(entry);
            }
        })
    };
    let is_near =
        |one: &Range<u64>, next: &Range<u64>| next.start >= one.end && next.start - one.end < MAX_SPACE;
    for near in ranges.chunk_by(is_near) {
        read(near, &mut moving)?;
    }
    // While the kernel moves a page, the page is in no frame. Without a second read it would not be counted.
    for _ in 0..MOVE_RETRIES {
        if moving.is_empty() {
            break;
        }
        thread::sleep(MOVE_INTERVAL);
        for address in std::mem::take(&mut moving) {
            read(std::slice::from_ref(&(address..address + PAGE_SIZE)), &mut moving)?;
        }
    }
    if hidden { Err(hidden_frames()) } else { Ok(counted) }
}

/// Returns the error of a pagemap without frame numbers.
pub(super) fn hidden_frames() -> Error {
    Error::failed("the kernel hides page frame numbers, so frames that clones share cannot be counted once")
        .hint("run the command as root (CAP_SYS_ADMIN)")
}

/// Returns which pages of each clone another clone may have too.
///
/// A forked child maps the same file at the same distance between address and offset as its parent, also if one of both has
/// replaced pages of the mapping. A clone that has called execve(2) since its fork
/// began with empty memory; if all clones at a distance have, none of them shares a page. A simulated clone maps the
/// template after its fork and never forks.
pub(super) fn shared(clones: &[CloneProcess], records: &Records) -> Vec<Shared> {
    let mut at: HashMap<(u64, u64, u64), Vec<usize>> = HashMap::new();
    for (index, clone) in clones.iter().enumerate() {
        for map in &clone.maps {
            let indexes = at.entry((map.distance(), map.dev, map.ino)).or_default();
            // Zero memory and replaced pages split a mapping into parts.
            if indexes.last() != Some(&index) {
                indexes.push(index);
            }
        }
    }
    let mut shared = vec![Shared::Nothing; clones.len()];
    for indexes in at.into_values().filter(|indexes| indexes.len() > 1) {
        let (simulated, others): (Vec<usize>, Vec<usize>) =
            indexes.into_iter().partition(|index| is_simulated(&clones[*index], records));
        for index in simulated {
            shared[index] = Shared::Outside;
        }
        if others.iter().any(|index| clones[*index].processes().any(|its| !tasks::has_executed(its.pid))) {
            for index in others {
                shared[index] = Shared::ByFork;
            }
        }
    }
    if ksm::has_merged_pages() {
        for (clone, shared) in clones.iter().zip(&mut shared) {
            if ksm::has_merged_pages_of(clone.pid) {
                *shared = Shared::ByKsm;
            }
        }
    }
    shared
}
