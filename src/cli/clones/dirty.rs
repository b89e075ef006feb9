//! `stencil dirty`: reports the dirty pages of one clone.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::clones::accounting::{self, DirtyRange};
use crate::clones::counted;
use crate::clones::epochs::{self, DiscardedPages, Marked, Method, Since};
use crate::clones::registry;
use crate::control;
use crate::error::{Error, Result};
use crate::sanitize::utc;
use crate::store::Target;
use crate::sys::files::stream::Sink;
use crate::units::{PAGE_SIZE, PageCount, to_usize};

/// Time after which a named pipe without a reader is an error.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// Arguments of `stencil dirty`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil dirty 4711 --bitmap dirty.bitmap
  stencil dirty c1a2b3c4 --mark before
  stencil dirty c1a2b3c4 --since before --ranges")]
pub struct DirtyArgs {
    /// Id or process id of the clone
    #[arg(value_name = "CLONE")]
    clone: String,
    /// List the ranges of dirty pages, in pages of the template's file
    #[arg(long, conflicts_with = "bitmap")]
    ranges: bool,
    /// Mark an epoch and print its name: NAME, or the next of e1, e2, …
    #[arg(long, value_name = "NAME", num_args = 0..=1, conflicts_with_all = ["ranges", "bitmap", "since", "file"])]
    #[expect(clippy::option_option, reason = "absent, without a name, with a name")]
    mark: Option<Option<String>>,
    /// Report only pages that were written since an epoch
    #[arg(long, value_name = "EPOCH")]
    since: Option<String>,
    /// Write a bitmap of the file: one bit for each page, lowest bit first
    #[arg(long, value_name = "FILE")]
    bitmap: Option<PathBuf>,
    /// Replace the bitmap's file if it exists
    #[arg(long, requires = "bitmap")]
    force: bool,
    /// File of the template for --bitmap [default: the only one that the clone maps, or 'memory']
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
}

#[derive(Debug, Serialize)]
struct DirtyReport {
    pid: u32,
    dirty_pages: PageCount,
    swapped_pages: PageCount,
    replaced_pages: PageCount,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<Vec<DirtyRange>>,
    #[serde(flatten)]
    since: Option<SinceReport>,
}

/// What `--since` adds to a report.
#[derive(Debug, Serialize)]
struct SinceReport {
    epoch: String,
    /// Time of the mark, in RFC 3339.
    marked: String,
    method: Method,
    discarded_pages: PageCount,
    #[serde(skip_serializing_if = "Option::is_none")]
    discarded: Option<Vec<DiscardedPages>>,
}

/// The result of `--mark`.
#[derive(Debug, Serialize)]
struct MarkReport {
    pid: u32,
    epoch: String,
    method: Method,
}

/// Measures the dirty pages of the clone, and returns the report.
///
/// # Errors
/// Returns `Code::NotFound` if the clone does not exist or maps no template.
pub fn run(args: &DirtyArgs, _global: &Global) -> Result<Done> {
    let (pid, mounts) = (pid_of(&args.clone)?, control::mounts_and_dead()?);
    let no_clone = || {
        Error::not_found(format!("process {pid} maps no template of a mount on this host"))
            .hint("run 'stencil ps' to list the clones")
    };
    if let Some(name) = &args.mark {
        let Marked { name: epoch, method } =
            epochs::mark(pid, name.as_deref(), &mounts)?.ok_or_else(no_clone)?;
        return Ok(Done::report(MarkReport { pid, epoch, method }));
    }
    let (clone, ranges, since, discarded) = match &args.since {
        Some(epoch) => {
            let Since { clone, marked, method, ranges, discarded } =
                epochs::since(pid, epoch, &mounts)?.ok_or_else(no_clone)?;
            if method == Method::Difference {
                log::warn!("pages that were copied before the epoch and written again are not included");
            }
            let report = SinceReport {
                epoch: epoch.clone(),
                marked: utc(marked),
                method,
                discarded_pages: discarded.iter().map(|part| part.pages).sum(),
                discarded: args.ranges.then(|| discarded.clone()),
            };
            (clone, ranges, Some(report), discarded)
        }
        None => {
            let (clone, ranges) = accounting::dirty_of(pid, &mounts)?.ok_or_else(no_clone)?;
            (clone, ranges, None, vec![])
        }
    };
    if let Some(path) = &args.bitmap {
        let only = clone.maps.first().map(|map| &map.file);
        let only = only.filter(|file| clone.maps.iter().all(|map| map.file == **file)).map(String::as_str);
        let file = args.file.as_deref().or(only).unwrap_or("memory");
        let Some(map) = clone.maps.iter().find(|map| map.file == file) else {
            return Err(Error::not_found(format!("process {pid} does not map file '{file}'"))
                .hint("name a file of the template that the process maps: --file NAME"));
        };
        let dirty = ranges.iter().map(|range| (range.file.as_str(), range.first_page, range.pages));
        let discarded = discarded.iter().map(|part| (part.file.as_str(), part.first_page, part.pages));
        let of_file = dirty.chain(discarded).filter(|(its, ..)| *its == file);
        let bitmap =
            bitmap(of_file.map(|(_, first, pages)| (first, pages)), map.file_size.get().div_ceil(PAGE_SIZE));
        write(path, args.force, &bitmap)?;
    }
    let pages = |counts: fn(&DirtyRange) -> bool| -> PageCount {
        ranges.iter().filter(|range| counts(range)).map(|range| range.pages).sum()
    };
    Ok(Done::report(DirtyReport {
        pid,
        dirty_pages: pages(|_| true),
        swapped_pages: pages(|range| range.swapped),
        replaced_pages: pages(|range| range.replaced),
        ranges: args.ranges.then_some(ranges),
        since,
    }))
}

/// Writes the bitmap. Waits for the reader of a named pipe in the same way as `stencil export`.
fn write(path: &Path, replace: bool, bytes: &[u8]) -> Result<()> {
    let fail = |e| Error::io("cannot write the bitmap", path, e);
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => {
            Sink::open(path, Some(STALL_TIMEOUT), None)?.write_all(bytes).map_err(fail)
        }
        _ => {
            let mut target = Target::create(path, replace)?;
            target.file().write_all(bytes).map_err(fail)?;
            target.publish()
        }
    }
}

/// Returns the process of a clone, given as the id that `stencil clone` assigned or as a process id.
pub fn pid_of(clone: &str) -> Result<u32> {
    if let Some(entry) = registry::list()?.into_iter().find(|entry| entry.id == clone) {
        entry.expect_ours()?;
        return Ok(entry.pid);
    }
    clone.parse().map_err(|_| {
        Error::not_found(format!("no clone has the id '{clone}'")).hint("run 'stencil ps' to list the clones")
    })
}

/// Returns a bitmap of a file of `pages` pages, in which each range, of a first page and a number of pages, is set.
fn bitmap(ranges: impl Iterator<Item = (u64, PageCount)>, pages: u64) -> Vec<u8> {
    let mut bits = vec![0u8; to_usize(pages.div_ceil(8))];
    for (first, count) in ranges {
        for page in first..first.saturating_add(count.get()).min(pages) {
            if let Some(byte) = bits.get_mut((page / 8) as usize) {
                *byte |= 1 << (page % 8);
            }
        }
    }
    bits
}

impl Report for MarkReport {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.epoch)
    }
}

impl Report for DirtyReport {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for range in self.ranges.iter().flatten() {
            let swapped = if range.swapped { " swapped" } else { "" };
            let replaced = if range.replaced { " replaced" } else { "" };
            writeln!(out, "{} {}+{}{swapped}{replaced}", range.file, range.first_page, range.pages.get())?;
        }
        let since = self.since.as_ref();
        for part in since.and_then(|since| since.discarded.as_ref()).into_iter().flatten() {
            writeln!(out, "{} {}+{} discarded", part.file, part.first_page, part.pages.get())?;
        }
        if self.ranges.is_none() {
            let what = if since.is_some() { "changed" } else { "dirty" };
            write!(
                out,
                "{} {what} ({}), {} of them in swap",
                counted(self.dirty_pages.get(), "page", "pages"),
                self.dirty_pages.bytes(),
                self.swapped_pages.get()
            )?;
            if self.replaced_pages > PageCount::ZERO {
                write!(out, ", {} replaced by other memory", self.replaced_pages.get())?;
            }
            writeln!(out)?;
        }
        let Some(SinceReport { epoch, marked, method, discarded_pages, .. }) = since else { return Ok(()) };
        if self.ranges.is_none() {
            let discarded = counted(discarded_pages.get(), "page", "pages");
            let method = method.name();
            writeln!(out, "since epoch {epoch} of {marked}, by {method}; {discarded} discarded")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::clones::dirty::*;

    #[test]
    fn sets_one_bit_for_each_page_lowest_bit_first() {
        let ranges = [(0, PageCount::new(1)), (7, PageCount::new(3)), (16, PageCount::new(100))];
        assert_eq!(bitmap(ranges.into_iter(), 17), [0x81, 0x03, 0x01]);
    }
}
