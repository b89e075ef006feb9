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
use crate::clones::registry;
use crate::control;
use crate::error::{Error, Result};
use crate::store::Target;
use crate::sys::files::stream::Sink;
use crate::units::{PAGE_SIZE, PageCount, to_usize};

/// Time after which a named pipe without a reader is an error.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// Arguments of `stencil dirty`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil dirty c1a2b3c4
  stencil dirty c1a2b3c4 --ranges
  stencil dirty 4711 --bitmap dirty.bitmap")]
pub struct DirtyArgs {
    /// Id or process id of the clone
    #[arg(value_name = "CLONE")]
    clone: String,
    /// List the ranges of dirty pages, in pages of the template's file
    #[arg(long, conflicts_with = "bitmap")]
    ranges: bool,
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
}

/// Measures the dirty pages of the clone, and returns the report.
///
/// # Errors
/// Returns `Code::NotFound` if the clone does not exist or maps no template.
pub fn run(args: &DirtyArgs, _global: &Global) -> Result<Done> {
    let pid = pid_of(&args.clone)?;
    let (clone, ranges) = accounting::dirty_of(pid, &control::mounts()?)?.ok_or_else(|| {
        Error::not_found(format!("process {pid} maps no template of a mount on this host"))
            .hint("run 'stencil ps' to list the clones")
    })?;
    if let Some(path) = &args.bitmap {
        let only = clone.maps.first().map(|map| &map.file);
        let only = only.filter(|file| clone.maps.iter().all(|map| map.file == **file)).map(String::as_str);
        let file = args.file.as_deref().or(only).unwrap_or("memory");
        let Some(map) = clone.maps.iter().find(|map| map.file == file) else {
            return Err(Error::not_found(format!("process {pid} does not map file '{file}'"))
                .hint("name a file of the template that the process maps: --file NAME"));
        };
        let bitmap = bitmap(&ranges, file, map.file_size.get().div_ceil(PAGE_SIZE));
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

fn bitmap(ranges: &[DirtyRange], file: &str, pages: u64) -> Vec<u8> {
    let mut bits = vec![0u8; to_usize(pages.div_ceil(8))];
    for range in ranges.iter().filter(|range| range.file == file) {
        for page in range.first_page..range.first_page + range.pages.get() {
            if let Some(byte) = bits.get_mut((page / 8) as usize) {
                *byte |= 1 << (page % 8);
            }
        }
    }
    bits
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
        if self.ranges.is_none() {
            write!(
                out,
                "{} dirty ({}), {} of them in swap",
                counted(self.dirty_pages.get(), "page", "pages"),
                self.dirty_pages.bytes(),
                self.swapped_pages.get()
            )?;
            if self.replaced_pages > PageCount::ZERO {
                write!(out, ", {} replaced by other memory", self.replaced_pages.get())?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::clones::dirty::*;

    #[test]
    fn sets_one_bit_for_each_page_lowest_bit_first() {
        let range = |first_page, pages| DirtyRange {
            file: "memory".into(),
            first_page,
            pages: PageCount::new(pages),
            address: None,
            swapped: false,
            replaced: false,
        };
        let other = DirtyRange { file: "rom".into(), ..range(3, 1) };
        assert_eq!(bitmap(&[range(0, 1), range(7, 3), other], "memory", 17), [0x81, 0x03, 0]);
    }
}
