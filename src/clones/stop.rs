//! Stops clones: requests their exit first, then kills them.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use super::qmp::Qmp;
use super::registry::process_tree::{self, ProcessTrees};
use super::registry::{self, Entry, Kind};
use crate::error::Result;
use crate::progress::Progress;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// How a clone was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// The clone had exited before.
    Gone,
    /// The clone exited on request.
    Stopped,
    /// The clone was killed.
    Killed,
}

/// Stops these clones in parallel, and removes their directories. Each process gets SIGTERM, a QEMU that does not exit
/// gets the QMP command `quit`, and each process that is still alive after `grace` is killed.
///
/// # Errors
/// Returns an error if a process does not exit after SIGKILL, or a directory cannot be removed. All other clones are
/// stopped.
pub fn stop(entries: &[Entry], grace: Duration, progress: &dyn Progress) -> Result<Vec<How>> {
    progress.start_count("stop", "clones", entries.len() as u64);
    let trees = ProcessTrees::scan(entries);
    let mut outcome: Vec<How> = Vec::with_capacity(entries.len());
    let mut running = vec![];
    for entry in entries {
        let processes = trees.of(entry);
        outcome.push(if processes.is_empty() { How::Gone } else { How::Stopped });
        for process in &processes {
            // A process that cannot be signalled cannot be killed either: `kill` below returns the error.
            let _ = process.signal(Signal::TERM);
        }
        running.push(processes);
    }
    wait_all(&mut running, Instant::now() + grace / 2, progress);
    for entry in entries.iter().filter(|e| e.kind == Kind::Qemu && e.is_alive()) {
        // If another program holds the QMP session or QEMU hangs, the process is killed below.
        let quit = Qmp::connect(&entry.qmp_path()).and_then(|mut qmp| qmp.run("quit", json!({})));
        quit.map(drop).unwrap_or_else(|error| log::info!("clone {}: {error}", entry.id));
    }
    wait_all(&mut running, Instant::now() + grace / 2, progress);
    let trees = ProcessTrees::scan(entries);
    for (entry, how) in entries.iter().zip(&mut outcome) {
        if !trees.of(entry).is_empty() {
            *how = How::Killed;
        }
    }
    // The directories of the clones that have exited are removed, even if others have not.
    let mut problem = process_tree::kill(entries).err();
    let left = problem.is_some().then(|| ProcessTrees::scan(entries));
    let gone = |entry: &&Entry| left.as_ref().is_none_or(|left| left.of(entry).is_empty());
    problem = problem.or(registry::remove_all(entries.iter().filter(gone)).err());
    registry::wait_for_watchdogs(entries);
    progress.advance(Bytes::new(running.len() as u64));
    progress.finish();
    match problem {
        Some(error) => Err(error),
        None => Ok(outcome),
    }
}

/// Waits until all processes of all clones have exited, or until the deadline. Removes the clones that have ended.
fn wait_all(running: &mut Vec<Vec<ProcessId>>, deadline: Instant, progress: &dyn Progress) {
    running.retain(|processes| {
        // A process that cannot be waited for is killed later.
        let exits = |process: &&ProcessId| {
            process.wait_for_exit(deadline.saturating_duration_since(Instant::now())).unwrap_or(false)
        };
        let has_ended = processes.iter().filter(exits).count() == processes.len();
        if has_ended {
            progress.advance(Bytes::new(1));
        }
        !has_ended
    });
}
