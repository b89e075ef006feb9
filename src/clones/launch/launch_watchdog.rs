//! The watchdog of a launch, a process that outlives the launcher: removes the clones of a launcher that was killed, or
//! records the exit statuses of the clones after a successful launch.
//!
//! The launcher holds the write end of the watchdog's standard input. When that end is closed, for whatever reason, the
//! watchdog kills all clones of a launch that was not committed. If the launch was committed, the watchdog opens a
//! pidfd of each clone, reports this by closing its standard output, and runs until the last clone has exited. The
//! kernel reports the exit status of a process to a process other than its parent only through a pidfd that was opened
//! before the process was reaped.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use crate::clones::helper_process::session;
use crate::clones::launch::worker;
use crate::clones::registry::{self, Ending, Entry, Launch};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::process::exit_status::ExitStatus;
use crate::sys::process::inherited;
use crate::sys::process::session::Child;

/// The argument that makes this program a watchdog.
pub const ARGUMENT: &str = "launch-watchdog";

/// Message that the watchdog writes before it closes its standard output, if it keeps running.
const STAYS: &[u8] = b"stays\n";

/// The watchdog of a launch. Dropping this value tells the watchdog that the launch is over, and waits until the
/// watchdog has removed the clones or watches them.
pub struct Watchdog {
    child: Child,
    input: Option<PipeWriter>,
    output: PipeReader,
}

impl Watchdog {
    /// Returns the process of the watchdog.
    ///
    /// # Errors
    /// Returns an error if the watchdog has exited.
    pub fn process(&self) -> Result<ProcessId> {
        let process = ProcessId::of(self.child.id())?;
        process.ok_or_else(|| Error::failed("the watchdog of the launch exited"))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.input.take());
        let mut message = Vec::new();
        let _ = self.output.read_to_end(&mut message);
        if message.is_empty() {
            let _ = self.child.wait();
        }
    }
}

/// Starts the watchdog of a launch.
///
/// # Errors
/// Returns an error if the process cannot be started.
pub fn start(launch: &Launch) -> Result<Watchdog> {
    let start = || {
        let ((its_input, input), (output, its_output)) = (std::io::pipe()?, std::io::pipe()?);
        let mut session = session();
        session.args([ARGUMENT, launch.id()]);
        let child = session.spawn([its_input.as_fd(), its_output.as_fd(), std::io::stderr().as_fd()])?;
        Ok(Watchdog { child, input: Some(input), output })
    };
    start().map_err(|e| Error::failed("cannot start the watchdog of the launch").because(e))
}

/// Runs the watchdog.
pub fn main(launch: Option<OsString>) -> ExitCode {
    let Some(launch) = launch.and_then(|l| l.into_string().ok()) else { return ExitCode::from(2) };
    let mut byte = [0];
    while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
    if !registry::is_held(&launch) {
        watch(&launch);
        return ExitCode::SUCCESS;
    }
    // A child between fork and exec cannot be attributed to a clone yet; this delay lets the exec complete.
    std::thread::sleep(Duration::from_millis(100));
    match registry::abort(&launch) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            crate::print_line!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Records the exit status of each clone of a launch; returns when all have exited.
fn watch(launch: &str) {
    // The watchdog needs one descriptor per clone, possibly more than the soft limit.
    drop(inherited::raise_limits());
    let entries = registry::of_launch(launch).unwrap_or_default();
    let Ok(exits) = epoll::create(CreateFlags::CLOEXEC) else { return };
    let mut clones = HashMap::new();
    for (number, (entry, process, pidfd)) in (0..).zip(entries.into_iter().filter_map(open)) {
        // Without this watch, only the exit record of this clone is missing.
        if let Err(error) = epoll::add(&exits, &pidfd, EventData::new_u64(number), EventFlags::IN) {
            log::warn!("cannot watch clone {}: {error}", entry.id);
            continue;
        }
        clones.insert(number, (entry, process, pidfd));
    }
    if clones.is_empty() {
        return;
    }
    let _ = std::io::stdout().write_all(STAYS);
    // Otherwise the caller's output would stay open for the lifetime of the clones.
    if worker::leave_standard_streams().is_err() {
        return;
    }
    let mut events = Vec::with_capacity(256);
    while !clones.is_empty() {
        events.clear();
        match epoll::wait(&exits, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let ended = events.iter().filter_map(|event| {
            // Dropping the descriptor removes it from the epoll instance.
            let (entry, process, pidfd) = clones.remove(&event.data.u64())?;
            Some((entry, Ending::now(ExitStatus::read(process, &pidfd))))
        });
        // Fails if the clones were removed; their exit records are then not needed.
        let _ = registry::save_endings(ended);
    }
}

fn open(entry: Entry) -> Option<(Entry, ProcessId, OwnedFd)> {
    let process = entry.process()?;
    // A clone that has just exited is still a zombie, which the launcher has not reaped yet.
    let pidfd = process.open_unreaped().ok()??;
    Some((entry, process, pidfd))
}
