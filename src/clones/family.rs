//! The processes that belong to a clone: the one in its record, and for a command all that it has started.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::registry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::procfs;

/// What every process of a command clone has in its environment, followed by the clone's folder.
const MARK: &[u8] = b"STENCIL_DIR=";

/// How long a killed process may take to go.
const LAST_PATIENCE: Duration = Duration::from_secs(10);

/// Who belongs to which clone, found by one look at all processes.
#[derive(Debug)]
pub struct Families(HashMap<Vec<u8>, Vec<ProcessId>>);

impl Families {
    /// Looks for the families of these clones.
    pub fn look(entries: &[Entry]) -> Families {
        let mut families = HashMap::new();
        if entries.iter().any(may_have_others) {
            for pid in procfs::pids().unwrap_or_default() {
                // One that may not be looked into, or has gone, is none of ours.
                let Ok(bytes) = fs::read(format!("/proc/{pid}/environ")) else { continue };
                let Some(dir) = bytes.split(|b| *b == 0).find_map(|word| word.strip_prefix(MARK)) else {
                    continue;
                };
                if let Ok(Some(process)) = ProcessId::of(pid) {
                    families.entry(dir.to_vec()).or_insert_with(Vec::new).push(process);
                }
            }
        }
        Families(families)
    }

    /// The living processes of one of them.
    pub fn of(&self, entry: &Entry) -> Vec<ProcessId> {
        let mut all: Vec<ProcessId> = entry.process().into_iter().collect();
        if may_have_others(entry) {
            let others = self.0.get(entry.dir.as_os_str().as_encoded_bytes());
            all.extend(others.into_iter().flatten().filter(|p| Some(**p) != entry.process()));
        }
        all.retain(ProcessId::is_alive);
        all
    }
}

/// A worker is its zygote's child and dies with it; a QEMU starts nothing, but may not be noted yet.
fn may_have_others(entry: &Entry) -> bool {
    match entry.kind {
        Kind::Simulated => false,
        Kind::Qemu => entry.pid == 0,
        Kind::Command => true,
    }
}

/// The living processes of the clone with this folder that its record does not name.
pub fn of_folder(dir: &Path) -> Vec<ProcessId> {
    let wanted = [MARK, dir.as_os_str().as_encoded_bytes()].concat();
    let is_it = |pid: &u32| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|bytes| bytes.split(|b| *b == 0).any(|word| word == wanted))
    };
    let pids = procfs::pids().unwrap_or_default();
    let found = pids.into_iter().filter(is_it).filter_map(|pid| ProcessId::of(pid).ok()?);
    found.filter(ProcessId::is_alive).collect()
}

/// Kills all processes of these clones and waits until they are gone.
///
/// # Errors
/// When one may not be killed, or does not die.
pub fn kill(entries: &[Entry]) -> Result<()> {
    // One that was forked during a look is found by the next one.
    for _ in 0..5 {
        let families = Families::look(entries);
        let doomed: Vec<ProcessId> = entries.iter().flat_map(|e| families.of(e)).collect();
        if doomed.is_empty() {
            return Ok(());
        }
        // All are told before any is waited for.
        for process in &doomed {
            process.signal(Signal::KILL)?;
        }
        for process in &doomed {
            if !process.wait_gone(LAST_PATIENCE)? {
                return Err(Error::failed(format!("process {} does not die", process.pid)).remedy(
                    "it waits for an answer of a mount: see `stencil status`, or abort its fuse connection",
                ));
            }
        }
    }
    Err(Error::failed("a clone starts processes faster than they can be killed"))
}
