//! Backings for kernel decode that are made before a file is opened.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use stencilfs::control::ServeMode;
use stencilfs::store::Template;

use super::{Backings, State, key};
use crate::protocol::{FileKey, MAX_KEYS};
use crate::server::tree::Tree;

/// Interval for looking whether a backing is being made, before the next one is begun.
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
            // A pass that is running is enough.
            let Ok(_alone) = backings.background.try_lock() else { return };
            for digest in tree.newest() {
                // A template that was removed or is damaged: the next one.
                let Ok(template) = tree.template(&digest) else { continue };
                for file in
                    (0..template.files().len()).filter(|file| backings.may_have_backing(&template, *file))
                {
                    backings.make(&template, file);
                }
            }
        });
    }

    /// Makes the backing of a file that has none, when no other backing is being made.
    fn make(&self, template: &Arc<Template>, file: usize) {
        while self.states().values().any(|state| matches!(state, State::Filling { .. })) {
            thread::sleep(IDLE_INTERVAL);
        }
        let states = self.states();
        if !states.contains_key(&key(template, file)) {
            self.begin(states, template, file, State::filling());
        }
    }

    /// Makes the backings for kernel decode again that decode packs which a collection has removed: their space is freed
    /// when no backing has them open. Backings in use stay.
    pub fn renew(self: &Arc<Self>, tree: &Arc<Tree>) {
        if self.mode != ServeMode::Kernel {
            return;
        }
        let outdated = |(key, state): (&FileKey, &State)| match state {
            State::Ready(ready) if ready.packs.iter().any(|pack| !pack.exists()) => Some(key.clone()),
            _ => None,
        };
        let keys: Vec<FileKey> = self.states().iter().filter_map(outdated).collect();
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("cannot release removed packs: {error}");
            }
        }
        self.make_all(tree);
    }
}
