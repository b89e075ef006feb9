//! The watchdog (helper) of a capture: a process that restores the VM if the capture is killed.
//!
//! The capture sends one line for each step, before it takes the step, so that the helper knows of every change to the
//! VM. The helper restores the VM if its standard input ends before the capture has dismissed the helper.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};

use serde::{Deserialize, Serialize};

use super::restore::{SavedMicrovm, SavedState, retry, retry_while};
use crate::clones::helper_process::this_program;
use crate::clones::qmp::Qmp;
use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, inherit, own_session};
use crate::sys::socket::peer::expect_listener;

/// The argument that makes this program the watchdog of a capture.
pub const RESUME_ARGUMENT: &str = "capture-watchdog";

/// A message of the capture to its helper.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// The state of the VM before the first change.
    Before(Before),
    /// The pause is over.
    Over,
    /// The VM is restored.
    Done,
}

/// The state of a VM before the capture changed the VM.
#[derive(Debug, Serialize, Deserialize)]
pub enum Before {
    Qemu(SavedState),
    Firecracker(SavedMicrovm),
}

/// The helper process, which restores the VM if this process dies first.
#[derive(Debug)]
pub struct ResumeOnDeath(Child);

impl ResumeOnDeath {
    /// Starts a helper for the VM behind a QMP or API socket; `before` is the state to restore. The helper holds
    /// `inherited` under the same numbers until it exits; one of them is the lock of the VM.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    pub fn start(
        socket: &Path,
        vm: ProcessId,
        inherited: Vec<OwnedFd>,
        before: Before,
    ) -> Result<ResumeOnDeath> {
        let failed = |e| Error::failed("cannot start the watchdog of the VM").because(e);
        // The helper has another working directory.
        let socket = std::path::absolute(socket).map_err(failed)?;
        let mut command = this_program();
        own_session(&mut command).arg(RESUME_ARGUMENT).arg(socket);
        command.arg(vm.pid.to_string()).arg(vm.identity.to_string());
        for fd in inherited {
            inherit(&mut command, fd);
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(failed)?;
        let mut helper = ResumeOnDeath(child);
        helper.tell(&Message::Before(before)).map_err(failed)?;
        Ok(helper)
    }

    /// Duplicates the pipe to the helper: while any process holds a copy, the helper does not act.
    ///
    /// # Errors
    /// Returns an error if the limit on open files is reached.
    pub fn hold(&self) -> Result<Option<OwnedFd>> {
        let held = self.0.stdin.as_ref().map(|stdin| stdin.as_fd().try_clone_to_owned());
        held.transpose().map_err(|e| Error::failed("cannot duplicate a file descriptor").because(e))
    }

    /// Changes the state to restore.
    ///
    /// # Errors
    /// Returns an error if the helper has exited.
    pub fn tell_before(&mut self, before: Before) -> Result<()> {
        self.tell(&Message::Before(before)).map_err(|e| {
            Error::failed("the watchdog of the VM has exited").because(e).hint("capture the VM again")
        })
    }

    /// Tells the helper that the pause is over.
    pub fn tell_resumed(&mut self) {
        let _ = self.tell(&Message::Over);
    }

    /// Tells the helper that the VM is restored, and waits for its exit.
    pub fn dismiss(mut self) {
        let _ = self.tell(&Message::Done);
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }

    fn tell(&mut self, message: &Message) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.0.stdin.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?.write_all(&line)
    }
}

/// Runs the watchdog of a capture.
pub fn resume_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let socket = arguments.next();
    let mut number = || arguments.next()?.into_string().ok()?.parse::<u64>().ok();
    let (Some(socket), Some(Ok(pid)), Some(identity)) = (socket, number().map(u32::try_from), number())
    else {
        return ExitCode::from(2);
    };
    let vm = ProcessId { pid, identity };
    let (mut before, mut is_resumed) = (None, false);
    // The capture sends a line before its step, so a truncated line means that the step was not taken.
    for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Message::Before(state)) => before = Some(state),
            Ok(Message::Over) => is_resumed = true,
            Ok(Message::Done) => return ExitCode::SUCCESS,
            Err(_) => break,
        }
    }
    let Some(before) = before else { return ExitCode::SUCCESS };
    let socket = Path::new(&socket);
    let restored = match &before {
        Before::Qemu(before) => restore(socket, vm, before, is_resumed),
        Before::Firecracker(before) => before.restore(socket, vm, |resume| while_alive(vm, resume)),
    };
    match restored {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::print_line!("error: cannot restore the VM: {error}");
            crate::print_line!("hint: {}", error.hint_text().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// Restores a VM of QEMU. Retries to resume the guest as long as QEMU runs. Retries the restore of the disks for 30 s
/// only, because their data is safe in the overlays. Each attempt uses a new QMP session, since QEMU serves one at a
/// time.
fn restore(socket: &Path, vm: ProcessId, before: &SavedState, is_resumed: bool) -> Result<()> {
    let restored = match is_resumed {
        true => Ok(()),
        false => while_alive(vm, || before.restore_guest(&mut session(socket, vm)?, vm, false).map(drop)),
    };
    let restored =
        restored.and_then(|()| retry(vm, || before.restore_disks(&mut session(socket, vm)?, vm, None)));
    match restored {
        // The restore is retried because a qemu-img of the capture may still have the image open.
        Err(_) if !vm.is_alive() => retry_while(|| true, || before.restore_without_vm()),
        other => other,
    }
}

/// Opens a QMP session with exactly this QEMU process.
fn session(socket: &Path, vm: ProcessId) -> Result<Qmp> {
    let mut qmp = Qmp::open(socket)?;
    let found = qmp.peer_pid()?;
    expect_listener(socket, vm, found)
        .map_err(|e| e.hint("resume the VM with QMP cont on its current socket"))?;
    qmp.greet()?;
    Ok(qmp)
}

fn while_alive(vm: ProcessId, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let mut reported = false;
    loop {
        match retry(vm, &mut attempt) {
            Err(error) if vm.is_alive() => {
                if !std::mem::replace(&mut reported, true) {
                    crate::print_line!("warning: cannot resume the VM, retrying while the VM runs: {error}");
                }
            }
            outcome => return outcome,
        }
    }
}
