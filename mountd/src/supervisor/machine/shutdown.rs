//! The end of a mount that signals ask for, and files that are to be closed.

use std::os::fd::OwnedFd;

use stencilfs::control::UnmountMode;

/// What a signal leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// Unmount; where the mount is in use, it ends with its last mapping.
    Drain,
    /// Abort the connection: processes that need another page die.
    Abort,
    /// Nothing: the mount drains already.
    Ignore,
}

/// Requests to end the mount, and files that were given up.
#[derive(Debug, Default)]
pub struct Shutdown {
    draining: bool,
    /// An unmount that a signal asked for is under way.
    unmounting: bool,
    to_close: Vec<OwnedFd>,
    closing: bool,
}

impl Shutdown {
    /// A mount that drains already, or not.
    pub fn new(draining: bool) -> Shutdown {
        Shutdown { draining, ..Shutdown::default() }
    }

    /// True once a signal has asked for the end.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// A signal arrived; `forces`: one of its kind may end a mount that drains already.
    pub fn signal(&mut self, forces: bool) -> OnSignal {
        if !self.draining {
            self.drain();
            return OnSignal::Drain;
        }
        if forces && !self.unmounting {
            self.unmounting = true;
            return OnSignal::Abort;
        }
        OnSignal::Ignore
    }

    /// The mount is to end: an unmount begins.
    pub fn drain(&mut self) {
        (self.draining, self.unmounting) = (true, true);
    }

    /// An unmount that a signal asked for has ended. Returns how to try again, if it is tried again.
    pub fn unmounted(&mut self, mode: UnmountMode, failed: bool) -> Option<UnmountMode> {
        if failed && mode == UnmountMode::Plain {
            return Some(UnmountMode::Lazy);
        }
        self.unmounting = false;
        // After a failure the next signal tries again.
        self.draining &= !failed;
        None
    }

    /// Files that no other process has open: a later job closes them.
    pub fn close_later(&mut self, files: impl IntoIterator<Item = OwnedFd>) {
        self.to_close.extend(files);
    }

    /// Takes the files for the next job. One such job runs at a time.
    pub fn take_files(&mut self) -> Option<Vec<OwnedFd>> {
        if self.closing || self.to_close.is_empty() {
            return None;
        }
        self.closing = true;
        Some(std::mem::take(&mut self.to_close))
    }

    /// The job that closes files has ended.
    pub fn closed(&mut self) {
        self.closing = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_drains_and_a_later_one_may_abort() {
        let mut shutdown = Shutdown::default();
        assert_eq!(shutdown.signal(true), OnSignal::Drain);
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "it unmounts");
        assert_eq!(shutdown.unmounted(UnmountMode::Plain, true), Some(UnmountMode::Lazy));
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "it still unmounts");
        assert_eq!(shutdown.unmounted(UnmountMode::Lazy, false), None);
        assert!(shutdown.is_draining());
        assert_eq!(shutdown.signal(false), OnSignal::Ignore, "the end of a terminal forces nothing");
        assert_eq!(shutdown.signal(true), OnSignal::Abort);
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "an abort is under way");
    }

    #[test]
    fn after_a_failed_unmount_a_signal_tries_again() {
        let mut shutdown = Shutdown::new(false);
        shutdown.signal(false);
        assert_eq!(shutdown.unmounted(UnmountMode::Lazy, true), None);
        assert_eq!(shutdown.signal(false), OnSignal::Drain);
    }

    #[test]
    fn files_are_closed_by_one_job_at_a_time() {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let mut shutdown = Shutdown::default();
        assert!(shutdown.take_files().is_none());
        shutdown.close_later([file(), file()]);
        assert_eq!(shutdown.take_files().map(|files| files.len()), Some(2));
        shutdown.close_later([file()]);
        assert!(shutdown.take_files().is_none());
        shutdown.closed();
        assert_eq!(shutdown.take_files().map(|files| files.len()), Some(1));
    }
}
