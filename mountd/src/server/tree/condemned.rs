//! The list of condemned templates: lookups and opens of a condemned template fail.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use stencilfs::control::CondemnedRow;
use stencilfs::store::Digest;

/// Longest time from the reply to an open until the open file is visible in `/proc` of its process, also on a busy
/// host.
pub const GRACE: Duration = Duration::from_millis(200);

/// Interval between two checks for a newer list while the watcher waits for guards.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Largest number of recorded opens that are older than [`GRACE`].
const MAX_OPENED: usize = 4096;

/// The list of condemned templates.
#[derive(Debug)]
pub struct Condemned {
    /// The value is true for a template that is already removed.
    now: RwLock<HashMap<Digest, bool>>,
    guards: Mutex<Epochs>,
    opened: Mutex<HashMap<Digest, Instant>>,
    /// Start of this server: opens that its predecessor answered count as answered at this time.
    start: Instant,
}

/// Each reader of the list holds a guard (a sender) until its reply is sent. An epoch ends when its last guard is
/// dropped, which its receiver reports as a disconnect. A reader that hangs in a file system delays removals, but no
/// later reader.
#[derive(Debug)]
struct Epochs {
    now: (Sender<Infallible>, Receiver<Infallible>),
    /// Earlier epochs, whose readers may still act on an earlier list.
    before: Vec<Receiver<Infallible>>,
}

/// A reader's guard on the list of condemned templates.
#[derive(Debug)]
pub struct ListGuard(#[allow(dead_code, reason = "the existence of the sender counts")] Sender<Infallible>);

fn list(rows: &[CondemnedRow]) -> HashMap<Digest, bool> {
    rows.iter().map(|row| (row.digest, row.removed)).collect()
}

impl Condemned {
    /// Creates the list.
    pub fn new(rows: &[CondemnedRow]) -> Arc<Condemned> {
        Arc::new(Condemned {
            now: RwLock::new(list(rows)),
            guards: Mutex::new(Epochs { now: channel(), before: Vec::new() }),
            opened: Mutex::default(),
            start: Instant::now(),
        })
    }

    fn epochs(&self) -> MutexGuard<'_, Epochs> {
        self.guards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a guard that must be held from the check of the list until the reply is sent.
    pub fn guard(&self) -> ListGuard {
        ListGuard(self.epochs().now.0.clone())
    }

    /// Returns true if the template is condemned.
    pub fn holds(&self, digest: &Digest) -> bool {
        self.now.read().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    /// Returns true if the template is condemned and already removed.
    pub fn is_removed(&self, digest: &Digest) -> bool {
        self.now.read().unwrap_or_else(PoisonError::into_inner).get(digest) == Some(&true)
    }

    /// Records that an open of the template is answered now.
    pub fn opened(&self, digest: &Digest) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.len() >= MAX_OPENED {
            opened.retain(|_, at| at.elapsed() < GRACE);
        }
        opened.insert(*digest, Instant::now());
    }

    /// Publishes a new list, and starts a new epoch of guards. Readers with a guard of an earlier epoch may still act
    /// on an earlier list.
    pub fn change(&self, rows: &[CondemnedRow]) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = list(rows);
        // The new epoch begins after the new list is set: a reader that takes its guard from here on sees the new list.
        let mut epochs = self.epochs();
        let (_, old) = std::mem::replace(&mut epochs.now, channel());
        epochs.before.push(old);
    }

    /// Waits up to [`CHECK_INTERVAL`] for the next guard of an earlier epoch. Returns true if all those guards are
    /// dropped.
    pub fn is_settled(&self) -> bool {
        let before = std::mem::take(&mut self.epochs().before);
        let is_over =
            |old: &Receiver<_>| old.recv_timeout(CHECK_INTERVAL) == Err(RecvTimeoutError::Disconnected);
        let remaining: Vec<_> = before.into_iter().skip_while(is_over).collect();
        let settled = remaining.is_empty();
        self.epochs().before.extend(remaining);
        settled
    }

    /// Returns the longest remaining time until all answered opens of condemned templates are visible in `/proc`.
    pub fn grace(&self) -> Duration {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let last = now.keys().map(|digest| opened.get(digest).copied().unwrap_or(self.start).max(self.start));
        last.map(|at| GRACE.saturating_sub(at.elapsed())).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn row(digest: Digest, removed: bool) -> CondemnedRow {
        CondemnedRow { digest, removed }
    }

    #[test]
    fn a_new_list_settles_after_the_readers_of_the_old_one() {
        let condemned = Condemned::new(&[]);
        let digest = Digest::of(b"x");
        let guard = condemned.guard();
        condemned.change(&[row(digest, false)]);
        assert!(condemned.holds(&digest));
        assert!(!condemned.is_settled(), "a reader still acts on the old list");
        condemned.opened(&digest);
        drop(guard);
        assert!(condemned.is_settled());
        assert!(condemned.grace() > Duration::ZERO && condemned.grace() <= GRACE);
        assert!(!condemned.is_removed(&digest));
        condemned.change(&[row(digest, true)]);
        assert!(condemned.is_removed(&digest));
        condemned.change(&[]);
        assert!(!condemned.holds(&digest));
        assert_eq!(condemned.grace(), Duration::ZERO);
    }

    /// A reader that hangs delays the settling of a list, but neither other readers nor the publication of newer lists.
    #[test]
    fn a_hanging_reader_blocks_no_other_reader() {
        let condemned = Condemned::new(&[]);
        let digest = Digest::of(b"x");
        let hanging = condemned.guard();
        condemned.change(&[row(digest, false)]);
        assert!(!condemned.is_settled());
        let other = Arc::clone(&condemned);
        let reader = thread::spawn(move || (other.guard(), other.holds(&digest)));
        let start = Instant::now();
        while !reader.is_finished() {
            assert!(!condemned.is_settled());
            assert!(start.elapsed() < Duration::from_secs(10), "the second reader is blocked");
        }
        let (guard, held) = reader.join().unwrap();
        assert!(held);
        condemned.change(&[]);
        assert!(!condemned.holds(&digest));
        drop(hanging);
        assert!(!condemned.is_settled(), "the second reader acts on the list that hid the template");
        drop(guard);
        assert!(condemned.is_settled());
    }
}
