//! RAM of the clones' disks and jails that lie in a file system without other storage (tmpfs).

use std::collections::HashMap;

use super::process::Measured;
use super::residency;
use crate::clones::find::CloneProcess;
use crate::clones::registry::Entry;
use crate::clones::registry::process_tree::ProcessTrees;
use crate::error::{Code, Result};
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// Adds the disks and jails of these records to the clones: to the recorded process, otherwise to another process of the
/// clone's command. Each disk is counted once.
///
/// # Errors
/// Returns an error if the page cache of a disk cannot be measured.
pub fn add(clones: &mut [(CloneProcess, Measured)], entries: &[Entry]) -> Result<()> {
    let places = clones.iter().enumerate();
    let mut places: HashMap<ProcessId, usize> =
        places.flat_map(|(at, (clone, _))| clone.processes().map(move |its| (its, at))).collect();
    let mut others = vec![];
    for entry in entries.iter().filter(|entry| !entry.disks.is_empty() || entry.jail.is_some()) {
        match entry.process().and_then(|its| places.remove(&its)) {
            Some(at) => clones[at].1.memory.disk_bytes += in_memory(entry)?,
            None => others.push(entry.clone()),
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    let trees = ProcessTrees::scan(&others);
    for entry in &others {
        let processes = trees.of(entry);
        let at = processes.iter().find_map(|its| places.get(its));
        if let Some(&at) = at {
            clones[at].1.memory.disk_bytes += in_memory(entry)?;
        }
    }
    Ok(())
}

/// Returns the page cache of the clone's disks and jail that cannot be written back. A removed disk takes none.
fn in_memory(entry: &Entry) -> Result<Bytes> {
    let mut sum = entry.jail_bytes;
    for path in entry.disks.iter().map(|name| entry.disk_path(name)) {
        match probe::file_system(&path) {
            Ok(its) if its.is_memory() => sum += residency::cached_file(&path)?,
            Err(error) if error.code() != Code::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(sum)
}
