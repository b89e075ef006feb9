//! Removes the resources of clones that have ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::entry::{Entry, Kind};
use super::layout::remove_directory;
use super::{ports, shared_record};
use crate::error::{Error, Result};

impl Entry {
    /// Removes the clone's disks, jail and directory, and releases its ports. Objects that do not exist are skipped.
    ///
    /// # Errors
    /// Returns an error if an object cannot be removed or the clone is of another PID namespace.
    pub fn remove(&self) -> Result<()> {
        self.expect_ours()?;
        if self.kind == Kind::Simulated {
            return shared_record::remove(&self.dir, &BTreeSet::from([self.index]));
        }
        // The record is removed last, because it alone names the disks, the jail and the ports.
        for path in self.disks.iter().map(|name| self.disk_path(name)) {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("cannot remove the disk of a clone", &path, e));
                }
                _ => {}
            }
        }
        ports::release(&self.id, &self.ports);
        self.jail.as_deref().map_or(Ok(()), remove_directory)?;
        remove_directory(&self.dir)
    }
}

/// Removes the resources of clones as [`Entry::remove`] does, and goes on after an error. The record of a simulated
/// launch is written once.
///
/// # Errors
/// Returns the first error.
pub fn remove_all<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Result<()> {
    let mut simulated: BTreeMap<&Path, BTreeSet<u32>> = BTreeMap::new();
    let mut problem = None;
    for entry in entries {
        if entry.kind == Kind::Simulated && !entry.is_foreign() {
            simulated.entry(&entry.dir).or_default().insert(entry.index);
        } else {
            problem = problem.or(entry.remove().err());
        }
    }
    for (directory, indexes) in simulated {
        problem = problem.or(shared_record::remove(directory, &indexes).err());
    }
    problem.map_or(Ok(()), Err)
}
