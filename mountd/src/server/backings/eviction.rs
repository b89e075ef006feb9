//! Closes backings while the mount lives: those of condemned and removed templates, and those whose space is needed.

use std::thread;
use std::time::{Duration, Instant};

use stencilfs::error::{Error, Result};
use stencilfs::store::Store;

use super::hydrate::Prepared;
use super::{Backings, Job, State};
use crate::protocol::stats::Counter;
use crate::protocol::{FileKey, MAX_KEYS};
use crate::server::pending::PendingOpen;
use crate::server::refusal::Refusal;

/// Longest wait for a hydration of a condemned template to stop; it may be waiting for the store.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

impl Backings {
    /// Stops serving the given backings, and makes the supervisor close those that no process uses.
    pub(super) fn evict(&self, keys: Vec<FileKey>) -> Result<()> {
        let mut evicting = Vec::new();
        {
            let mut states = self.states();
            for key in keys {
                match states.remove(&key) {
                    Some(State::Ready(ready)) => {
                        states.insert(key.clone(), State::Evicting { ready, waiting: Vec::new() });
                        evicting.push(key);
                    }
                    Some(other) => drop(states.insert(key, other)),
                    None => {}
                }
            }
        }
        let closed = self.hydrator.evict(evicting.clone());
        let evicted: &[FileKey] = closed.as_deref().unwrap_or(&[]);
        let mut opens = Vec::new();
        {
            let mut states = self.states();
            for key in evicting {
                let Some(State::Evicting { ready, waiting }) = states.remove(&key) else { continue };
                opens.extend(waiting);
                if evicted.contains(&key) {
                    self.stats.count(Counter::Evictions);
                    log::info!(template:% = key.digest, file = key.file; "evicted the unused backing of template {} file {}", key.digest, key.file);
                } else {
                    states.insert(key, State::Ready(ready));
                }
            }
        }
        for (template, file, opening) in opens {
            let condemned = self.hydrator.condemned();
            let _guard = condemned.guard();
            if condemned.holds(template.digest()) {
                opening.reply(Err(Refusal::NoEntry));
            } else {
                condemned.opened(template.digest());
                self.open(&template, file, opening);
            }
        }
        closed.map(|_| ())
    }

    /// Stops all activity for condemned templates: refuses waiting opens, and waits until hydrations stop at their next
    /// piece. Drops the states of removed templates.
    pub fn stop_condemned(&self) {
        let condemned = self.hydrator.condemned();
        let is_condemned = |(job, ..): &mut (Job, Prepared, Instant)| condemned.holds(&job.key.digest);
        let queued: Vec<_> = self.verifications().extract_if(.., is_condemned).collect();
        for (job, _, start) in queued {
            self.finish(&job, Err(Error::not_found("the template is condemned")), start);
        }
        let until = Instant::now() + STOP_TIMEOUT;
        loop {
            let mut refused = Vec::new();
            let mut filling = false;
            self.states().retain(|key, state| {
                if !condemned.holds(&key.digest) {
                    return true;
                }
                match state {
                    State::Filling { waiting, .. } => {
                        refused.append(waiting);
                        filling = true;
                        true
                    }
                    State::Evicting { waiting, .. } => {
                        refused.extend(waiting.drain(..).map(|(_, _, opening)| opening));
                        true
                    }
                    State::Ready(_) | State::Decode { .. } => !condemned.is_removed(&key.digest),
                }
            });
            refused.into_iter().for_each(|opening: PendingOpen| opening.reply(Err(Refusal::NoEntry)));
            if !filling || Instant::now() > until {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Evicts the unused backings of templates that the store no longer has. Such backings are left over if a removal
    /// was killed before it released the templates.
    pub fn evict_vanished(&self, store: &Store) {
        let ready = |(key, state): (&FileKey, &State)| matches!(state, State::Ready(_)).then(|| key.clone());
        let mut keys: Vec<FileKey> = self.states().iter().filter_map(ready).collect();
        let condemned = self.hydrator.condemned();
        keys.retain(|key| !condemned.holds(&key.digest) && matches!(store.find(&key.digest), Ok(false)));
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("cannot evict backings of removed templates: {error}");
            }
        }
    }
}
