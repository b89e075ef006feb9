//! The end of the mount, which signals and callers ask for, and of files that were given up.

use std::time::Duration;

use stencilfs::control::UnmountMode;

use crate::jobs::{self, Job};
use crate::supervisor::{Purpose, Supervisor};

/// Unmounting waits for pages that are being read; so long.
const UNMOUNT: Duration = Duration::from_secs(60);

/// The supervisor has closed its copies after so long.
const MOMENT: Duration = Duration::from_millis(200);

/// Who loses its memory is sought for so long.
const SEARCH: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Closes files that nobody else has open, where it may take long: in a child that has them a moment longer.
    pub(crate) fn close_elsewhere(&mut self) {
        if self.to_close.is_empty() || !self.server.as_ref().is_some_and(|s| s.serving) {
            return;
        }
        let job = Job::start(UNMOUNT, &self.kept.fuse, || {
            std::thread::sleep(MOMENT);
            Ok(None)
        });
        self.to_close.clear();
        self.begin(job, Purpose::Close);
    }

    /// SIGTERM and the like end the mount as soon as nobody is hurt: at once, or with its last mapping. A second one
    /// ends it now, and names who dies.
    pub(crate) fn signalled(&mut self) {
        let mut bytes = [0; 64];
        let Ok(n) = rustix::io::read(&self.signals, &mut bytes) else { return };
        self.terminations = self.terminations.saturating_add(n as u32);
        self.notify.stopping();
        let mode = if self.terminations == 1 { UnmountMode::Plain } else { UnmountMode::Force };
        log::info!(
            "a signal asks for the end: {}",
            if self.terminations == 1 { "unmounting" } else { "aborting" }
        );
        self.unmount(None, mode);
    }

    pub(crate) fn unmount(&mut self, caller: Option<u64>, mode: UnmountMode) {
        let (options, device) = (self.kept.options.clone(), self.kept.device);
        let job = Job::start(UNMOUNT, &self.kept.fuse, || {
            if mode == UnmountMode::Force
                && let Ok(users) = jobs::find_users(device, SEARCH)
            {
                log::warn!("the connection is aborted; these lose what they have not read: {users}");
            }
            jobs::unmount(&options, device, mode).map(|()| None)
        });
        self.begin(job, Purpose::Unmount(caller, mode));
    }
}
