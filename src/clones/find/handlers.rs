//! Page-fault handlers: processes that map a template only to copy its pages into the memory of another process, as a
//! handler for the UFFD backend of Firecracker does.
//!
//! A handler is a reader of the template and no clone. The process that it serves has anonymous memory, filled by
//! `UFFDIO_COPY`: it maps no template, and shares no page. It is identified by the userfaultfd that both have open.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::{CloneProcess, Inspections};
use crate::error::Result;
use crate::store::Digest;
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::memory::userfault::{self, Userfaultfd};
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::procfs;
use crate::units::Bytes;

/// A process that a page-fault handler serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServedProcess {
    /// Process id.
    pub pid: u32,
    /// Name of the command.
    pub command: String,
    /// Anonymous memory of the process in RAM: its copies of template pages, and its other memory.
    pub private_bytes: Bytes,
}

/// A page-fault handler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Handler {
    /// Process id.
    pub pid: u32,
    /// Name of the command.
    pub command: String,
    /// Template of the first mapping.
    pub digest: Digest,
    /// Anonymous memory and page tables of the handler itself.
    pub memory_bytes: Bytes,
    /// The processes that it serves; empty if they have ended or closed their descriptor.
    pub serves: Vec<ServedProcess>,
}

impl Handler {
    /// Describes the handler and the processes that it serves.
    pub fn describe(&self) -> String {
        let handler = format!(
            "process {} ({}) is a page-fault handler of template {}",
            self.pid,
            self.command,
            self.digest.short()
        );
        match served_list(&self.serves) {
            Some(served) => format!("{handler}; the memory of {served} is a copy and shares no page"),
            None => handler,
        }
    }
}

/// Names the processes that a handler serves, with their memory; `None` if there are none.
pub fn served_list(serves: &[ServedProcess]) -> Option<String> {
    let name = |its: &ServedProcess| format!("process {} ({}, {})", its.pid, its.command, its.private_bytes);
    (!serves.is_empty()).then(|| serves.iter().map(name).collect::<Vec<_>>().join(", "))
}

/// Removes the page-fault handlers from a list of clones, and returns them. `can_be` returns false for a clone that is
/// known not to be one.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn take_out(
    clones: &mut Vec<CloneProcess>,
    can_be: impl Fn(&CloneProcess) -> bool,
) -> Result<Vec<Handler>> {
    take_out_again(clones, can_be, SCAN_TIMEOUT, &Inspections::default())
}

/// Returns the page-fault handler that a process is; `None` for a clone.
///
/// # Errors
/// Same as [`take_out`].
pub fn handler(clone: &CloneProcess) -> Result<Option<Handler>> {
    Ok(take_out(&mut vec![clone.clone()], |_| true)?.pop())
}

/// Same as [`take_out`] with another time limit for each process. A process that an earlier search still inspects is not
/// inspected again. A process that cannot be inspected is left in the list.
///
/// # Errors
/// Same as [`take_out`].
pub fn take_out_again(
    clones: &mut Vec<CloneProcess>,
    can_be: impl Fn(&CloneProcess) -> bool,
    timeout: Duration,
    inspections: &Inspections,
) -> Result<Vec<Handler>> {
    let skipped = inspections.processes().clone();
    let possible = clones.iter().filter(|clone| can_be(clone) && !skipped.contains(&clone.pid));
    let starts: HashMap<u32, u64> =
        possible.filter_map(|clone| Some((clone.pid, clone.maps.first()?.start))).collect();
    if starts.is_empty() {
        return Ok(vec![]);
    }
    let files: HashSet<(u64, u64)> =
        clones.iter().flat_map(|clone| &clone.maps).map(|map| (map.dev, map.ino)).collect();
    let pids = starts.keys().copied().collect();
    let running = inspections.clone();
    let look = move |pid| {
        running.run(pid, || {
            let tracks = Pagemap::open(pid).and_then(|pagemap| pagemap.tracks_writes(starts[&pid]));
            if tracks.unwrap_or(false) {
                return Ok(None);
            }
            Candidate::of(pid, |dev, ino| files.contains(&(dev, ino))).map_err(std::io::Error::other)
        })
    };
    let mut handlers = Vec::new();
    for (pid, candidate) in holders::look_at_these(pids, timeout, Arc::new(look)).seen {
        let Some(serves) = candidate.serves(pid, timeout, inspections)? else { continue };
        let Some(index) = clones.iter().position(|clone| clone.pid == pid) else { continue };
        let Some(status) = procfs::status(pid)? else { continue };
        let clone = clones.remove(index);
        let memory_bytes = status.rss_anon + status.page_tables;
        handlers.extend(clone.maps.first().map(|map| Handler {
            pid,
            command: status.name,
            digest: map.digest,
            memory_bytes,
            serves,
        }));
    }
    Ok(handlers)
}

/// Returns the processes whose page faults this process handles; `None` if it is no page-fault handler. Without such a
/// process, only a process that cannot write to its template mappings is one, because it has copied no page.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed or the mappings of the process cannot be read.
pub fn served_by(pid: u32, is_template: impl Fn(u64, u64) -> bool) -> Result<Option<Vec<ServedProcess>>> {
    let candidate = Candidate::of(pid, is_template)?;
    candidate.map_or(Ok(None), |its| its.serves(pid, SCAN_TIMEOUT, &Inspections::default()))
}

/// A process that has a userfaultfd and none of its own memory registered.
struct Candidate {
    descriptors: Vec<Userfaultfd>,
    may_write: bool,
}

impl Candidate {
    fn of(pid: u32, is_template: impl Fn(u64, u64) -> bool) -> Result<Option<Candidate>> {
        let descriptors = userfault::userfaultfds(pid);
        // A process whose own memory is registered may handle its own faults, or track its writes.
        if descriptors.is_empty() || userfault::is_registered(pid) {
            return Ok(None);
        }
        let lines = procfs::maps(pid, is_template)?.unwrap_or_default();
        Ok(Some(Candidate { descriptors, may_write: lines.iter().any(|line| line.perms.contains('w')) }))
    }

    fn serves(
        self,
        pid: u32,
        timeout: Duration,
        inspections: &Inspections,
    ) -> Result<Option<Vec<ServedProcess>>> {
        let Candidate { descriptors, may_write } = self;
        let mut skipped = inspections.processes().clone();
        skipped.insert(pid);
        let running = inspections.clone();
        let inspect = move |other| {
            let theirs = userfault::userfaultfds(other);
            let shares =
                theirs.iter().any(|its| descriptors.iter().any(|ours| userfault::is_same(*ours, *its)));
            if !shares || !userfault::is_registered(other) {
                return Ok(None);
            }
            let status = procfs::status(other).map_err(std::io::Error::other)?;
            Ok(status.map(|status| (status.name, status.rss_anon)))
        };
        let sight = holders::look_at_all(timeout, move |other| {
            if skipped.contains(&other) { Ok(None) } else { running.run(other, || inspect(other)) }
        })?;
        let served = |(pid, (command, private_bytes))| ServedProcess { pid, command, private_bytes };
        let served: Vec<ServedProcess> = sight.seen.into_iter().map(served).collect();
        Ok(if served.is_empty() && may_write { None } else { Some(served) })
    }
}
