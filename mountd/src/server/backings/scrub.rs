//! The scrub of kernel decode: the blocks of each file are verified again some time after their verification, because
//! the kernel does not compare the bytes that it decodes.
//!
//! The scrub reads the file that the kernel decodes, after dropping the pages that no process maps. The scrub thus
//! verifies the packs of the backing, even those that a collection has removed from the store, and the pages that
//! clones map. A damaged file is served by decode from then on.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control::BackingKind;
use stencilfs::error::{Code, Error, Result};
use stencilfs::units::to_usize;

use super::hydrate::{PIECE, drop_cache, now, pieces};
use super::{Backings, RETRY_INTERVAL, State};
use crate::protocol::stats::Counter;
use crate::protocol::{FileKey, ServerRequest};
use crate::server::tree::Tree;

/// Longest pause between two checks for due files.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Shortest interval of the scrub.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Length of the pause after each piece, relative to the time that the piece took: other readers of the disk come
/// first.
const PAUSE_FACTOR: u32 = 4;

/// Interval and number of attempts to report a result to the supervisor.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
const REPORT_ATTEMPTS: u32 = 60;

impl Backings {
    /// Starts the scrub in a thread. Each file is verified when its last verification is older than `interval`; never,
    /// if `interval` is zero.
    pub fn scrub(self: &Arc<Self>, tree: &Arc<Tree>, interval: Duration) {
        if self.hydrator.kind() != BackingKind::Kernel || interval.is_zero() {
            return;
        }
        let interval = interval.max(MIN_INTERVAL);
        let (backings, tree) = (Arc::clone(self), Arc::clone(tree));
        thread::spawn(move || {
            loop {
                let due = backings.due(interval);
                for key in &due {
                    backings.scrub_file(&tree, key);
                }
                thread::sleep(if due.is_empty() { interval.min(LOOK_INTERVAL) } else { Duration::ZERO });
            }
        });
    }

    /// Returns the files whose last verification is too old, or in the future: the clock may have been set back.
    fn due(&self, interval: Duration) -> Vec<FileKey> {
        let now = now();
        let old = |at: u64| at > now || now - at >= interval.as_secs();
        let ready = |(key, state): (&FileKey, &State)| match state {
            State::Ready(ready) if old(ready.verified_at) => Some(key.clone()),
            _ => None,
        };
        self.states().iter().filter_map(ready).collect()
    }

    fn scrub_file(&self, tree: &Tree, key: &FileKey) {
        let at = now();
        let damage = match self.verify_again(tree, key) {
            Ok(()) => {
                self.stats.count(Counter::ScrubsDone);
                log::info!(template:% = key.digest, file = key.file; "the blocks of template {} file {} were verified again", key.digest, key.file);
                None
            }
            Err(error) if error.code() == Code::Damage => Some(error.to_string()),
            Err(error) => {
                log::warn!(
                    template:% = key.digest, file = key.file;
                    "cannot verify template {} file {} again, retrying in {RETRY_INTERVAL:?}: {error}",
                    key.digest,
                    key.file
                );
                return thread::sleep(RETRY_INTERVAL);
            }
        };
        {
            let mut states = self.states();
            let Some(State::Ready(ready)) = states.get_mut(key) else { return };
            ready.verified_at = at;
            if damage.is_some() {
                states.insert(key.clone(), State::Decode { since: Instant::now(), retry: false });
                // Other files may share the damaged record.
                for state in states.values_mut() {
                    if let State::Ready(ready) = state
                        && ready.verified_at < at
                    {
                        ready.verified_at = 0;
                    }
                }
            }
        }
        if let Some(damage) = &damage {
            self.stats.count(Counter::ScrubsDamaged);
            log::error!(
                template:% = key.digest, file = key.file;
                "template {} file {} was damaged after its verification: {damage}; new opens are served by decode; end \
                 the clones that map the file, import the same memory again, and mount again",
                key.digest,
                key.file
            );
        }
        let report = ServerRequest::Scrubbed { key: key.clone(), at, damage };
        for _ in 0..REPORT_ATTEMPTS {
            match self.hydrator.link().request_done(&report) {
                Ok(()) => return,
                Err(error) => log::warn!("cannot report a verification: {error}"),
            }
            thread::sleep(REPORT_INTERVAL);
        }
    }

    fn verify_again(&self, tree: &Tree, key: &FileKey) -> Result<()> {
        let gone = || Error::try_again("the template is being removed, or the store cannot be reached");
        let template = tree.template(&key.digest).map_err(|_| gone())?;
        let file = template.file(&key.file).ok_or_else(gone)?;
        let backing = match self.states().get(key) {
            Some(State::Ready(ready)) => ready.file.try_clone(),
            _ => return Err(gone()),
        };
        let backing = backing
            .map_err(|e| Error::failed("cannot duplicate the descriptor of the backing").because(e))?;
        let mut buffer = vec![0; to_usize(PIECE)];
        for piece in pieces(&template, file)? {
            if self.hydrator.condemned().holds(&key.digest) {
                return Err(gone());
            }
            let before = Instant::now();
            drop_cache(&backing, &piece);
            self.hydrator.verify_piece(&template, file, &backing, &piece, &mut buffer)?;
            self.stats.add(Counter::ScrubbedBytes, piece.end - piece.start);
            thread::sleep(before.elapsed() * PAUSE_FACTOR);
        }
        Ok(())
    }
}
