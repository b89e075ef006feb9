//! Ends clones: asked first, then made to.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use super::family::{self, Families};
use super::qmp::Qmp;
use super::registry::{self, Entry, Kind};
use crate::error::Result;
use crate::sys::process::ProcessId;

/// How a clone came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// It had ended before.
    Gone,
    /// It ended when it was asked to.
    Stopped,
    /// It had to be killed.
    Killed,
}

/// Ends these clones, all at a time, and removes their folders. Each gets SIGTERM, a QEMU that stays is told
/// to quit, and what still lives after `grace` is killed.
///
/// # Errors
/// When one does not even die, or its folder cannot be removed. The others are ended all the same.
pub fn stop(entries: &[Entry], grace: Duration) -> Result<Vec<How>> {
    let families = Families::look(entries);
    let mut outcome: Vec<How> = Vec::with_capacity(entries.len());
    let mut asked = vec![];
    for entry in entries {
        let processes = families.of(entry);
        outcome.push(if processes.is_empty() { How::Gone } else { How::Stopped });
        for process in processes {
            // Who may not be signalled cannot be killed either: the error comes from there.
            let _ = process.signal(Signal::TERM);
            asked.push(process);
        }
    }
    wait_all(&asked, Instant::now() + grace / 2);
    for entry in entries.iter().filter(|e| e.kind == Kind::Qemu && e.is_alive()) {
        // Whoever holds its QMP session, or a QEMU that hangs: SIGKILL comes next.
        let quit = Qmp::connect(&entry.qmp_path()).and_then(|mut qmp| qmp.run("quit", json!({})));
        quit.map(drop).unwrap_or_else(|error| log::info!("clone {}: {error}", entry.id));
    }
    wait_all(&asked, Instant::now() + grace / 2);
    let families = Families::look(entries);
    for (entry, how) in entries.iter().zip(&mut outcome) {
        if !families.of(entry).is_empty() {
            *how = How::Killed;
        }
    }
    // The folders of those that do end are removed, whatever the others do.
    let mut problem = family::kill(entries).err();
    let left = problem.is_some().then(|| Families::look(entries));
    let gone = |entry: &&Entry| left.as_ref().is_none_or(|left| left.of(entry).is_empty());
    for entry in entries.iter().filter(gone) {
        problem = problem.or(entry.remove().err());
    }
    registry::wait_for_watchdogs(entries);
    match problem {
        Some(error) => Err(error),
        None => Ok(outcome),
    }
}

/// Waits until none of them lives, or the deadline.
fn wait_all(processes: &[ProcessId], deadline: Instant) {
    for process in processes {
        // What cannot be watched is killed later.
        let _ = process.wait_gone(deadline.saturating_duration_since(Instant::now()));
    }
}
