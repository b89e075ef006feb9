//! Shutdown of the mount, requested by signals and callers; and closing of abandoned files.

use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use stencilfs::control::UnmountMode;
use stencilfs::error::Error;

use crate::jobs::{self, Job};
use crate::supervisor::{Purpose, Supervisor};

/// Longest time for an unmount, which waits for pending reads of pages.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time for the search for processes that lose their memory.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(1);

fn cannot_signal(e: std::io::Error) -> Error {
    Error::failed("cannot communicate with the child that closes files").because(e)
}

impl Supervisor {
    /// Closes abandoned files in a child that is the last holder of their descriptors, as the file system may take
    /// long. One such child runs at a time; files that are added meanwhile wait for the next one.
    pub(crate) fn close_elsewhere(&mut self) {
        let closing = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Close));
        if closing || self.to_close.is_empty() || !self.server.as_ref().is_some_and(|s| s.row.serving) {
            return;
        }
        let started =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| cannot_signal(e.into())).and_then(|closed| {
                let job = Job::start(UNMOUNT_TIMEOUT, &self.state.private_fds(&self.callers), || {
                    // The child waits until the supervisor has closed its own descriptors, then closes the last ones by
                    // exit.
                    rustix::io::read(&closed, &mut [0; 8]).map(|_| None).map_err(|e| cannot_signal(e.into()))
                });
                job.map(|job| (job, closed))
            });
        self.to_close.clear();
        match started {
            Ok((job, closed)) => {
                if let Err(e) = rustix::io::write(&closed, &1u64.to_ne_bytes()) {
                    log::warn!("{}", cannot_signal(e.into()));
                }
                self.add_job(Ok(job), Purpose::Close);
            }
            Err(error) => log::warn!("the supervisor itself closed files of backings: {error}"),
        }
    }

    /// Handles termination signals. The first one unmounts, at once or with the last mapping. A later one, while the
    /// mount drains, may abort the connection and log the affected processes; signals before that are merged with the
    /// first.
    pub(crate) fn signalled(&mut self) {
        let Some(may_abort) = self.signals.take() else { return };
        let first = self.state.terminations == 0;
        let unmounting = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Unmount(None, _)));
        if first {
            log::info!("received a termination signal: unmounting");
            self.notify.stopping();
            self.drain();
        } else if may_abort && !unmounting {
            log::info!("received another termination signal: aborting the connection");
            self.unmount(None, UnmountMode::Force);
        } else {
            log::info!("termination signal ignored: the mount drains; 'stencil umount --force' ends it now");
        }
    }

    /// Unmounts; a mount that is in use is detached and ends with its last mapping.
    pub(crate) fn drain(&mut self) {
        self.state.terminations = 1;
        self.unmount(None, UnmountMode::Plain);
    }

    pub(crate) fn unmount(&mut self, caller: Option<u64>, mode: UnmountMode) {
        let (options, device) = (self.state.options.clone(), self.state.device);
        let abort = match mode {
            UnmountMode::Force => jobs::abort_of(&self.state.fuse, device),
            _ => Ok(None),
        };
        let job = Job::start(UNMOUNT_TIMEOUT, &self.state.private_fds(&self.callers), || {
            if mode == UnmountMode::Force
                && let Ok(users) = jobs::find_users(device, SEARCH_TIMEOUT)
            {
                log::warn!(
                    "aborting the connection; these processes lose pages that they have not read: {users}"
                );
            }
            jobs::unmount(&options, device, mode, abort).map(|()| None)
        });
        self.add_job(job, Purpose::Unmount(caller, mode));
    }
}
