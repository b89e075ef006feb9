//! Warming: reads the pages of a working set into the page cache, in the order of their first use.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::clones::ranges::subtract;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::{TemplateFile, WorkingSet};
use crate::sys::memory::cachestat;
use crate::sys::memory::mapping::{Mapping, Request, Sharing};
use crate::sys::process::threads;
use crate::units::{Bytes, PAGE_SIZE, PageCount, to_usize};

/// Largest number of bytes of one read.
const CHUNK: u64 = 256 << 10;

/// Number of threads that read: enough to keep the processors decoding while others wait for the disk.
const THREADS: usize = 4;

/// Result of warming a working set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Warmed {
    /// Pages of the set.
    pub pages: PageCount,
    /// Pages of the set that were in the page cache before the reads. 0 if the caller is not root: mincore(2) reports
    /// all pages as resident to users who neither own nor may write the file, so the query is skipped.
    pub cached_pages: PageCount,
    /// Pages that were read.
    pub read_pages: PageCount,
    /// Duration of the reads.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub duration: Duration,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// A file of the template and its pages in the set, as byte ranges in the order of their first use.
struct SetFile {
    file: File,
    path: PathBuf,
    ranges: Vec<Range<u64>>,
}

impl SetFile {
    /// Maps the whole file, shared and read-only.
    fn map(&self) -> Result<Mapping> {
        let fail = |e| Error::io("cannot map", &self.path, e);
        let length = Bytes::new(self.file.metadata().map_err(fail)?.len().next_multiple_of(PAGE_SIZE));
        let request = Request { sharing: Sharing::Shared, ..Request::view(self.file.as_fd(), length) };
        Mapping::new(&request).map_err(fail)
    }

    /// Returns the parts of the ranges that are not in the page cache.
    fn missing(&self) -> Result<Vec<Range<u64>>> {
        if !rustix::process::geteuid().is_root() {
            // The kernel shows the page cache only to users who may write the file, and all pages as resident to
            // others.
            return Ok(self.ranges.clone());
        }
        let view = self.map()?;
        let mut missing = Vec::new();
        for range in &self.ranges {
            missing
                .extend(subtract(std::slice::from_ref(range), &cachestat::in_core_of(&view, range.clone())?));
        }
        Ok(missing)
    }
}

/// Reads the pages of `set` that are not in the page cache, from the template in directory `dir` of a mount. The
/// kernel reads through the same inodes as for clones. Stops early if `stop` is set.
///
/// # Errors
/// Returns an error if a file of the template cannot be opened or read.
pub fn warm(
    dir: &Path,
    files: &[TemplateFile],
    set: &WorkingSet,
    stop: &AtomicBool,
    progress: &dyn Progress,
) -> Result<Warmed> {
    let start = Instant::now();
    let files = open(dir, files, set)?;
    let (mut pages, mut chunks) = (0, Vec::new());
    for set_file in &files {
        pages += set_file.ranges.iter().map(|range| (range.end - range.start) / PAGE_SIZE).sum::<u64>();
        for missing in set_file.missing()? {
            let parts = (missing.start..missing.end).step_by(to_usize(CHUNK));
            chunks.extend(parts.map(|start| (set_file, start..(start + CHUNK).min(missing.end))));
        }
    }
    let to_read: u64 = chunks.iter().map(|(_, part)| part.end - part.start).sum();
    progress.start("warm", Some(Bytes::new(to_read)));
    let next = AtomicUsize::new(0);
    let read = Mutex::new(0);
    let done = threads::share(THREADS.min(chunks.len()), || {
        let mut buffer = vec![0; to_usize(CHUNK)];
        while let Some((SetFile { file, path, .. }, part)) = chunks.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let buffer = &mut buffer[..to_usize(part.end - part.start)];
            // The last page may end behind the file.
            let got = file.read_at(buffer, part.start).map_err(|e| cannot_read(path, e))?;
            let got = Bytes::new(got as u64);
            *read.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += got.get().div_ceil(PAGE_SIZE);
            progress.advance(got);
        }
        Ok(())
    });
    progress.finish();
    done?;
    Ok(Warmed {
        pages: PageCount::new(pages),
        cached_pages: PageCount::new(pages - to_read / PAGE_SIZE),
        read_pages: PageCount::new(read.into_inner().unwrap_or_default()),
        duration: start.elapsed(),
    })
}

/// Reads the pages of a working set and keeps them in memory as long as the returned mappings live. Stops early if
/// `stop` is set.
///
/// # Errors
/// Returns an error if a file of the template cannot be opened or mapped, or if its pages cannot be locked.
pub fn pin(dir: &Path, files: &[TemplateFile], set: &WorkingSet, stop: &AtomicBool) -> Result<Vec<Mapping>> {
    let pin = |file: SetFile| {
        let view = file.map()?;
        for range in file.ranges.iter().take_while(|_| !stop.load(Ordering::Relaxed)) {
            view.lock(range.clone()).map_err(|e| {
                Error::io("cannot lock the working set of the template in memory", &file.path, e)
                    .hint("raise the limit with 'ulimit -l unlimited', or free memory")
            })?;
        }
        Ok(view)
    };
    open(dir, files, set)?.into_iter().map(pin).collect()
}

fn open(dir: &Path, files: &[TemplateFile], set: &WorkingSet) -> Result<Vec<SetFile>> {
    let mut opened = Vec::new();
    for (name, pages) in &set.files {
        // A set that came from another store may name other files and pages.
        let Some(size) = files.iter().find(|file| file.name == *name).map(|file| file.size) else { continue };
        let end = Bytes::new(size.get().next_multiple_of(PAGE_SIZE));
        let in_file = pages.touched.iter().map(|extent| {
            let byte = |page: u64| page.saturating_mul(PAGE_SIZE).min(end.get());
            byte(extent.pages.start)..byte(extent.pages.end)
        });
        let ranges: Vec<_> = in_file.filter(|range| !range.is_empty()).collect();
        if ranges.is_empty() {
            continue;
        }
        let path = dir.join(name);
        let file = File::open(&path).map_err(|e| Error::io("cannot warm the template", &path, e))?;
        opened.push(SetFile { file, path, ranges });
    }
    Ok(opened)
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::io("cannot read the working set of the template", path, error)
        .hint("run 'stencil status' to see the state of the mount, and 'stencil verify' to find damage")
}
