//! VMMs that map another file with the bytes of a template, so that its pages are in RAM a second time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

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
const FIRST_PAGES: usize = 64;

/// A file that a VMM maps, with a path in `/proc` that opens it.
struct Candidate {
    path: PathBuf,
    size: u64,
}

pub fn add(survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let mut by_size: BTreeMap<u64, Vec<(&Template, usize)>> = BTreeMap::new();
    for template in survey.opened.values() {
        let Some(memory) = template.roles()?.memory else { continue };
        let index = template.find_file(&memory)?;
        by_size.entry(template.files()[index].size.get()).or_default().push((template, index));
    }
    let mut copies: BTreeMap<Digest, Bytes> = BTreeMap::new();
    for candidate in candidates(by_size.keys().copied().collect(), survey.inodes.wanted()?)? {
        for (template, index) in by_size.get(&candidate.size).into_iter().flatten() {
            // The process may have exited since.
            let Ok(file) = File::open(&candidate.path) else { continue };
            let bytes = compare(&file, candidate.size, template, *index)?;
            *copies.entry(*template.digest()).or_default() += bytes;
        }
    }
    for (digest, bytes) in copies {
        reasons.of_template(digest, Code::CopiedFile, bytes);
    }
    Ok(())
}

/// Returns the files of these sizes outside of Stencil mounts that a VMM maps to their end, each once. A VMM is a process
/// with a KVM virtual machine, or of a clone's record.
fn candidates(sizes: Vec<u64>, mapped: Wanted) -> Result<Vec<Candidate>> {
    // A template has its pages in the mount. An open in another file system of this kind may wait forever.
    let fuse = procfs::mounts()?.into_iter().filter(|line| line.fs_type.starts_with("fuse"));
    let detached = control::mounts()?.into_iter().map(|mount| mount.device);
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
    let first = pages.iter().step_by((pages.len() / FIRST_PAGES).max(1));
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
