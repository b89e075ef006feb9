//! Recording: which pages of its template a clone has used, in the order of their first use.
//!
//! A page counts as used if the page tables of the clone have it. The kernel also maps pages near a fault that are in
//! the page cache already (fault-around, 64 KiB by default), and 2 MiB at once where it can.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::clones::find::{self, Inodes, TemplateMapping};
use crate::clones::ranges::{joined, subtract};
use crate::clones::zero_memory::ZeroMemory;
use crate::control::Mount;
use crate::error::{Code, Error, Result};
use crate::store::{Digest, TemplateFile, Used};
use crate::sys::memory::cachestat;
use crate::sys::memory::mapping::{Advice, Mapping, Request};
use crate::sys::memory::pagemap::{Categories, Pagemap, Query};
use crate::sys::process::{ProcessId, procfs};
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// Interval between two scans of the page tables. Pages that one scan finds for the first time are recorded in the
/// order of the file.
const INTERVAL: Duration = Duration::from_millis(20);

/// Shortest pause after a scan, as a multiple of the duration of the scan.
const MIN_PAUSE_FACTOR: u32 = 4;

/// The pages of one file that earlier scans have found, in ascending order.
type Seen = Vec<Range<u64>>;

/// Records the pages that a process uses until `duration` has passed, the process has exited or `stop` is set. Scans
/// the page tables at least once. Returns the template that the process maps, and the pages of each of its files.
///
/// # Errors
/// Returns [`Code::NotFound`] if the process maps no template of these mounts, and an error if the process cannot be
/// inspected.
pub fn record(
    pid: u32,
    mounts: &[Mount],
    duration: Duration,
    stop: &AtomicBool,
) -> Result<(Digest, BTreeMap<String, Used>)> {
    let inodes = Inodes::of(mounts)?;
    let zeros = ZeroMemory::new(&inodes);
    let end = Instant::now() + duration;
    let mut first = None;
    let mut files: BTreeMap<String, (Seen, Used)> = BTreeMap::new();
    loop {
        let begin = Instant::now();
        let found = match look(pid, &inodes, &zeros) {
            Ok(found) => found,
            // The process has exited.
            Err(error) if error.code() == Code::NotFound => None,
            Err(error) if first.is_some() => {
                log::warn!("the recording ends early: {error}");
                None
            }
            Err(error) => return Err(error),
        };
        let Some((process, maps)) = found else { break };
        for (map, touched, written) in maps {
            let seen_first = first.get_or_insert((process, map.digest));
            if *seen_first != (process, map.digest) {
                // Another process with the same id, or another template that the process maps too.
                continue;
            }
            let (seen, used) = files.entry(map.file).or_default();
            add(seen, &mut used.touched, touched);
            used.written = joined(used.written.drain(..).chain(written).collect());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::Relaxed) {
            break;
        }
        // A scan holds the lock of the address space, which the process needs to change its mappings.
        let pause = INTERVAL.max(begin.elapsed() * MIN_PAUSE_FACTOR);
        thread::sleep(pause.min(left));
    }
    let (_, digest) = first.ok_or_else(|| {
        Error::not_found(format!("process {pid} maps no template of a mount on this host"))
            .hint("run 'stencil ps' to list the clones")
    })?;
    Ok((digest, files.into_iter().map(|(name, (_, used))| (name, used)).collect()))
}

/// Removes the pages of these files that no process maps from the page cache, except pages that another processor has
/// just read. Does nothing unless the caller is root: the kernel shows other users all pages as resident. A page of a
/// large folio of the cache is mapped together with all others of the folio, so the page tables of a clone would show
/// pages that the clone never used. The kernel reads dropped pages again in small folios.
///
/// # Errors
/// Returns an error if a file cannot be opened or mapped.
pub fn drop_unmapped(dir: &Path, files: &[TemplateFile]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for file in files.iter().filter(|file| file.kind.is_memory() && file.size > Bytes::ZERO) {
        let path = dir.join(&file.name);
        let fail = |e| Error::io("cannot drop the template from the page cache", &path, e);
        let opened = File::open(&path).map_err(fail)?;
        let length = Bytes::new(file.size.get().next_multiple_of(PAGE_SIZE));
        let view = Mapping::new(&Request::view(opened.as_fd(), length)).map_err(fail)?;
        // Touching a page must not read others.
        view.advise_all(Advice::Random).map_err(fail)?;
        for cached in cachestat::in_core(&view)? {
            // MADV_PAGEOUT drops the pages that this mapping has in its page tables.
            let dropped = view.advise(cached.clone(), Advice::PopulateRead);
            dropped.and_then(|()| view.advise(cached, Advice::PageOut)).map_err(fail)?;
        }
    }
    Ok(())
}

/// A mapping of a template, and its used and copied pages, as pages of the file in ascending order.
type Look = (TemplateMapping, Vec<Range<u64>>, Vec<Range<u64>>);

/// Reads the page tables of a process; `None` if the process maps no template.
pub(super) fn look(
    pid: u32,
    inodes: &Inodes,
    zeros: &ZeroMemory<'_>,
) -> Result<Option<(ProcessId, Vec<Look>)>> {
    let Some(mut clone) = find::look_at(pid, inodes)? else { return Ok(None) };
    let pagemap = Pagemap::open(pid)?;
    if !clone.process().is_alive() {
        return Ok(None);
    }
    if clone.maps.len() > 1 {
        zeros.add(&mut clone.maps, || Ok(procfs::maps(pid, |_, _| true)?.unwrap_or_default()))?;
    }
    let process = clone.process();
    let mut looks = Vec::with_capacity(clone.maps.len());
    for map in clone.maps {
        let present = Query { all: Categories::FILE | Categories::PRESENT, ..Query::default() };
        let clean = pagemap.scan(map.range(), &present)?.into_iter().map(|region| region.range);
        let copied = pagemap.dirty(map.range())?.into_iter().map(|copy| copy.range);
        let page = |address: u64| (map.offset.get() + address - map.start) / PAGE_SIZE;
        let pages = |range: Range<u64>| page(range.start)..page(range.end);
        let written: Vec<_> = joined(copied.map(pages).collect());
        let touched = joined(clean.map(pages).chain(written.iter().cloned()).collect());
        looks.push((map, touched, written));
    }
    Ok(Some((process, looks)))
}

/// Returns the number of pages of ranges that do not overlap.
pub fn count(ranges: &[Range<u64>]) -> PageCount {
    ranges.iter().map(|range| PageCount::new(range.end - range.start)).sum()
}

/// Adds the pages of a scan to those that were found before, and the new ones to the end of `order`.
fn add(seen: &mut Seen, order: &mut Vec<Range<u64>>, look: Vec<Range<u64>>) {
    let new = subtract(&look, seen);
    if !new.is_empty() {
        order.extend(new.iter().cloned());
        *seen = joined(seen.iter().cloned().chain(new).collect());
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "the lists are of ranges")]
mod tests {
    use super::*;

    #[test]
    fn pages_are_recorded_once_in_the_order_of_their_first_use() {
        let (mut seen, mut order) = (Seen::new(), Vec::new());
        add(&mut seen, &mut order, vec![10..20, 40..41]);
        add(&mut seen, &mut order, vec![5..12, 15..25, 40..42]);
        add(&mut seen, &mut order, vec![5..25]);
        assert_eq!(order, [10..20, 40..41, 5..10, 20..25, 41..42]);
        assert_eq!(seen, [5..25, 40..42]);
    }
}
