//! The paused VM of a capture.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::capture_watchdog::{Before, ResumeOnDeath};
use super::disks::{self, Frozen};
use super::lock::VmLock;
use super::restore::SavedState;
use super::vm::Vm;
use crate::clones::capture::busy;
use crate::clones::capture::images;
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::{Qmp, WATCHED};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// Timeout for the device state, which has some hundred KiB.
const STATE_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM during its capture. Dropping this value restores the VM: it runs if it was running, with its own disks.
pub(super) struct PausedVm {
    qmp: Qmp,
    vm: ProcessId,
    before: SavedState,
    /// Start of the pause; `None` means that nothing of the VM was changed yet.
    since: Option<Instant>,
    /// Length of the pause, once the pause is over.
    pause: Option<Duration>,
    /// Set at the end of the snapshot: whether another client resumed or reset the VM before. Later events do not
    /// affect the template.
    disturbed: Option<bool>,
    /// `None` once `finish` was called.
    helper: Option<ResumeOnDeath>,
    interrupt: Arc<AtomicBool>,
    _lock: VmLock,
}

impl PausedVm {
    /// Prepares the pause: starts the helper and creates the overlays of the disks that the pause will freeze.
    pub fn prepare(
        mut qmp: Qmp,
        socket: &Path,
        vm: &Vm,
        disks: Vec<Frozen>,
        lock: VmLock,
        interrupt: Arc<AtomicBool>,
    ) -> Result<PausedVm> {
        let before = SavedState { ran: vm.was_running, settings: Settings::of(&mut qmp)?, disks };
        let helper =
            ResumeOnDeath::start(socket, vm.process, vec![lock.share()?], Before::Qemu(before.clone()))?;
        let created =
            before.disks.iter().try_for_each(|d| images::create(&d.place, &d.image, helper.hold()?));
        // If an overlay could not be created, dropping this value removes the others.
        let paused = PausedVm {
            qmp,
            vm: vm.process,
            before,
            since: None,
            pause: None,
            disturbed: None,
            helper: Some(helper),
            interrupt,
            _lock: lock,
        };
        created.map(|()| paused)
    }

    /// Pauses the VM and freezes its disks.
    ///
    /// # Errors
    /// Returns an error of QEMU, or [`Code::Usage`](crate::error::Code::Usage) if the VM has other images open than
    /// this process.
    pub fn pause(&mut self, vm: &Vm) -> Result<()> {
        self.since = Some(Instant::now());
        self.before.settings.for_device_state().apply(&mut self.qmp)?;
        // QEMU reports migration blockers only for the migration settings in effect, so the blockers are checked again.
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

    /// Receives the device state, without the RAM in shared files.
    pub fn device_state(&mut self) -> Result<File> {
        let failed = |e: rustix::io::Errno| Error::failed("cannot create a pipe").because(e.into());
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        let arguments = json!({"fdname": "stencil-state"});
        self.qmp.run_passing("getfd", arguments.clone(), Some(writer.as_fd()))?;
        drop(writer);
        if let Err(error) = self.qmp.run("migrate", json!({"uri": "fd:stencil-state"})) {
            let _ = self.qmp.run("closefd", arguments);
            return Err(error);
        }
        let deadline = Instant::now() + STATE_TIMEOUT;
        let received = tempfile::tempfile()
            .map_err(|e| {
                Error::io("cannot create a temporary file for device state", std::env::temp_dir(), e)
            })
            .and_then(|file| receive(&reader, &file, deadline).map(|()| file));
        // The pipe is closed before the next commands, so that QEMU never blocks on a full pipe.
        drop(reader);
        if received.is_err() {
            let _ = self.qmp.run("migrate_cancel", json!({}));
        }
        let file = received?;
        migration::wait_end(&mut self.qmp, deadline)?;
        Ok(file)
    }

    /// Ends the pause, unless it is over already: resumes the guest if it was running and `stay` is not set, and
    /// restores the migration settings.
    ///
    /// # Errors
    /// Same as [`SavedState::restore_guest`].
    pub fn resume(&mut self, stay: bool) -> Result<()> {
        let (Some(since), None) = (self.since, self.pause) else { return Ok(()) };
        let resumed = self.before.restore_guest(&mut self.qmp, self.vm, stay)?;
        self.pause = Some(resumed.saturating_duration_since(since));
        if let Some(helper) = &mut self.helper {
            helper.tell_resumed();
        }
        Ok(())
    }

    /// Ends the snapshot: everything that must be from one point in time has been read.
    ///
    /// # Errors
    /// Same as [`undisturbed`](Self::undisturbed).
    pub fn end_snapshot(&mut self) -> Result<()> {
        if self.disturbed.is_none() {
            let is_running = self.qmp.status().is_ok_and(|status| status == "running");
            self.disturbed = Some(is_running || WATCHED.iter().any(|event| self.qmp.has_seen(event)));
        }
        self.undisturbed()
    }

    /// Checks that the VM was not disturbed during the snapshot.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if another client resumed or reset the VM; the template
    /// must then not be committed.
    pub fn undisturbed(&self) -> Result<()> {
        match self.disturbed {
            Some(true) => Err(Error::try_again(
                "another QMP client resumed or reset the VM during the capture: no template was created",
            )
            .hint("capture the VM again while no other client controls the VM")),
            _ => Ok(()),
        }
    }

    /// Restores the VM (with `stay`, leaves it paused) and dismisses the helper. Returns the length of the pause.
    ///
    /// # Errors
    /// Returns an error if a part of the VM could not be restored; the helper retries when this QMP session is closed.
    pub fn finish(&mut self, stay: bool) -> Result<Duration> {
        // An interrupt that came earlier must not end the restore.
        let interrupt = Some(self.interrupt.clone()).filter(|i| !i.load(Ordering::Relaxed));
        let resumed = match (self.since, self.pause) {
            (Some(_), None) => self.resume(stay).map_err(|e| e.context("cannot resume the VM")),
            _ => Ok(()),
        };
        let disks_restored = match resumed.is_ok() || !self.vm.is_alive() {
            true => self.before.restore_disks(&mut self.qmp, self.vm, interrupt.as_deref()),
            false => Ok(()),
        };
        let helper = self.helper.take();
        match (resumed, disks_restored) {
            (Ok(()), Ok(())) => {
                if let Some(helper) = helper {
                    helper.dismiss();
                }
                Ok(self.pause.unwrap_or_default())
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

impl Drop for PausedVm {
    fn drop(&mut self) {
        if self.helper.is_some()
            && let Err(error) = self.finish(false)
        {
            log::error!("{error}");
            log::error!("{}", error.hint_text().unwrap_or_default());
        }
    }
}

/// Copies the pipe to the file until end of file.
fn receive(pipe: &OwnedFd, file: &File, deadline: Instant) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut file = file;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::try_again("timed out waiting for the device state")
                .hint("see query-migrate on the QMP socket; try again when the host is less busy"));
        }
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(Error::failed("cannot wait for device state").because(e.into())),
        }
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => file
                .write_all(buffer.get(..got).unwrap_or_default())
                .map_err(|e| Error::io("cannot write device state", std::env::temp_dir(), e))?,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot read device state").because(e.into())),
        }
    }
}
