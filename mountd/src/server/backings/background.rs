//! Backings for kernel decode that are made before a file is opened.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use stencilfs::control::ServeMode;
use stencilfs::store::{Store, StorePath, Template};

use super::{Backings, State, key};
use crate::protocol::{FileKey, MAX_KEYS};
use crate::server::tree::Tree;

/// Interval between two checks whether another backing is still being made.
const IDLE_INTERVAL: Duration = Duration::from_millis(5);

impl Backings {
    /// Makes the backings of all templates for kernel decode, in a thread: the newest template first, and one file at a
    /// time, so that a file that is opened meanwhile does not wait for all others.
    pub fn make_all(self: &Arc<Self>, tree: &Arc<Tree>) {
        if self.mode != ServeMode::Kernel || !self.possible {
            return;
        }
        let (backings, tree) = (Arc::clone(self), Arc::clone(tree));
        thread::spawn(move || {
            backings.again.store(true, Ordering::Relaxed);
            let Ok(_alone) = backings.background.try_lock() else { return };
            while backings.again.swap(false, Ordering::Relaxed) {
                backings.make_newest(&tree);
            }
        });
    }

    fn make_newest(&self, tree: &Tree) {
        for digest in tree.newest() {
            // Skips removed and damaged templates.
            let Ok(template) = tree.template(&digest) else { continue };
            for file in (0..template.files().len()).filter(|file| self.may_have_backing(&template, *file)) {
                self.make(&template, file);
            }
        }
    }

    /// Makes the backing of a file that has none, when no other backing is being made.
    fn make(&self, template: &Arc<Template>, file: usize) {
        while self.states().values().any(|state| matches!(state, State::Filling { .. })) {
            thread::sleep(IDLE_INTERVAL);
        }
        let states = self.states();
        if states.get(&key(template, file)).is_none_or(State::may_retry) {
            self.begin(states, template, file, State::filling());
        }
    }

    /// Replaces unused backings that decode packs which a collection has removed: a removed pack keeps its disk space
    /// while a backing uses the pack. Backings in use stay.
    pub fn renew(self: &Arc<Self>, tree: &Arc<Tree>, store: &Store) {
        if self.mode != ServeMode::Kernel || store.check_reachable().is_err() {
            return;
        }
        let ready = |(key, state): (&FileKey, &State)| match state {
            State::Ready(ready) => Some((key.clone(), ready.packs.clone())),
            _ => None,
        };
        let ready: Vec<_> = self.states().iter().filter_map(ready).collect();
        // The packs of a backing that an earlier server has made are unknown.
        let is_outdated = |packs: &Option<Vec<StorePath>>| {
            packs.as_ref().is_none_or(|packs| packs.iter().any(|pack| !pack.exists()))
        };
        let outdated = ready.into_iter().filter(|(_, packs)| is_outdated(packs));
        let keys: Vec<FileKey> = outdated.map(|(key, _)| key).collect();
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("cannot release removed packs: {error}");
            }
        }
        self.make_all(tree);
    }
}
