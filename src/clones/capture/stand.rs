//! A VM that stands still while it is captured.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::disks::{self, Frozen};
use super::watchdog::ResumeOnDeath;
use crate::clones::qmp::Qmp;
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// How long the device state may take; it is some hundred KiB.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// A VM that stands still. However this ends, it is let run again if it ran, with its own disks.
pub(super) struct Stand {
    qmp: Qmp,
    vm: ProcessId,
    since: Instant,
    was_running: bool,
    ignored_shared: Option<bool>,
    /// How long the VM has stood still, once it runs again.
    over: Option<Duration>,
    frozen: Vec<Frozen>,
    helper: Option<ResumeOnDeath>,
}

impl Stand {
    /// Before the pause. These disks will be frozen in it; what that needs is made now.
    pub fn prepare(
        qmp: Qmp,
        socket: &Path,
        vm: ProcessId,
        was_running: bool,
        disks: Vec<Frozen>,
    ) -> Result<Stand> {
        let helper = if was_running { Some(ResumeOnDeath::start(socket, vm)?) } else { None };
        let since = Instant::now();
        let mut stand =
            Stand { qmp, vm, since, was_running, ignored_shared: None, over: None, frozen: disks, helper };
        if let (Some(helper), false) = (&mut stand.helper, stand.frozen.is_empty()) {
            helper.tell_frozen(&stand.frozen)?;
        }
        for disk in &stand.frozen {
            disk.make(stand.helper.as_ref().map_or(Ok(None), ResumeOnDeath::hold)?)?;
        }
        Ok(stand)
    }

    /// The pause begins, and the disks are frozen.
    pub fn still(&mut self) -> Result<()> {
        self.ignored_shared = Some(self.qmp.ignore_shared(true)?);
        self.since = Instant::now();
        if self.was_running {
            self.qmp.run("stop", json!({}))?;
        }
        if self.frozen.is_empty() {
            return Ok(());
        }
        disks::freeze(&mut self.qmp, &self.frozen)
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
        let file = tempfile::tempfile().map_err(|e| {
            Error::io("cannot make a temporary file for device state", std::env::temp_dir(), e)
        })?;
        let received = receive(&heard, &file, deadline);
        if received.is_err() {
            let _ = self.qmp.run("migrate_cancel", json!({}));
        }
        received?;
        self.qmp.wait_migrated(deadline)?;
        Ok(file)
    }

    /// The end of the pause; gives its length.
    pub fn over(&mut self, stay: bool) -> Result<Duration> {
        if let Some(length) = self.over {
            return Ok(length);
        }
        if let Some(before) = self.ignored_shared.take() {
            self.qmp.ignore_shared(before)?;
        }
        if self.was_running && !stay {
            self.qmp.run("cont", json!({}))?;
        }
        let length = self.since.elapsed();
        self.over = Some(length);
        if let Some(helper) = &mut self.helper {
            helper.tell_over();
        }
        Ok(length)
    }

    /// The VM has its own disks again, and needs nobody any more.
    pub fn settle(&mut self) -> Result<()> {
        let frozen = std::mem::take(&mut self.frozen);
        let settled = match disks::settle(&mut self.qmp, &frozen) {
            // It was ended meanwhile, by its guest or by somebody else.
            Err(_) if !self.vm.is_alive() => disks::settle_without_vm(&frozen),
            other => other,
        };
        match (self.helper.take(), &settled) {
            (Some(helper), Ok(())) => helper.dismiss(),
            // It tries once more, as soon as this session with QEMU is over.
            (Some(helper), Err(_)) => drop(helper),
            (None, _) => {}
        }
        settled
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
        if self.over.is_none()
            && let Err(error) = self.over(false)
        {
            log::error!("the VM could not be let run again: {error}");
        }
        if (self.helper.is_some() || !self.frozen.is_empty())
            && let Err(error) = self.settle()
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
            return Err(Error::try_again("QEMU does not bring its device state to an end"));
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
