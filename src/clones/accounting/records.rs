//! The records of clones, by their process.

use std::collections::HashMap;

use crate::clones::find::CloneProcess;
use crate::clones::registry::{Entry, Kind};
use crate::sys::process::ProcessId;

/// The records of clones by their process.
pub type Records<'a> = HashMap<ProcessId, &'a Entry>;

/// Returns these records by their process; records without a process are skipped.
pub fn records_by_process(entries: &[Entry]) -> Records<'_> {
    entries.iter().filter_map(|entry| Some((entry.process()?, entry))).collect()
}

/// Returns the record of a clone. The record may name any process of the clone's address space.
pub fn record_of<'a>(clone: &CloneProcess, records: &Records<'a>) -> Option<&'a Entry> {
    clone.processes().find_map(|process| records.get(&process).copied())
}

/// Returns true for a simulated clone.
pub fn is_simulated(clone: &CloneProcess, records: &Records) -> bool {
    record_of(clone, records).is_some_and(|entry| matches!(entry.kind, Kind::Simulated))
}
