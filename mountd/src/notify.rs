//! What a service manager is told: sd_notify(3). Without one, nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use stencilfs::control::FileKey;

use crate::backings::Backings;
use crate::kept::Kept;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notify {
    /// How often it wants to hear that the supervisor lives.
    interval: Option<Duration>,
    last: Instant,
    stored: Vec<u32>,
    ready: bool,
}

impl Notify {
    /// As the environment says.
    pub fn new() -> Notify {
        let interval = sd_notify::watchdog_enabled().map(|period| period / 3);
        Notify { interval, last: Instant::now(), stored: Vec::new(), ready: false }
    }

    /// The mount answers. The descriptors have a second home in the service manager from now on.
    pub fn ready(&mut self, kept: &Kept) {
        if std::mem::replace(&mut self.ready, true) {
            return;
        }
        for (name, fd) in [
            ("fuse", kept.fuse.as_fd()),
            ("ledger", kept.ledger.as_fd()),
            ("counters", kept.stats.page().fd().as_fd()),
            ("program", kept.program.file.as_fd()),
        ] {
            store(name, fd);
        }
        say(&[NotifyState::Ready, NotifyState::Status("serving")]);
    }

    /// Backings that are new.
    pub fn store_backings(&mut self, backings: &Backings) {
        for (id, file) in backings.ready() {
            if !self.stored.contains(&id) {
                store(&format!("backing-{id}"), file.as_fd());
                self.stored.push(id);
            }
        }
    }

    /// Backings that are about to be closed.
    pub fn forget_backings(&mut self, backings: &Backings, keys: &[FileKey]) {
        for id in keys.iter().filter_map(|key| backings.id(key)) {
            say(&[NotifyState::FdStoreRemove, NotifyState::FdName(&format!("backing-{id}"))]);
            self.stored.retain(|other| *other != id);
        }
    }

    /// The supervisor lives.
    pub fn ping(&mut self) {
        if self.interval.is_some_and(|interval| self.last.elapsed() >= interval) {
            self.last = Instant::now();
            say(&[NotifyState::Watchdog]);
        }
    }

    /// It is about to end.
    pub fn stopping(&mut self) {
        say(&[NotifyState::Stopping]);
    }
}

fn store(name: &str, fd: BorrowedFd<'_>) {
    let state = [NotifyState::FdStore, NotifyState::FdName(name)];
    if let Err(e) = sd_notify::notify_with_fds(&state, &[fd]) {
        log::warn!("the service manager does not keep {name}: {e}");
    }
}

fn say(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::warn!("the service manager does not hear: {e}");
    }
}
