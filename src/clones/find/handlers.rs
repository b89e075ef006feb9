//! Page-fault handlers: processes that map a template only to copy its pages into the memory of another process, as a
//! handler for the UFFD backend of Firecracker does.
//!
//! A handler is a reader of the template and no clone. The process that it serves has anonymous memory, filled by
//! `UFFDIO_COPY`: it maps no template, and shares no page. It is identified by the userfaultfd that both have open.

use serde::Serialize;

use super::CloneProcess;
use crate::error::Result;
use crate::store::Digest;
use crate::sys::memory::userfault;
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::procfs;
use crate::units::Bytes;

/// A process that a page-fault handler serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Served {
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
    pub serves: Vec<Served>,
}

impl Handler {
    /// Describes the handler and the processes that it serves.
    pub fn describe(&self) -> String {
        let served = served_list(&self.serves).unwrap_or_else(|| "other processes".to_owned());
        format!(
            "process {} ({}) copies pages of template {} into the memory of {served}, which shares none of them",
            self.pid,
            self.command,
            self.digest.short()
        )
    }
}

/// Names the processes that a handler serves, with their memory; `None` if there are none.
pub fn served_list(serves: &[Served]) -> Option<String> {
    let name = |its: &Served| format!("process {} ({}, {})", its.pid, its.command, its.private_bytes);
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
    let mut handlers = Vec::new();
    let mut problem = None;
    clones.retain(|clone| {
        if problem.is_some() || !can_be(clone) {
            return true;
        }
        match handler(clone) {
            Ok(None) => true,
            Ok(Some(handler)) => {
                handlers.push(handler);
                false
            }
            Err(error) => {
                problem = Some(error);
                true
            }
        }
    });
    problem.map_or(Ok(handlers), Err)
}

fn handler(clone: &CloneProcess) -> Result<Option<Handler>> {
    let is_template = |dev, ino| clone.maps.iter().any(|map| (map.dev, map.ino) == (dev, ino));
    let (Some(serves), Some(map)) = (served_by(clone.pid, is_template)?, clone.maps.first()) else {
        return Ok(None);
    };
    let Some(status) = procfs::status(clone.pid)? else { return Ok(None) };
    let memory_bytes = status.rss_anon + status.page_tables;
    Ok(Some(Handler { pid: clone.pid, command: status.name, digest: map.digest, memory_bytes, serves }))
}

/// Returns the processes whose page faults this process handles; `None` if it is no page-fault handler. Without such a
/// process, only a process that cannot write to its template mappings is one, because it has copied no page.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed or the mappings of the process cannot be read.
pub fn served_by(pid: u32, is_template: impl Fn(u64, u64) -> bool) -> Result<Option<Vec<Served>>> {
    let descriptors = userfault::userfaultfds(pid);
    // A process whose own memory is registered may handle its own faults, or track its writes.
    if descriptors.is_empty() || userfault::is_registered(pid) {
        return Ok(None);
    }
    let sight = holders::look_at_all(SCAN_TIMEOUT, move |other| {
        let theirs = userfault::userfaultfds(other);
        let shares = theirs.iter().any(|its| descriptors.iter().any(|ours| userfault::are_one(*ours, *its)));
        if other == pid || !shares || !userfault::is_registered(other) {
            return Ok(None);
        }
        let status = procfs::status(other).map_err(std::io::Error::other)?;
        Ok(status.map(|status| (status.name, status.rss_anon)))
    })?;
    let served = |(pid, (command, private_bytes))| Served { pid, command, private_bytes };
    let served: Vec<Served> = sight.seen.into_iter().map(served).collect();
    let may_write = || -> Result<bool> {
        let lines = procfs::maps(pid, &is_template)?.unwrap_or_default();
        Ok(lines.iter().any(|line| line.perms.contains('w')))
    };
    Ok(if served.is_empty() && may_write()? { None } else { Some(served) })
}
