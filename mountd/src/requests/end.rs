//! The end of the mount, which signals and callers ask for, and of files that were given up.

use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use stencilfs::control::UnmountMode;
use stencilfs::error::Error;

use crate::jobs::{self, Job};
use crate::supervisor::{Purpose, Supervisor};

/// Unmounting waits for pages that are being read; so long.
const UNMOUNT: Duration = Duration::from_secs(60);

/// Who loses its memory is sought for so long.
const SEARCH: Duration = Duration::from_secs(1);

fn no_word(e: std::io::Error) -> Error {
    Error::failed("no word between the supervisor and who closes files for it").because(e)
}

impl Supervisor {
    /// Closes files that nobody else has open, where it may take long: in a child that is the last to have them. One
    /// such child at a time: what comes meanwhile is closed by the next.
    pub(crate) fn close_elsewhere(&mut self) {
        let closing = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Close));
        if closing || self.to_close.is_empty() || !self.server.as_ref().is_some_and(|s| s.row.serving) {
            return;
        }
        let begun = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| no_word(e.into())).and_then(|closed| {
            let job = Job::start(UNMOUNT, &self.kept.alone(&self.callers), || {
                // It ends, and closes them, only when the supervisor has closed its own.
                rustix::io::read(&closed, &mut [0; 8]).map(|_| None).map_err(|e| no_word(e.into()))
            });
            job.map(|job| (job, closed))
        });
        self.to_close.clear();
        match begun {
            Ok((job, closed)) => {
                if let Err(e) = rustix::io::write(&closed, &1u64.to_ne_bytes()) {
                    log::warn!("{}", no_word(e.into()));
                }
                self.begin(Ok(job), Purpose::Close);
            }
            Err(error) => log::warn!("files of backings were closed by the supervisor itself: {error}"),
        }
    }

    /// The first signal ends the mount as soon as nobody is hurt: at once, or with its last mapping. One that comes
    /// once it drains may end it now, and names who dies; what comes before is one with the first.
    pub(crate) fn signalled(&mut self) {
        let Some(cuts_off) = self.signals.take() else { return };
        let first = self.kept.terminations == 0;
        let unmounting = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Unmount(None, _)));
        if first {
            log::info!("a signal asks for the end: unmounting");
            self.notify.stopping();
            self.drain();
        } else if cuts_off && !unmounting {
            log::info!("a second signal asks for the end: aborting");
            self.unmount(None, UnmountMode::Force);
        } else {
            log::info!("a further signal changes nothing: `stencil umount --force` ends the mount now");
        }
    }

    /// Takes the mount away; where it is in use, it ends with its last mapping.
    pub(crate) fn drain(&mut self) {
        self.kept.terminations = 1;
        self.unmount(None, UnmountMode::Plain);
    }

    pub(crate) fn unmount(&mut self, caller: Option<u64>, mode: UnmountMode) {
        let (options, device) = (self.kept.options.clone(), self.kept.device);
        let abort = match mode {
            UnmountMode::Force => jobs::abort_of(&self.kept.fuse, device),
            _ => Ok(None),
        };
        let job = Job::start(UNMOUNT, &self.kept.alone(&self.callers), || {
            if mode == UnmountMode::Force
                && let Ok(users) = jobs::find_users(device, SEARCH)
            {
                log::warn!("the connection is aborted; these lose what they have not read: {users}");
            }
            jobs::unmount(&options, device, mode, abort).map(|()| None)
        });
        self.begin(job, Purpose::Unmount(caller, mode));
    }
}
