//! Shutdown of a mount by signals, and files of backings that must be closed.

use std::os::fd::OwnedFd;

use stencilfs::control::UnmountMode;

/// The effect of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// Unmount. A mount in use is detached, and ends with its last mapping.
    Drain,
    /// Abort the connection: in a mapping that is served by decode, an access to a page that is not in RAM then raises
    /// SIGBUS.
    Abort,
    /// None: the mount is already draining.
    Ignore,
}

/// The state of the shutdown, and the files that must be closed.
#[derive(Debug, Default)]
pub struct Shutdown {
    draining: bool,
    /// True while an unmount that a signal has requested is running.
    unmounting: bool,
    to_close: Vec<OwnedFd>,
    closing: bool,
}

impl Shutdown {
    /// Creates the state of a mount, which may already be draining.
    pub fn new(draining: bool) -> Shutdown {
        Shutdown { draining, ..Shutdown::default() }
    }

    /// Returns true if a signal has requested the end of the mount.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Handles a signal. `may_abort` is true if the signal may abort a mount that is already draining.
    pub fn signal(&mut self, may_abort: bool) -> OnSignal {
        if !self.draining {
            self.drain();
            return OnSignal::Drain;
        }
        if may_abort && !self.unmounting {
            self.unmounting = true;
            return OnSignal::Abort;
        }
        OnSignal::Ignore
    }

    /// Records that the mount must end, and that an unmount is starting.
    pub fn drain(&mut self) {
        (self.draining, self.unmounting) = (true, true);
    }

    /// Records that an unmount which a signal has requested has ended. Returns the mode of the next attempt, if the
    /// unmount must be attempted again.
    pub fn unmounted(&mut self, mode: UnmountMode, failed: bool) -> Option<UnmountMode> {
        if failed && mode == UnmountMode::Plain {
            return Some(UnmountMode::Lazy);
        }
        self.unmounting = false;
        // After a failure, the next signal attempts the unmount again.
        self.draining &= !failed;
        None
    }

    /// Adds files that no other process has open, to be closed by a job.
    pub fn close_later(&mut self, files: impl IntoIterator<Item = OwnedFd>) {
        self.to_close.extend(files);
    }

    /// Removes and returns the files for the next job; `None` if there are none or such a job is running.
    pub fn take_files(&mut self) -> Option<Vec<OwnedFd>> {
        if self.closing || self.to_close.is_empty() {
            return None;
        }
        self.closing = true;
        Some(std::mem::take(&mut self.to_close))
    }

    /// Records that the job that closes files has ended.
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
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "an unmount is running");
        assert_eq!(shutdown.unmounted(UnmountMode::Plain, true), Some(UnmountMode::Lazy));
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "the unmount is still running");
        assert_eq!(shutdown.unmounted(UnmountMode::Lazy, false), None);
        assert!(shutdown.is_draining());
        assert_eq!(
            shutdown.signal(false),
            OnSignal::Ignore,
            "the end of a terminal does not abort the mount"
        );
        assert_eq!(shutdown.signal(true), OnSignal::Abort);
        assert_eq!(shutdown.signal(true), OnSignal::Ignore, "an abort is running");
    }

    #[test]
    fn a_signal_after_a_failed_unmount_unmounts_again() {
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
