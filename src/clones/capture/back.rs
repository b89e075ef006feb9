//! How a captured VM is brought back: the guest runs again, then QEMU's settings are as they were, then the disks.
//! The capture does it, and the helper of one that was killed does the same.

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::disks::{self, Frozen};
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::Qmp;
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// How long one session with QEMU insists on something.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a process may take to end after its QMP session has.
const LAST_BREATH: Duration = Duration::from_secs(5);

/// What the VM was before anything of it was changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Before {
    /// The guest ran.
    pub ran: bool,
    /// Settings of its migrations.
    pub settings: Settings,
    /// Disks that are frozen, or are going to be.
    pub disks: Vec<Frozen>,
}

impl Before {
    /// Lets the guest run, unless it is to stay, and gives QEMU its settings back. Gives the moment from which on the
    /// guest ran.
    ///
    /// # Errors
    /// When QEMU does not do it within half a minute.
    pub fn guest(&self, qmp: &mut Qmp, vm: ProcessId, stay: bool) -> Result<Instant> {
        // A device state that was cut off ends as a failed migration, one that was whole as a finished one; either may
        // still stop the guest, and until then QEMU refuses to change a capability.
        if self.ran && !stay {
            insist_on(qmp, vm, runs_again)?;
        }
        let runs = Instant::now();
        insist_on(qmp, vm, |qmp| self.settings.apply(qmp))?;
        Ok(runs)
    }

    /// Brings the disks back, with QEMU or, where that has ended, without. `interrupt` ends the wait for a commit, which
    /// QEMU then goes on with.
    ///
    /// # Errors
    /// When what the guest wrote last is not in its image: the message says where it is.
    pub fn settle(&self, qmp: &mut Qmp, vm: ProcessId, interrupt: Option<&AtomicBool>) -> Result<()> {
        match disks::settle(qmp, &self.disks, interrupt) {
            // It was ended meanwhile, by its guest or by somebody else.
            Err(_) if has_ended(qmp, vm) => self.settle_without_vm(),
            other => other,
        }
    }

    /// The same when QEMU is known to be gone.
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub fn settle_without_vm(&self) -> Result<()> {
        disks::settle_without_vm(&self.disks)
    }
}

/// True when the VM has ended; one that only closed the session is given the time to.
fn has_ended(qmp: &mut Qmp, vm: ProcessId) -> bool {
    !vm.is_alive() || (qmp.status().is_err() && vm.wait_gone(LAST_BREATH).unwrap_or(false))
}

/// Lets the guest run, and makes sure that no migration is left that would stop it.
fn runs_again(qmp: &mut Qmp) -> Result<()> {
    let refused = qmp.run("cont", json!({})).err();
    let (phase, rests) = migration::phase(qmp)?;
    let status = qmp.status()?;
    // Another state (`shutdown`, `io-error`…) is not the capture's, and QEMU may refuse to let the guest run in it.
    match rests && !matches!(status.as_str(), "paused" | "prelaunch" | "postmigrate" | "finish-migrate") {
        true => Ok(()),
        false => Err(refused.unwrap_or_else(|| {
            Error::try_again(format!("the VM's migration is '{phase}' and the guest '{status}'"))
                .remedy("QMP cont lets it run")
        })),
    }
}

/// Tries until it goes well, for half a minute and while the VM lives; on a session that is lost only once.
fn insist_on<T>(qmp: &mut Qmp, vm: ProcessId, mut attempt: impl FnMut(&mut Qmp) -> Result<T>) -> Result<T> {
    let qmp = RefCell::new(qmp);
    let holds = || vm.is_alive() && !qmp.borrow().is_lost();
    insist_while(holds, || attempt(&mut qmp.borrow_mut()))
}

/// Tries until it goes well, for half a minute and while the VM lives.
pub fn insist<T>(vm: ProcessId, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    insist_while(|| vm.is_alive(), attempt)
}

/// Tries until it goes well, for half a minute and while that holds.
pub fn insist_while<T>(holds: impl Fn() -> bool, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(20);
    loop {
        match attempt() {
            Err(_) if Instant::now() < until && holds() => std::thread::sleep(pause),
            outcome => return outcome,
        }
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
