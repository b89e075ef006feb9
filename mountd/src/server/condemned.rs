//! Templates that are about to be removed, as the server sees them: nobody finds or opens them any more.
//!
//! ```text
//!   supervisor: ledger written, bell rung ─▶ this thread: the new list counts ─▶ whoever looked at the old one is answered
//!   ─▶ opens that wait are refused, backings that are made are given up ─▶ the supervisor is told
//! ```
//! The supervisor believes that only when it is told, so a server that dies in between costs time and nothing else.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control::CondemnedRow;
use stencilfs::store::{Digest, Store};
use stencilfs::sys::fuse_dev;

use crate::protocol::ServerRequest;
use crate::protocol::ledger;
use crate::protocol::link::Link;
use crate::protocol::stats::Stats;
use crate::server::node::Node;
use crate::server::passthrough::Passthrough;
use crate::server::tree::Tree;

/// An open that was answered is seen in its process within this time, even on a busy host.
pub const GRACE: Duration = Duration::from_millis(200);

/// How often who waits looks for a newer list.
const MOMENT: Duration = Duration::from_millis(20);

/// No more opens are remembered than so many, but for those of the last moment.
const MOST: usize = 4096;

/// What is condemned now.
#[derive(Debug)]
pub struct Condemned {
    /// True for those that are removed already.
    now: RwLock<HashMap<Digest, bool>>,
    looking: Mutex<Looks>,
    opened: Mutex<HashMap<Digest, Instant>>,
    /// What the server before has answered is not known.
    begun: Instant,
}

/// Whoever looks at the list keeps a sender until the answer that follows from it is given: a receiver whose senders are
/// all gone has nobody left. One that hangs in a file system holds up a removal, and nobody who looks after it.
#[derive(Debug)]
struct Looks {
    now: (Sender<Infallible>, Receiver<Infallible>),
    /// Those who may act upon lists of before.
    before: Vec<Receiver<Infallible>>,
}

/// Somebody acts upon the list.
#[derive(Debug)]
pub struct Looking(#[allow(dead_code, reason = "it counts by being there")] Sender<Infallible>);

fn list(rows: &[CondemnedRow]) -> HashMap<Digest, bool> {
    rows.iter().map(|row| (row.digest, row.removed)).collect()
}

impl Condemned {
    /// These, from the beginning.
    pub fn new(rows: &[CondemnedRow]) -> Arc<Condemned> {
        Arc::new(Condemned {
            now: RwLock::new(list(rows)),
            looking: Mutex::new(Looks { now: channel(), before: Vec::new() }),
            opened: Mutex::default(),
            begun: Instant::now(),
        })
    }

    fn looks(&self) -> MutexGuard<'_, Looks> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held from the question whether a template is condemned to the answer that is given.
    pub fn look(&self) -> Looking {
        Looking(self.looks().now.0.clone())
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

    /// The new list. Others may still act upon the one before.
    fn change(&self, rows: &[CondemnedRow]) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = list(rows);
        // After the list: who looks from here on sees it.
        let mut looks = self.looks();
        let (_, old) = std::mem::replace(&mut looks.now, channel());
        looks.before.push(old);
    }

    /// True once nobody acts upon a list of before; waits a moment for that.
    fn is_settled(&self) -> bool {
        let before = std::mem::take(&mut self.looks().before);
        let gone = |old: &Receiver<_>| old.recv_timeout(MOMENT) == Err(RecvTimeoutError::Disconnected);
        let left: Vec<_> = before.into_iter().skip_while(gone).collect();
        let settled = left.is_empty();
        self.looks().before.extend(left);
        settled
    }

    /// How long the last open of a condemned template may take to be seen in its process.
    fn grace(&self) -> Duration {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let last = now.keys().map(|digest| opened.get(digest).copied().unwrap_or(self.begun).max(self.begun));
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
    /// The connection to the kernel.
    pub fuse: std::os::fd::OwnedFd,
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
        let rows = match ledger::look(&self.ledger) {
            Ok(snapshot) => snapshot.condemned,
            // The supervisor goes on waiting, and says so to who asked it.
            Err(error) => return log::error!("the list of condemned templates cannot be read: {error}"),
        };
        self.condemned.change(&rows);
        while !self.condemned.is_settled() {
            // What was released meanwhile is found again, whoever hangs.
            if self.stats.page().rings() != ring {
                return;
            }
        }
        rows.iter().filter(|row| !row.removed).for_each(|row| self.forget_names(&row.digest));
        let grace = self.condemned.grace();
        self.passthrough.end_condemned();
        // What it has open of the store keeps room on the disk that was given back.
        self.tree.close_templates();
        self.store.close_vanished();
        let grace_ms = grace.as_millis() as u64;
        if let Err(error) = self.link.call_done(&ServerRequest::Condemned { ring, grace_ms }) {
            log::error!("{error}");
        }
        // After the answer: a removal that was killed waits for nobody.
        self.passthrough.give_up_vanished(&self.store);
    }

    /// Has the kernel forget the files of a template that nobody uses. Lookups are answered by other threads, and a file
    /// whose pages are being read is in use: nothing here waits for this thread.
    fn forget_names(&self, digest: &Digest) {
        // What cannot be forgotten counts as used.
        let Ok(template) = self.tree.template_in_use(digest) else { return };
        let folder = self.tree.ino(&Node::Template(*digest));
        for file in template.files() {
            fuse_dev::forget_name(&self.fuse, folder, &file.name)
                .unwrap_or_else(|e| log::warn!("cannot have the kernel forget {digest}/{}: {e}", file.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(digest: Digest, removed: bool) -> CondemnedRow {
        CondemnedRow { digest, removed }
    }

    #[test]
    fn a_new_list_waits_for_who_looked_at_the_old_one() {
        let condemned = Condemned::new(&[]);
        let digest = Digest::of(b"x");
        let looking = condemned.look();
        condemned.change(&[row(digest, false)]);
        assert!(condemned.holds(&digest));
        assert!(!condemned.is_settled(), "somebody acts upon the old list yet");
        condemned.opened(&digest);
        drop(looking);
        assert!(condemned.is_settled());
        assert!(condemned.grace() > Duration::ZERO && condemned.grace() <= GRACE);
        assert!(!condemned.is_removed(&digest));
        condemned.change(&[row(digest, true)]);
        assert!(condemned.is_removed(&digest));
        condemned.change(&[]);
        assert!(!condemned.holds(&digest));
        assert_eq!(condemned.grace(), Duration::ZERO);
    }

    /// One who hangs holds up what waits for all, and neither those who look nor what is released.
    #[test]
    fn who_hangs_holds_up_nobody_who_looks() {
        let condemned = Condemned::new(&[]);
        let digest = Digest::of(b"x");
        let hangs = condemned.look();
        condemned.change(&[row(digest, false)]);
        assert!(!condemned.is_settled());
        let other = Arc::clone(&condemned);
        let looks = thread::spawn(move || (other.look(), other.holds(&digest)));
        let begun = Instant::now();
        while !looks.is_finished() {
            assert!(!condemned.is_settled());
            assert!(begun.elapsed() < Duration::from_secs(10), "nobody can look");
        }
        let (looking, held) = looks.join().unwrap();
        assert!(held);
        condemned.change(&[]);
        assert!(!condemned.holds(&digest));
        drop(hangs);
        assert!(!condemned.is_settled(), "the second one acts upon the list that hid it");
        drop(looking);
        assert!(condemned.is_settled());
    }
}
