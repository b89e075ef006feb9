//! Templates that are about to be removed, as the server sees them: nobody finds or opens them any more.
//!
//! ```text
//!   supervisor: ledger written, bell rung ─▶ this thread: the new list counts ─▶ whoever looked at the old one is answered
//!   ─▶ opens that wait are refused, backings that are made are given up ─▶ the supervisor is told
//! ```
//! The supervisor believes that only when it is told, so a server that dies in between costs time and nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control::CondemnedRow;
use stencilfs::store::{Digest, Store};

use crate::kept;
use crate::link::{Ask, Link};
use crate::passthrough::Passthrough;
use crate::stats::Stats;
use crate::tree::Tree;

/// An open that was answered is seen in its process within this time, even on a busy host.
pub const GRACE: Duration = Duration::from_millis(200);

/// No more opens are remembered than so many, but for those of the last moment.
const MOST: usize = 4096;

/// What is condemned now.
#[derive(Debug)]
pub struct Condemned {
    /// True for those that are removed already.
    now: RwLock<HashMap<Digest, bool>>,
    /// Held by whoever looks at the list, until the answer that follows from it is given.
    looking: RwLock<()>,
    opened: Mutex<HashMap<Digest, Instant>>,
    /// What the server before has answered is not known.
    begun: Instant,
}

fn list(rows: &[CondemnedRow]) -> HashMap<Digest, bool> {
    rows.iter().map(|row| (row.digest, row.removed)).collect()
}

impl Condemned {
    /// These, from the beginning.
    pub fn new(rows: &[CondemnedRow]) -> Arc<Condemned> {
        Arc::new(Condemned {
            now: RwLock::new(list(rows)),
            looking: RwLock::new(()),
            opened: Mutex::default(),
            begun: Instant::now(),
        })
    }

    /// To be held from the question whether a template is condemned to the answer that is given.
    pub fn look(&self) -> RwLockReadGuard<'_, ()> {
        self.looking.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// True for a template that nobody may find or open.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.now.read().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    /// True for one that is removed already.
    pub fn is_removed(&self, digest: &Digest) -> bool {
        self.now.read().unwrap_or_else(PoisonError::into_inner).get(digest) == Some(&true)
    }

    /// An open of that template is answered now.
    pub fn opened(&self, digest: &Digest) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.len() >= MOST {
            opened.retain(|_, at| at.elapsed() < GRACE);
        }
        opened.insert(*digest, Instant::now());
    }

    /// The new list; comes back when nobody acts upon the old one. Gives how long the last open of one that is new
    /// in it may take to be seen.
    fn change(&self, rows: &[CondemnedRow]) -> Duration {
        let new = list(rows);
        let old =
            std::mem::replace(&mut *self.now.write().unwrap_or_else(PoisonError::into_inner), new.clone());
        drop(self.looking.write().unwrap_or_else(PoisonError::into_inner));
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = new.keys().filter(|digest| !old.contains_key(digest));
        let last = fresh.map(|digest| opened.get(digest).copied().unwrap_or(self.begun).max(self.begun));
        last.map(|at| GRACE.saturating_sub(at.elapsed())).max().unwrap_or_default()
    }
}

/// Everything in a server that has to do with a template.
#[derive(Debug)]
pub struct Watcher {
    /// The list.
    pub condemned: Arc<Condemned>,
    /// Names.
    pub tree: Arc<Tree>,
    /// Backings, and opens that wait.
    pub passthrough: Arc<Passthrough>,
    /// The store.
    pub store: Store,
    /// Where the list is written.
    pub ledger: std::os::fd::OwnedFd,
    /// The bell.
    pub stats: Stats,
    /// The way to the supervisor.
    pub link: Arc<Link>,
}

impl Watcher {
    /// Acts upon every ring, from a thread of its own. `heard` is the number of rings before the list was read that the
    /// server began with.
    pub fn start(self, heard: u32) {
        // A supervisor that has never rung may be of a build that does not know what it would be told.
        let first = (heard != 0).then_some(heard);
        thread::spawn(move || {
            let mut heard = heard;
            if let Some(first) = first {
                self.act(first);
            }
            loop {
                self.stats.page().wait_for_ring(heard);
                let now = self.stats.page().rings();
                if now != heard {
                    heard = now;
                    self.act(heard);
                }
            }
        });
    }

    fn act(&self, ring: u32) {
        let rows = match kept::look(&self.ledger) {
            Ok(snapshot) => snapshot.condemned,
            // The supervisor goes on waiting, and says so to who asked it.
            Err(error) => return log::error!("the list of condemned templates cannot be read: {error}"),
        };
        let grace = self.condemned.change(&rows);
        self.passthrough.end_condemned();
        // What it has open of the store keeps room on the disk that was given back.
        self.tree.close_templates();
        self.store.close_vanished();
        let grace_ms = grace.as_millis() as u64;
        if let Err(error) = self.link.tell(&Ask::Condemned { ring, grace_ms }) {
            log::error!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_list_waits_for_who_looked_at_the_old_one() {
        let condemned = Condemned::new(&[]);
        let digest = Digest::of(b"x");
        let guard = condemned.look();
        assert!(!condemned.holds(&digest));
        let changing = Arc::clone(&condemned);
        let changer = thread::spawn(move || changing.change(&[CondemnedRow { digest, removed: false }]));
        while !condemned.holds(&digest) {
            thread::yield_now();
        }
        assert!(!changer.is_finished(), "somebody acts upon the old list yet");
        condemned.opened(&digest);
        drop(guard);
        let grace = changer.join().unwrap();
        assert!(grace > Duration::ZERO && grace <= GRACE);
        assert!(!condemned.is_removed(&digest));
        condemned.change(&[CondemnedRow { digest, removed: true }]);
        assert!(condemned.is_removed(&digest));
        condemned.change(&[]);
        assert!(!condemned.holds(&digest));
    }
}
