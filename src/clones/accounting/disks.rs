//! RAM that the disks of clones take, where they lie in a file system that has no other place.

use std::collections::HashMap;

use super::process::Measured;
use super::residency;
use crate::clones::family::Families;
use crate::clones::find::CloneProcess;
use crate::clones::registry::Entry;
use crate::error::{Code, Result};
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// Adds the disks of these records to whoever of the clones' processes has them: the recorded one, else another one that
/// the clone's command has started. Each disk is counted once.
///
/// # Errors
/// When a disk cannot be looked at.
pub fn add(clones: &mut [(CloneProcess, Measured)], entries: &[Entry]) -> Result<()> {
    let places = clones.iter().enumerate();
    let mut places: HashMap<ProcessId, usize> =
        places.flat_map(|(at, (clone, _))| clone.processes().map(move |its| (its, at))).collect();
    let mut others = vec![];
    for entry in entries.iter().filter(|entry| !entry.disks.is_empty()) {
        match entry.process().and_then(|its| places.remove(&its)) {
            Some(at) => clones[at].1.memory.disk_bytes += in_memory(entry)?,
            None => others.push(entry.clone()),
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    let families = Families::look(&others);
    for entry in &others {
        let family = families.of(entry);
        let at = family.iter().find_map(|its| places.get(its));
        if let Some(&at) = at {
            clones[at].1.memory.disk_bytes += in_memory(entry)?;
        }
    }
    Ok(())
}

/// Page cache of the clone's disks that cannot be written back. One that went with its clone takes none.
fn in_memory(entry: &Entry) -> Result<Bytes> {
    let mut sum = Bytes::ZERO;
    for path in entry.disks.iter().map(|name| entry.disk_path(name)) {
        match probe::file_system(&path) {
            Ok(its) if its.is_memory() => sum += residency::cached_file(&path)?,
            Err(error) if error.code() != Code::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(sum)
}
