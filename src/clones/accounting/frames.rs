//! Distinct page frames: a page that several clones share after a fork or a KSM merge is counted once.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::process::Measured;
use crate::clones::find::CloneProcess;
use crate::error::{Code, Error, Result};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::process::{procfs, tasks};
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// The RAM of all clones together, with each frame counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Distinct {
    /// Copies of template pages, and memory of replaced pages.
    pub private: Bytes,
    /// Private memory outside template mappings.
    pub overhead: Bytes,
}

/// Counts the frames of all clones. A clone that cannot share a frame with another clone, by a fork or KSM, contributes
/// its own figures. For the other clones every frame number is read, and each frame is counted once.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`: the kernel then reports frame numbers as 0 (pagemap).
pub fn distinct(clones: &[(CloneProcess, Measured)]) -> Result<Distinct> {
    let suspects = suspects(clones);
    let mut total = Distinct::default();
    let mut private = HashSet::new();
    let mut overhead = HashSet::new();
    for (clone, measured) in clones {
        if !suspects.contains(&clone.pid) {
            total.private += measured.memory.private_bytes;
            total.overhead += measured.memory.overhead_bytes;
            continue;
        }
        let private_pages =
            measured.private().filter(|range| !range.swapped).map(|range| range.range.clone());
        if !collect(clone.pid, private_pages, &mut private)?
            || !collect(clone.pid, measured.overhead.iter().cloned(), &mut overhead)?
        {
            log::info!("clone {} exited while its frames were counted", clone.pid);
        }
    }
    total.private += PageCount::new(private.len() as u64).bytes();
    // KSM may merge a copied page with a page outside the template mappings. The frame counts as a copy.
    let outside = overhead.difference(&private).count();
    total.overhead += PageCount::new(outside as u64).bytes();
    Ok(total)
}

/// Number of attempts, and time between them, to read a page that the kernel is moving to another frame.
const MOVE_RETRIES: u32 = 100;
const MOVE_INTERVAL: Duration = Duration::from_millis(1);

/// Collects the frames of present anonymous pages in these ranges. Returns false if the process has exited.
fn collect(pid: u32, ranges: impl Iterator<Item = Range<u64>>, frames: &mut HashSet<u64>) -> Result<bool> {
    let pagemap = match Pagemap::open(pid) {
        Ok(pagemap) => pagemap,
        Err(error) if error.code() == Code::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let (mut hidden, mut moving) = (false, Vec::new());
    let mut read = |range: Range<u64>, moving: &mut Vec<u64>| {
        let read = pagemap.each_entry(range, |address, entry| {
            if entry.is_moving() {
                moving.push(address);
            } else if entry.is_present() && !entry.is_file() {
                match entry.frame() {
                    Some(frame) => drop(frames.insert(frame)),
                    None => hidden = true,
                }
            }
        });
        match read {
            Err(error) if error.code() == Code::NotFound => Ok(false),
            other => other.map(|()| true),
        }
    };
    for range in ranges {
        if !read(range, &mut moving)? {
            return Ok(false);
        }
    }
    // While the kernel moves a page, the page is in no frame. Without a second read it would not be counted.
    for _ in 0..MOVE_RETRIES {
        if moving.is_empty() {
            break;
        }
        thread::sleep(MOVE_INTERVAL);
        for address in std::mem::take(&mut moving) {
            if !read(address..address + PAGE_SIZE, &mut moving)? {
                return Ok(false);
            }
        }
    }
    if hidden {
        return Err(Error::failed(
            "the kernel hides page frame numbers, so frames that clones share cannot be counted once",
        )
        .hint("run the command as root (CAP_SYS_ADMIN)"));
    }
    Ok(true)
}

/// Returns the clones that may share a frame with another clone. A forked child maps the same file at the same address
/// as its parent; a clone with merged pages has a KSM figure.
fn suspects(clones: &[(CloneProcess, Measured)]) -> HashSet<u32> {
    let mut at: HashMap<(u64, u64, u64, u64), Vec<u32>> = HashMap::new();
    for (clone, _) in clones {
        for map in &clone.maps {
            at.entry((map.start, map.dev, map.ino, map.offset.get())).or_default().push(clone.pid);
        }
    }
    let mut suspects: HashSet<u32> = at.into_values().filter(|pids| pids.len() > 1).flatten().collect();
    for (clone, _) in clones {
        if merged_by_ksm(clone.pid) {
            suspects.insert(clone.pid);
        }
    }
    suspects
}

fn merged_by_ksm(pid: u32) -> bool {
    // Older kernels have no KSM figure for each process. Then every frame is read if KSM has merged any page.
    let thread = tasks::with_memory(pid).ok().flatten();
    let Some(text) = thread.and_then(|thread| procfs::read_text(&thread.join("ksm_stat")).ok()) else {
        return Path::new("/sys/kernel/mm/ksm/pages_shared").exists();
    };
    let field = |line: &str| line.strip_prefix("ksm_merging_pages")?.trim().parse::<u64>().ok();
    text.lines().find_map(field).is_some_and(|pages| pages > 0)
}
