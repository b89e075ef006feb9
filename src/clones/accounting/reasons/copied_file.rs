//! VMMs that map another file with the bytes of a template, so that its pages are in RAM a second time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::code::{Code, Reasons};
use crate::clones::accounting::process::runs_kvm;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::Wanted;
use crate::clones::registry;
use crate::control;
use crate::error::{Error, Result};
use crate::store::{Digest, Scratch, Template};
use crate::sys::memory::cachestat;
use crate::sys::memory::mapping::{Advice, Mapping, Request};
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::{procfs, tasks};
use crate::units::{Bytes, FileOffset, MemoryOffset, PAGE_SIZE, to_usize};

/// Number of pages that are compared first. Most files of the same size differ there.
const SAMPLED_PAGES: usize = 64;

/// Time limit of a comparison: a fixed part, and time for each GiB of the file. The server of a file may not respond.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(5);
const COMPARE_TIMEOUT_PER_GIB: Duration = Duration::from_secs(1);

/// A file that a VMM maps, with a path in `/proc` that opens it.
struct Candidate {
    path: PathBuf,
    size: u64,
}

pub fn add(survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let mut by_size: BTreeMap<u64, Vec<(Digest, usize)>> = BTreeMap::new();
    for template in survey.opened.values() {
        let Some(memory) = template.roles()?.memory else { continue };
        let index = template.find_file(&memory)?;
        by_size.entry(template.files()[index].size.get()).or_default().push((*template.digest(), index));
    }
    let candidates = Arc::new(candidates(by_size.keys().copied().collect(), survey.inodes.wanted()?)?);
    let largest = candidates.iter().map(|candidate| candidate.size).max().unwrap_or_default();
    let gibs = u32::try_from(largest >> 30).unwrap_or(u32::MAX);
    let timeout = COMPARE_TIMEOUT + COMPARE_TIMEOUT_PER_GIB.saturating_mul(gibs);
    let opened = Arc::clone(&survey.opened);
    let (numbers, all) = ((0u32..).zip(candidates.iter()).map(|(number, _)| number), Arc::clone(&candidates));
    let looks = holders::look_at_each(numbers.collect(), timeout, move |number| {
        let candidate = &all[number as usize];
        let same_size = by_size.get(&candidate.size).into_iter().flatten();
        let templates = same_size.filter_map(|(digest, index)| Some((opened.get(digest)?, *index)));
        Some(templates.map(|(its, index)| (*its.digest(), candidate.compare(its, index))).collect())
    });
    for number in looks.unseen {
        let path = candidates[number as usize].path.display();
        log::warn!("{path} was not compared with templates: timed out after {} s", timeout.as_secs());
    }
    let mut copies: BTreeMap<Digest, Bytes> = BTreeMap::new();
    let found: Vec<(u32, Vec<(Digest, Bytes)>)> = looks.seen;
    for (digest, bytes) in found.into_iter().flat_map(|(_, found)| found) {
        *copies.entry(digest).or_default() += bytes;
    }
    for (digest, bytes) in copies {
        reasons.of_template(digest, Code::CopiedFile, bytes);
    }
    Ok(())
}

impl Candidate {
    /// Same as [`compare`]. A file that cannot be read to its end is no copy: its owner may truncate the file meanwhile.
    fn compare(&self, template: &Template, index: usize) -> Bytes {
        // The process may have exited since.
        let Ok(file) = File::open(&self.path) else { return Bytes::ZERO };
        compare(&file, self.size, template, index).unwrap_or_else(|error| {
            log::warn!("{} was not compared with templates: {error}", self.path.display());
            Bytes::ZERO
        })
    }
}

/// Returns the files of these sizes outside of Stencil mounts that a VMM maps to their end, each once. A VMM is a process
/// with a KVM virtual machine, or of a clone's record.
fn candidates(sizes: Vec<u64>, mapped: Wanted) -> Result<Vec<Candidate>> {
    // A template has its pages in the mount. An open in another file system of this kind may wait forever.
    let fuse = procfs::mounts()?.into_iter().filter(|line| line.fs_type.starts_with("fuse"));
    let control::Listing { mounts, dead, .. } = control::list()?;
    let detached = mounts.into_iter().chain(dead).map(|mount| mount.device);
    let skipped: HashSet<u64> = fuse.map(|line| line.dev).chain(detached).collect();
    let recorded: HashSet<u32> =
        registry::list()?.iter().filter(|entry| entry.is_alive()).map(|e| e.pid).collect();
    let sight = holders::look_at_all(SCAN_TIMEOUT, move |pid| {
        let is_plain = |dev: u64, ino: u64| ino != 0 && !skipped.contains(&dev) && !mapped.has(dev, ino);
        let lines = procfs::maps(pid, is_plain).map_err(io::Error::other)?.unwrap_or_default();
        let ends = |end: u64| sizes.iter().any(|size| size.next_multiple_of(PAGE_SIZE) == end);
        let mut found = lines.iter().filter(|line| ends(line.offset + line.len().get())).peekable();
        if found.peek().is_none() || !(recorded.contains(&pid) || runs_kvm(pid)) {
            return Ok(None);
        }
        let tid = tasks::thread_with_memory(pid)?.unwrap_or(pid);
        let file = |line: &procfs::MapLine| {
            let path = PathBuf::from(format!("/proc/{tid}/map_files/{:x}-{:x}", line.start, line.end));
            let size = std::fs::metadata(&path).ok().filter(|its| its.is_file())?.size();
            sizes.contains(&size).then_some(((line.dev, line.ino), Candidate { path, size }))
        };
        Ok(Some(found.filter_map(file).collect::<Vec<_>>()))
    })?;
    // A process that cannot be inspected has made the survey fail.
    let files: HashMap<(u64, u64), Candidate> = sight.seen.into_iter().flat_map(|(_, files)| files).collect();
    Ok(files.into_values().collect())
}

/// Returns the size of the file's pages in RAM if all of them, and at least one that is not zero, have the bytes of the
/// template; otherwise 0.
fn compare(file: &File, size: u64, template: &Template, index: usize) -> Result<Bytes> {
    let fail = |what: &str, e| Error::failed(what.to_owned()).because(e);
    // Files of hugetlbfs cannot be mapped by single pages.
    let Ok(view) = Mapping::new(&Request::view(file.as_fd(), Bytes::new(size).pages().bytes())) else {
        return Ok(Bytes::ZERO);
    };
    view.advise_all(Advice::Random).map_err(|e| fail("cannot disable readahead", e))?;
    let resident = cachestat::in_core(&view)?;
    let pages: Vec<u64> =
        resident.iter().flat_map(|range: &Range<u64>| range.clone().step_by(to_usize(PAGE_SIZE))).collect();
    let first = pages.iter().step_by((pages.len() / SAMPLED_PAGES).max(1));
    let (mut scratch, mut has_data) = (Scratch::default(), false);
    let (mut page, mut original) = (vec![0; to_usize(PAGE_SIZE)], vec![0; to_usize(PAGE_SIZE)]);
    for &offset in first.chain(&pages) {
        view.read(MemoryOffset::new(offset), &mut page)
            .map_err(|e| fail("cannot read a file that a VMM maps", e))?;
        original.fill(0);
        let length = to_usize((size - offset).min(PAGE_SIZE));
        template.read_range(index, FileOffset::new(offset), &mut scratch, &mut original[..length])?;
        if page != original {
            return Ok(Bytes::ZERO);
        }
        has_data |= page.iter().any(|byte| *byte != 0);
    }
    Ok(if has_data { Bytes::new(pages.len() as u64 * PAGE_SIZE) } else { Bytes::ZERO })
}
