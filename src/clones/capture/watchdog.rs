//! Outlives a capture that is killed, and brings the VM back to what it was.
//!
//! The capture tells its helper, a line each, what it is about to do; the helper acts when standard input ends before
//! it was dismissed. What is told comes before it is done: nothing is done that the helper does not know of.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};

use serde::{Deserialize, Serialize};

use super::back::{Before, insist, insist_while};
use crate::clones::launch::this_program;
use crate::clones::qmp::Qmp;
use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, inherit, own_session};

/// The argument that makes this program the watchdog of a capture.
pub const RESUME_ARGUMENT: &str = "capture-watchdog";

/// What a capture tells its helper.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    /// What the VM is, before anything of it is changed.
    Before(Before),
    /// The VM runs again.
    Over,
    /// The VM is as it should be.
    Done,
}

/// Brings a VM back if this process dies before it has done so itself.
#[derive(Debug)]
pub struct ResumeOnDeath(Child);

impl ResumeOnDeath {
    /// Begins to watch over the VM behind that QMP socket, which is so now. The helper keeps `lock` for as long as it
    /// lives.
    ///
    /// # Errors
    /// When this program cannot be started.
    pub fn start(socket: &Path, vm: ProcessId, lock: OwnedFd, before: &Before) -> Result<ResumeOnDeath> {
        let failed = |e| Error::failed("cannot start the VM's watchdog").because(e);
        // The helper does not stay in this folder.
        let socket = std::path::absolute(socket).map_err(failed)?;
        let mut command = this_program();
        own_session(&mut command).arg(RESUME_ARGUMENT).arg(socket);
        command.arg(vm.pid.to_string()).arg(vm.identity.to_string());
        inherit(&mut command, lock);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(failed)?;
        let mut helper = ResumeOnDeath(child);
        helper.tell(&Told::Before(before.clone())).map_err(failed)?;
        Ok(helper)
    }

    /// What keeps the helper waiting: while a process has it, this capture does not count as dead.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn hold(&self) -> Result<Option<OwnedFd>> {
        let held = self.0.stdin.as_ref().map(|stdin| stdin.as_fd().try_clone_to_owned());
        held.transpose().map_err(|e| Error::failed("cannot copy a descriptor").because(e))
    }

    /// The VM runs again.
    pub fn tell_over(&mut self) {
        let _ = self.tell(&Told::Over);
    }

    /// The VM is as it should be.
    pub fn dismiss(mut self) {
        let _ = self.tell(&Told::Done);
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }

    fn tell(&mut self, what: &Told) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(what)?;
        line.push(b'\n');
        self.0.stdin.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?.write_all(&line)
    }
}

/// The whole life of a capture's watchdog.
pub fn resume_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let socket = arguments.next();
    let mut number = || arguments.next()?.into_string().ok()?.parse::<u64>().ok();
    let (Some(socket), Some(pid), Some(identity)) = (socket, number(), number()) else {
        return ExitCode::from(2);
    };
    let vm = ProcessId { pid: pid as u32, identity };
    let (mut before, mut is_over) = (None, false);
    // A line that was cut off was not acted upon.
    for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Told::Before(told)) => before = Some(told),
            Ok(Told::Over) => is_over = true,
            Ok(Told::Done) => return ExitCode::SUCCESS,
            Err(_) => break,
        }
    }
    let Some(before) = before else { return ExitCode::SUCCESS };
    match bring_back(Path::new(&socket), vm, &before, is_over) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("stencil: the VM could not be brought back: {error}");
            crate::say!("stencil: {}", error.remedy_text().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// Brings the guest back for as long as the VM lives, and its disks for half a minute: what was written to them is safe
/// where it is. Each attempt has a session of its own with QEMU, which has one at a time.
fn bring_back(socket: &Path, vm: ProcessId, before: &Before, is_over: bool) -> Result<()> {
    let brought = match is_over {
        true => Ok(()),
        false => while_alive(vm, || before.guest(&mut session(socket, vm)?, vm, false).map(drop)),
    };
    let brought = brought.and_then(|()| insist(vm, || before.settle(&mut session(socket, vm)?, vm, None)));
    match brought {
        // What the guest wrote last must still come into its image, which the capture's qemu-img may have for a moment.
        Err(_) if !vm.is_alive() => insist_while(|| true, || before.settle_without_vm()),
        other => other,
    }
}

/// A session with that QEMU and no other.
fn session(socket: &Path, vm: ProcessId) -> Result<Qmp> {
    let mut qmp = Qmp::open(socket)?;
    let found = qmp.peer_pid()?;
    if found != vm.pid || !vm.is_alive() {
        return Err(Error::failed(format!("process {found} has this socket now, not {}", vm.pid))
            .at(socket)
            .remedy("QMP cont lets the VM run again, on whichever socket it has now"));
    }
    qmp.greet()?;
    Ok(qmp)
}

fn while_alive(vm: ProcessId, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let mut told = false;
    loop {
        match insist(vm, &mut attempt) {
            Err(error) if vm.is_alive() => {
                if !std::mem::replace(&mut told, true) {
                    crate::say!(
                        "stencil: the VM does not run yet, and is tried again while it lives: {error}"
                    );
                }
            }
            outcome => return outcome,
        }
    }
}
