//! Outlives a capture that is killed, and brings the VM back to what it was.
//!
//! The capture tells its helper, a line each, what it is about to do; the helper acts when standard input ends before
//! it was dismissed. What is told comes before it is done: nothing is done that the helper does not know of.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disks::{self, Frozen};
use crate::clones::launch::this_program;
use crate::clones::qmp::Qmp;
use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, own_session};

/// The argument that makes this program the watchdog of a capture.
pub const RESUME_ARGUMENT: &str = "capture-watchdog";

/// What a capture tells its helper.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    /// These disks are going to be frozen.
    Frozen(Vec<Frozen>),
    /// The VM runs again.
    Over,
    /// The VM is as it should be.
    Done,
}

/// Brings a VM back if this process dies before it has done so itself.
#[derive(Debug)]
pub struct ResumeOnDeath(Child);

impl ResumeOnDeath {
    /// Begins to watch over the VM behind that QMP socket.
    ///
    /// # Errors
    /// When this program cannot be started.
    pub fn start(socket: &Path, vm: ProcessId) -> Result<ResumeOnDeath> {
        let failed = |e| Error::failed("cannot start the VM's watchdog").because(e);
        // The helper does not stay in this folder.
        let socket = std::path::absolute(socket).map_err(failed)?;
        let mut command = this_program();
        own_session(&mut command).arg(RESUME_ARGUMENT).arg(socket);
        command.arg(vm.pid.to_string()).arg(vm.start_time.to_string());
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(failed)?;
        Ok(ResumeOnDeath(child))
    }

    /// These disks are going to be frozen.
    ///
    /// # Errors
    /// When the helper does not live: then they must not be.
    pub fn tell_frozen(&mut self, disks: &[Frozen]) -> Result<()> {
        self.tell(&Told::Frozen(disks.to_vec()))
            .map_err(|e| Error::failed("the VM's watchdog does not listen").because(e))
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
    let (Some(socket), Some(pid), Some(start_time)) = (socket, number(), number()) else {
        return ExitCode::from(2);
    };
    let vm = ProcessId { pid: pid as u32, start_time };
    let (mut frozen, mut is_over) = (vec![], false);
    // A line that was cut off was not acted upon.
    for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Told::Frozen(disks)) => frozen = disks,
            Ok(Told::Over) => is_over = true,
            Ok(Told::Done) => return ExitCode::SUCCESS,
            Err(_) => break,
        }
    }
    match bring_back(Path::new(&socket), vm, &frozen, is_over) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stencil: the VM could not be brought back: {error}");
            eprintln!("stencil: {}", error.remedy_text().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn bring_back(socket: &Path, vm: ProcessId, frozen: &[Frozen], is_over: bool) -> Result<()> {
    let brought = insist(vm, || Qmp::connect(socket)).and_then(|mut qmp| {
        if !is_over {
            // A device state that was cut off ends as a failed migration, one that was whole as a finished one; either
            // may still stop the guest, and until then QEMU refuses to change a capability.
            insist(vm, || runs_again(&mut qmp))?;
            insist(vm, || qmp.ignore_shared(false))?;
        }
        disks::settle(&mut qmp, frozen)
    });
    match brought {
        // What the guest wrote last must still come into its image.
        Err(_) if !vm.is_alive() => disks::settle_without_vm(frozen),
        other => other,
    }
}

/// Lets the guest run, and makes sure that no migration is left that would stop it.
fn runs_again(qmp: &mut Qmp) -> Result<()> {
    qmp.run("cont", json!({}))?;
    let migration = qmp.run("query-migrate", json!({}))?;
    let phase = migration.get("status").and_then(Value::as_str).unwrap_or("none");
    let status = qmp.status()?;
    match (phase, status.as_str()) {
        ("none" | "completed" | "failed" | "cancelled", "running") => Ok(()),
        _ => Err(Error::try_again(format!("its migration is '{phase}' and the guest '{status}'"))),
    }
}

/// Tries until it goes well, for half a minute and while the VM lives.
fn insist<T>(vm: ProcessId, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match attempt() {
            Err(_) if Instant::now() < until && vm.is_alive() => {
                std::thread::sleep(Duration::from_millis(50))
            }
            outcome => return outcome,
        }
    }
}
