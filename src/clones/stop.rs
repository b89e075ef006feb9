//! Ends clones: asked first, then made to.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use super::qmp::Qmp;
use super::registry::{Entry, Kind};
use crate::error::{Error, Result};

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
    let mut outcome: Vec<How> = Vec::with_capacity(entries.len());
    let mut problem = None;
    for entry in entries {
        let processes = entry.processes();
        outcome.push(if processes.is_empty() { How::Gone } else { How::Stopped });
        for process in processes {
            if let Err(error) = process.signal(Signal::TERM) {
                problem = problem.or(Some(error));
            }
        }
    }
    wait_all(entries, Instant::now() + grace / 2);
    for entry in entries.iter().filter(|e| e.kind == Kind::Qemu && e.is_alive()) {
        // Whoever holds its QMP session, or a QEMU that hangs: SIGKILL comes next.
        let quit = Qmp::connect(&entry.qmp_path()).and_then(|mut qmp| qmp.run("quit", json!({})));
        quit.map(drop).unwrap_or_else(|error| log::info!("clone {}: {error}", entry.id));
    }
    wait_all(entries, Instant::now() + grace / 2);
    for (entry, how) in entries.iter().zip(&mut outcome) {
        if !entry.processes().is_empty() {
            *how = How::Killed;
        }
    }
    // Killed together, then waited for one by one.
    for process in entries.iter().filter(|e| e.is_alive()).flat_map(Entry::processes) {
        process.signal(Signal::KILL)?;
    }
    for entry in entries {
        if let Err(error) = entry.destroy() {
            problem = problem.or_else(|| Some(error.context(format!("clone {}", entry.id))));
        }
    }
    match problem {
        Some(error) => Err(Error::remedy(error, "run stencil stop again; stencil ps shows what is left")),
        None => Ok(outcome),
    }
}

/// Waits until none of them lives, or the deadline.
fn wait_all(entries: &[Entry], deadline: Instant) {
    for process in entries.iter().filter_map(Entry::process) {
        // What cannot be watched is killed later.
        let _ = process.wait_gone(deadline.saturating_duration_since(Instant::now()));
    }
}
