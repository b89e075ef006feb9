//! SIGINT and SIGTERM end the running command; the error then removes everything on its way out.

use std::collections::BTreeSet;
use std::io;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use stencilfs::error::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Commands that a signal ends.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Starts to handle signals.
pub fn watch() -> Result<()> {
    let failed = |e: io::Error| Error::failed("cannot handle signals").because(e);
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(failed)?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            INTERRUPTED.store(true, Ordering::Release);
            for pid in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                // The command may have ended already.
                let _ = Pid::from_raw(*pid).map(|pid| kill_process(pid, Signal::TERM));
            }
        }
    });
    Ok(())
}

/// Fails after a signal.
pub fn check() -> Result<()> {
    match INTERRUPTED.load(Ordering::Acquire) {
        false => Ok(()),
        true => Err(Error::failed("interrupted by a signal")),
    }
}

/// Runs a command, which a signal ends.
pub fn output(command: &mut Command) -> Result<Output> {
    check()?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = command.spawn();
    let child = started.map_err(|e| Error::io("cannot run", command.get_program(), e))?;
    wait(child)
}

/// Waits for a child process. If this program gets a signal, the child is ended.
pub fn wait(child: Child) -> Result<Output> {
    // Process ids of Linux are positive and fit.
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    let output = child.wait_with_output();
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    check()?;
    output.map_err(|e| Error::failed("cannot wait for a command").because(e))
}
