//! Epochs of a process: moments since which its written pages are reported.
//!
//! An epoch holds the copied pages of its moment. The pages that are copied later are the difference of two scans. A page
//! that was copied before and is written again looks the same to both.
//!
//! A process can make its later writes visible: it registers its template mappings with a userfaultfd for asynchronous
//! write protection (`UFFD_FEATURE_WP_ASYNC`). A mark then write-protects the copied pages from outside, and the kernel
//! notes the next write to each of them without a message to any process. There is one such note for each page. So a
//! mark moves the notes that it resets into the new epoch, and the pages written since an epoch are the present notes
//! and those of all later epochs.

mod pages;
mod record;

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

pub use pages::DiscardedPages;
use pages::PageSet;
pub use record::sweep;
use record::{Epoch, Record};

use super::accounting::{self, DirtyRange};
use super::find::CloneProcess;
use crate::control::Mount;
use crate::control::runtime::is_plain_name;
use crate::error::{Error, Result};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::process::ProcessId;

/// Maximum number of epochs of a process. A further mark drops the oldest one.
const MAX_EPOCHS: usize = 16;

/// How the pages that were written since an epoch are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// By comparison with the copied pages of the epoch. A page that was copied before and written again is not found.
    Difference,
    /// By write protection. Every page that was written through the process's mappings is found.
    WriteProtect,
}

/// A new epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// Name of the epoch.
    pub name: String,
    /// How pages that are written from now on will be found.
    pub method: Method,
}

/// The pages that a process has changed since an epoch.
#[derive(Debug)]
pub struct Since {
    /// The process.
    pub clone: CloneProcess,
    /// Seconds since 1970 at the mark.
    pub marked: u64,
    /// How the pages were found.
    pub method: Method,
    /// Pages that are copied or replaced, and were written since.
    pub ranges: Vec<DirtyRange>,
    /// Pages that were copied or replaced at the mark, and are pages of the template again.
    pub discarded: Vec<DiscardedPages>,
}

/// Marks an epoch of a process; without a name, under the next unused number. Returns `None` if the process maps no
/// template or has exited.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) for a name that cannot be used, and an error if the process cannot
/// be inspected or the runtime directory cannot be used.
pub fn mark(pid: u32, name: Option<&str>, mounts: &[Mount]) -> Result<Option<Marked>> {
    sweep().unwrap_or_else(|error| log::warn!("{error}"));
    let Some(process) = ProcessId::of(pid)? else { return Ok(None) };
    name.map_or(Ok(()), check_name)?;
    // Before the scan, so that no other mark is between the scan and the write protection.
    let record = Record::create(process)?;
    let mut epochs = record.read()?;
    let name = new_name(name, &epochs, pid)?;
    let (clone, ranges) = match dirty_of(process, mounts) {
        Ok(Some(found)) => found,
        other => {
            if epochs.is_empty() {
                record.remove();
            }
            return other.map(|_| None);
        }
    };
    let pagemap = Pagemap::open(pid)?;
    let tracked = tracks_writes(&clone, &pagemap)?;
    if tracked && epochs.iter().any(|epoch| epoch.tracked) {
        // The protection resets notes that earlier epochs need. If this command ends before it has recorded them, only
        // the difference is left.
        let untracked: Vec<Epoch> =
            epochs.iter().map(|epoch| Epoch { tracked: false, ..epoch.clone() }).collect();
        record.write(&untracked)?;
    }
    let written = match tracked {
        true => PageSet::of_copies(&clone, |range| pagemap.protect_copies(range))?,
        false => PageSet::default(),
    };
    if !process.is_alive() {
        return Ok(None);
    }
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    epochs.push(Epoch { name: name.clone(), at, tracked, copied: PageSet::of(&ranges), written });
    let surplus = epochs.len().saturating_sub(MAX_EPOCHS);
    record.write(&epochs[surplus..])?;
    Ok(Some(Marked { name, method: method(tracked) }))
}

/// Returns the pages that a process has changed since an epoch; `None` if the process maps no template or has exited.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the process has no epoch with this name, and an error if
/// the process cannot be inspected or the runtime directory cannot be used.
pub fn since(pid: u32, name: &str, mounts: &[Mount]) -> Result<Option<Since>> {
    let Some(process) = ProcessId::of(pid)? else { return Ok(None) };
    let Some(record) = Record::open(process)? else { return Err(no_epoch(pid, name, &[])) };
    let epochs = record.read()?;
    let Some(place) = epochs.iter().position(|epoch| epoch.name == name) else {
        return Err(no_epoch(pid, name, &epochs));
    };
    let Some((clone, ranges)) = dirty_of(process, mounts)? else { return Ok(None) };
    let (epoch, later) = (&epochs[place], &epochs[place + 1..]);
    let pagemap = Pagemap::open(pid)?;
    let tracked = tracks_writes(&clone, &pagemap)? && epochs[place..].iter().all(|epoch| epoch.tracked);
    let mut written = PageSet::default();
    if tracked {
        written = PageSet::of_copies(&clone, |range| pagemap.written_copies(range))?;
        later.iter().for_each(|later| written.add(&later.written));
    }
    if !process.is_alive() {
        return Ok(None);
    }
    let discarded = epoch.copied.files_without(&PageSet::of(&ranges));
    let mut unchanged = epoch.copied.without(&written);
    if tracked {
        // Other memory over the template is not write-protected.
        unchanged.remove_replaced();
    }
    let ranges = ranges.iter().flat_map(|range| unchanged.rest_of(range)).collect();
    Ok(Some(Since { clone, marked: epoch.at, method: method(tracked), ranges, discarded }))
}

impl Method {
    /// Returns the name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Method::Difference => "difference",
            Method::WriteProtect => "write-protect",
        }
    }
}

fn method(tracked: bool) -> Method {
    if tracked { Method::WriteProtect } else { Method::Difference }
}

fn dirty_of(process: ProcessId, mounts: &[Mount]) -> Result<Option<(CloneProcess, Vec<DirtyRange>)>> {
    let found = accounting::dirty_of(process.pid, mounts)?;
    // The process id may have been reused.
    Ok(found.filter(|(clone, _)| clone.process() == process))
}

/// Returns true if the process has registered all of its template mappings for asynchronous write protection.
fn tracks_writes(clone: &CloneProcess, pagemap: &Pagemap) -> Result<bool> {
    for map in &clone.maps {
        if !pagemap.tracks_writes(map.start)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn check_name(name: &str) -> Result<()> {
    match is_plain_name(name) {
        true => Ok(()),
        false => Err(Error::usage(format!("invalid name of an epoch: '{}'", name.escape_debug()))
            .hint("use letters, digits, '.', '_' and '-'")),
    }
}

fn new_name(name: Option<&str>, epochs: &[Epoch], pid: u32) -> Result<String> {
    let is_used = |name: &str| epochs.iter().any(|epoch| epoch.name == name);
    let Some(name) = name else {
        let numbers = epochs.iter().filter_map(|epoch| epoch.name.strip_prefix('e')?.parse::<u64>().ok());
        let next = numbers.max().map_or(Some(1), |last| last.checked_add(1));
        return Ok(format!("e{}", next.unwrap_or(0)));
    };
    if is_used(name) {
        return Err(Error::usage(format!("process {pid} has an epoch '{name}' already"))
            .hint("use another name, or --mark without a name"));
    }
    Ok(name.to_owned())
}

fn no_epoch(pid: u32, name: &str, epochs: &[Epoch]) -> Error {
    let known = joined_names(epochs);
    let error = Error::not_found(format!("process {pid} has no epoch '{}'", name.escape_debug()));
    error.hint(match known.is_empty() {
        true => format!("mark one: stencil dirty {pid} --mark"),
        false => format!("its epochs, the oldest first: {known}"),
    })
}

fn joined_names(epochs: &[Epoch]) -> String {
    epochs.iter().map(|epoch| epoch.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_and_never_used_twice() {
        let epoch = |name: &str| Epoch {
            name: name.to_owned(),
            at: 0,
            tracked: false,
            copied: PageSet::default(),
            written: PageSet::default(),
        };
        let epochs = [epoch("e2"), epoch("before"), epoch("ex"), epoch("e7")];
        assert_eq!(new_name(None, &[], 1).unwrap(), "e1");
        assert_eq!(new_name(None, &epochs, 1).unwrap(), "e8");
        assert_eq!(new_name(Some("after"), &epochs, 1).unwrap(), "after");
        assert!(new_name(Some("before"), &epochs, 1).is_err());
        for bad in ["", ".x", "a/b", "a b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        check_name("before.2").unwrap();
        assert_eq!(new_name(None, &[epoch(&format!("e{}", u64::MAX))], 1).unwrap(), "e0");
        assert_eq!(joined_names(&epochs), "e2, before, ex, e7");
    }
}
