//! Outlives the command that launches clones. If the command is killed, it clears up; if the launch is complete, it
//! notes how each clone ends.
//!
//! The command holds the other end of the watchdog's standard input. When that ends, for whatever reason, the watchdog ends
//! every clone that was not let go. When all were, it opens a pidfd of each, says so by closing its standard output, and
//! stays until the last of them has ended. Only a pidfd that was opened before a process is reaped tells its exit status
//! to a process that is not its parent.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::worker;
use crate::clones::registry::{self, Ending, Entry, Launch};
use crate::error::{Error, Result};
use crate::sys::exit_status::ExitStatus;
use crate::sys::inherited;
use crate::sys::process::{ProcessId, own_session};

/// The argument that makes this program a watchdog.
pub const ARGUMENT: &str = "launch-watchdog";

/// What the watchdog says before it closes its standard output, if it stays.
const STAYS: &[u8] = b"stays\n";

/// Tells the watchdog, when dropped, that the launch is over, and waits until it has cleared up or watches the clones.
pub struct Watchdog(Child);

impl Watchdog {
    /// Its process.
    ///
    /// # Errors
    /// When the kernel does not identify it.
    pub fn process(&self) -> Result<ProcessId> {
        let process = ProcessId::of(self.0.id())?;
        process.ok_or_else(|| Error::failed("the launch's watchdog has ended"))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let mut said = Vec::new();
        if let Some(mut its) = self.0.stdout.take() {
            let _ = its.read_to_end(&mut said);
        }
        if said.is_empty() {
            let _ = self.0.wait();
        }
    }
}

/// Starts the watchdog of a launch.
///
/// # Errors
/// When this program cannot be started.
pub fn start(launch: &Launch) -> Result<Watchdog> {
    let mut command = this_program();
    own_session(&mut command).args([ARGUMENT, launch.id()]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let child =
        command.spawn().map_err(|e| Error::failed("cannot start the launch's watchdog").because(e))?;
    Ok(Watchdog(child))
}

/// This very program, even if its file was replaced meanwhile.
pub fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    // Not the caller's folder, which somebody may want to unmount.
    command.current_dir("/").env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command
}

/// The watchdog's whole life.
pub fn main(launch: Option<OsString>) -> ExitCode {
    let Some(launch) = launch.and_then(|l| l.into_string().ok()) else { return ExitCode::from(2) };
    let mut byte = [0];
    while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
    if !registry::is_held(&launch) {
        watch(&launch);
        return ExitCode::SUCCESS;
    }
    // A child between fork and exec does not show whose it is: it gets the time to come through.
    std::thread::sleep(Duration::from_millis(100));
    match registry::abort(&launch) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("stencil: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Notes how each clone of a launch ends, until all have.
fn watch(launch: &str) {
    // More clones than the soft limit are more pidfds, too.
    drop(inherited::raise_limits());
    let entries = registry::list().unwrap_or_default();
    let mut clones: Vec<_> =
        entries.into_iter().filter(|entry| entry.launch == launch).filter_map(open).collect();
    if clones.is_empty() {
        return;
    }
    let _ = std::io::stdout().write_all(STAYS);
    // The caller's output is not held open for as long as a clone lives.
    if worker::leave_standard_streams().is_err() {
        return;
    }
    while !clones.is_empty() {
        let mut all: Vec<PollFd<'_>> =
            clones.iter().map(|(_, _, pidfd)| PollFd::new(pidfd, PollFlags::IN)).collect();
        match poll(&mut all, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let ended: Vec<bool> = all.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(all);
        let mut ended = ended.into_iter();
        clones.retain(|(entry, process, pidfd)| {
            let has_ended = ended.next().unwrap_or(false);
            if has_ended {
                // Without its folder, nobody asks how it ended.
                let _ = Ending::now(ExitStatus::read(*process, pidfd)).save(entry);
            }
            !has_ended
        });
    }
}

fn open(entry: Entry) -> Option<(Entry, ProcessId, std::os::fd::OwnedFd)> {
    let process = entry.process()?;
    // The launcher has not reaped a clone that ended a moment ago.
    let pidfd = process.open_unreaped().ok()??;
    Some((entry, process, pidfd))
}
