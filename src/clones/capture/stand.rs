//! A VM that stands still while it is captured.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::back::Before;
use super::busy;
use super::disks::{self, Frozen};
use super::images;
use super::lock::VmLock;
use super::vm::Vm;
use super::watchdog::ResumeOnDeath;
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::{Qmp, WATCHED};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// How long the device state may take; it is some hundred KiB.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// A VM that stands still. However this ends, it is let run again if it ran, with its own disks.
pub(super) struct Stand {
    qmp: Qmp,
    vm: ProcessId,
    before: Before,
    /// Since when it stands still; nothing of it was changed before that.
    since: Option<Instant>,
    /// How long it has stood still, once it runs again.
    over: Option<Duration>,
    /// Once all was read that must be of one moment: whether somebody else let it run, or reset it, before that. What
    /// comes later is no concern of the template.
    disturbed: Option<bool>,
    /// None once the end was tried.
    helper: Option<ResumeOnDeath>,
    interrupt: Arc<AtomicBool>,
    _lock: VmLock,
}

impl Stand {
    /// Before the pause. These disks will be frozen in it; what that needs is made now.
    pub fn prepare(
        mut qmp: Qmp,
        socket: &Path,
        vm: &Vm,
        disks: Vec<Frozen>,
        lock: VmLock,
        interrupt: Arc<AtomicBool>,
    ) -> Result<Stand> {
        let before = Before { ran: vm.was_running, settings: Settings::of(&mut qmp)?, disks };
        let helper = ResumeOnDeath::start(socket, vm.process, lock.share()?, &before)?;
        let made = before.disks.iter().try_for_each(|d| images::make(&d.place, &d.image, helper.hold()?));
        // Where one could not be made, dropping it takes the others away.
        let stand = Stand {
            qmp,
            vm: vm.process,
            before,
            since: None,
            over: None,
            disturbed: None,
            helper: Some(helper),
            interrupt,
            _lock: lock,
        };
        made.map(|()| stand)
    }

    /// The pause begins, and the disks are frozen.
    ///
    /// # Errors
    /// QEMU's words, or when the VM has other images open than this process.
    pub fn still(&mut self, vm: &Vm) -> Result<()> {
        self.since = Some(Instant::now());
        self.before.settings.for_device_state().apply(&mut self.qmp)?;
        // What stands against it is told only under these settings.
        busy::refuse(&mut self.qmp)?;
        if self.before.ran {
            self.since = Some(Instant::now());
            self.qmp.run("stop", json!({}))?;
            self.qmp.forget_events();
        }
        vm.images.are_open_in_vm()?;
        if self.before.disks.is_empty() {
            return Ok(());
        }
        disks::freeze(&mut self.qmp, &self.before.disks)
    }

    /// Device state, without the RAM that lies in shared files.
    pub fn device_state(&mut self) -> Result<File> {
        let failed = |e: rustix::io::Errno| Error::failed("cannot make a pipe").because(e.into());
        let (heard, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        let arguments = json!({"fdname": "stencil-state"});
        self.qmp.run_passing("getfd", arguments.clone(), Some(say.as_fd()))?;
        drop(say);
        if let Err(error) = self.qmp.run("migrate", json!({"uri": "fd:stencil-state"})) {
            let _ = self.qmp.run("closefd", arguments);
            return Err(error);
        }
        let deadline = Instant::now() + STATE_PATIENCE;
        let received = tempfile::tempfile()
            .map_err(|e| Error::io("cannot make a temporary file for device state", std::env::temp_dir(), e))
            .and_then(|file| receive(&heard, &file, deadline).map(|()| file));
        // QEMU must not wait for a reader that does not read.
        drop(heard);
        if received.is_err() {
            let _ = self.qmp.run("migrate_cancel", json!({}));
        }
        let file = received?;
        migration::wait_end(&mut self.qmp, deadline)?;
        Ok(file)
    }

    /// The end of the pause, if it is not over yet: the guest runs, unless it is to stay.
    pub fn over(&mut self, stay: bool) -> Result<()> {
        let (Some(since), None) = (self.since, self.over) else { return Ok(()) };
        let runs = self.before.guest(&mut self.qmp, self.vm, stay)?;
        self.over = Some(runs.saturating_duration_since(since));
        if let Some(helper) = &mut self.helper {
            helper.tell_over();
        }
        Ok(())
    }

    /// All is read that must be of one moment.
    ///
    /// # Errors
    /// As [`undisturbed`](Self::undisturbed).
    pub fn is_read(&mut self) -> Result<()> {
        if self.disturbed.is_none() {
            let runs = self.qmp.status().is_ok_and(|status| status == "running");
            self.disturbed = Some(runs || WATCHED.iter().any(|event| self.qmp.has_seen(event)));
        }
        self.undisturbed()
    }

    /// What was found when all was read.
    ///
    /// # Errors
    /// When that was not one moment: nothing of it is committed.
    pub fn undisturbed(&self) -> Result<()> {
        match self.disturbed {
            Some(true) => Err(Error::try_again(
                "somebody let the VM run, or reset it, while it was captured: no template was made",
            )
            .remedy("capture it again when nobody else sends it commands")),
            _ => Ok(()),
        }
    }

    /// The end: the VM is as it was, or stands still if it is to, and needs nobody any more. Gives the length of the
    /// pause.
    ///
    /// # Errors
    /// When something of the VM is not as it was: the helper goes on with it as soon as this session with QEMU is over.
    pub fn finish(&mut self, stay: bool) -> Result<Duration> {
        // One that was interrupted before brings its VM back all the same.
        let interrupt = Some(self.interrupt.clone()).filter(|i| !i.load(Ordering::Relaxed));
        let over = match (self.since, self.over) {
            (Some(_), None) => self.over(stay).map_err(|e| e.context("the VM could not be let run again")),
            _ => Ok(()),
        };
        let settled = match over.is_ok() || !self.vm.is_alive() {
            true => self.before.settle(&mut self.qmp, self.vm, interrupt.as_deref()),
            false => Ok(()),
        };
        let helper = self.helper.take();
        match (over, settled) {
            (Ok(()), Ok(())) => {
                if let Some(helper) = helper {
                    helper.dismiss();
                }
                Ok(self.over.unwrap_or_default())
            }
            (Err(error), Err(other)) => Err(error.and(other)),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    pub fn status(&mut self) -> Result<String> {
        self.qmp.status()
    }

    pub fn quit(&mut self) -> Result<String> {
        self.qmp.run("quit", json!({}))?;
        Ok("quit".to_owned())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        if self.helper.is_some()
            && let Err(error) = self.finish(false)
        {
            log::error!("{error}");
            log::error!("{}", error.remedy_text().unwrap_or_default());
        }
    }
}

/// Everything that comes through the pipe, until its end.
fn receive(pipe: &OwnedFd, file: &File, deadline: Instant) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut file = file;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::try_again("QEMU does not bring its device state to an end")
                .remedy("see query-migrate on its QMP socket; a host that is less busy takes less long"));
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(Error::failed("cannot wait for device state").because(e.into())),
        }
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => file
                .write_all(buffer.get(..got).unwrap_or_default())
                .map_err(|e| Error::io("cannot keep device state", std::env::temp_dir(), e))?,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot read device state").because(e.into())),
        }
    }
}
