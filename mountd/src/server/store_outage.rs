//! Waits for a store that cannot be reached: unmounted, moved away, unreadable, on a server that is down.
//!
//! A guest that needs a page from it waits a while, as for a slow disk: an error would be its death. READs that wait
//! hold up no thread, so that whatever needs no store is answered meanwhile. Every other request gets its error at once.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fuser::ReplyData;
use stencilfs::control::Phase;
use stencilfs::error::{Code, Result};
use stencilfs::store::Store;

use crate::protocol::stats::{Counter, Stats};
use crate::server::in_flight::Flight;
use crate::server::read::Reader;
use crate::server::refusal::Refusal;

/// The store is looked for so often.
pub const AGAIN: Duration = Duration::from_millis(100);

/// A READ that waited so long fails.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A READ without an answer.
#[derive(Debug)]
struct Waiting {
    flight: Flight,
    reply: ReplyData,
    until: Instant,
}

/// Tries again while the store is away, as long as a READ would wait.
///
/// # Errors
/// What `work` says in the end.
pub fn patiently<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + LONGEST_WAIT;
    loop {
        match work() {
            Err(error) if error.code() == Code::TryAgain && Instant::now() < until => thread::sleep(AGAIN),
            done => return done,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Since when the store is away.
    since: Option<Instant>,
    /// No more than the table of requests in flight has slots.
    waiting: Vec<Waiting>,
    /// READs that waited since then, and those that did so in vain.
    waited: u64,
    failed: u64,
}

/// What waits for the store.
#[derive(Debug)]
pub struct Source {
    store: Store,
    reader: Arc<Reader>,
    stats: Stats,
    state: Mutex<State>,
    wake: Condvar,
}

impl Source {
    /// Watches over that store, from a thread of its own.
    pub fn new(store: Store, reader: Arc<Reader>, stats: Stats) -> Arc<Source> {
        let source = Arc::new(Source { store, reader, stats, state: Mutex::default(), wake: Condvar::new() });
        let ours = Arc::clone(&source);
        thread::spawn(move || ours.watch());
        source
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request met a store that is away. The log has one line when that begins and one when it ends.
    pub fn note(&self) {
        self.begin(&mut self.state());
    }

    fn begin(&self, state: &mut State) {
        if state.since.is_some() {
            return;
        }
        *state = State {
            since: Some(Instant::now()),
            waiting: std::mem::take(&mut state.waiting),
            ..State::default()
        };
        self.stats.count(Counter::SourceOutages);
        if let Err(error) = self.store.check_reachable() {
            log::error!("{error}; READs wait for it up to {LONGEST_WAIT:?}, other requests get EIO");
        }
        self.wake.notify_all();
    }

    /// Answers a READ as soon as the store is back, or with an error in the end.
    pub fn wait(&self, mut flight: Flight, mut reply: ReplyData) {
        let until = Instant::now() + LONGEST_WAIT;
        let mut state = self.state();
        self.begin(&mut state);
        state.waited += 1;
        self.stats.count(Counter::SourceWaits);
        if flight.park(Phase::WaitingForSource) {
            state.waiting.push(Waiting { flight, reply, until });
            return;
        }
        drop(state);
        // As many wait as can without a thread: this one waits in its own.
        while Instant::now() < until {
            flight.stamp(Phase::WaitingForSource);
            thread::sleep(AGAIN);
            match self.answer(flight, reply) {
                Some(again) => (flight, reply) = again,
                None => return,
            }
        }
        self.fail(&flight, reply);
    }

    /// Gives the answer, whatever it is; gives the READ back while the store is away.
    fn answer(&self, flight: Flight, reply: ReplyData) -> Option<(Flight, ReplyData)> {
        let mut unsent = Some(reply);
        let done = self.reader.read(&flight, |bytes| {
            if let Some(reply) = unsent.take() {
                reply.data(bytes);
            }
        });
        let (Err(refusal), Some(reply)) = (done, unsent) else { return None };
        if refusal == Refusal::Away {
            return Some((flight, reply));
        }
        self.stats.count(if refusal == Refusal::Damaged { Counter::Damaged } else { Counter::Failed });
        flight.replying();
        reply.error(refusal.errno());
        None
    }

    fn fail(&self, flight: &Flight, reply: ReplyData) {
        self.stats.count(Counter::Failed);
        let mut state = self.state();
        state.failed += 1;
        if state.failed == 1 {
            let asked = flight.asked();
            log::error!(
                "a READ at {} of inode {} waited {LONGEST_WAIT:?} for the store: it gets EIO, and so do those after it",
                asked.offset,
                asked.ino
            );
        }
        drop(state);
        flight.replying();
        reply.error(Refusal::Away.errno());
    }

    fn watch(&self) {
        loop {
            drop(
                self.wake
                    .wait_while(self.state(), |s| s.since.is_none())
                    .unwrap_or_else(PoisonError::into_inner),
            );
            thread::sleep(AGAIN);
            let reachable = self.store.check_reachable().is_ok();
            let waiting = std::mem::take(&mut self.state().waiting);
            let mut left = Vec::new();
            for Waiting { flight, reply, until } in waiting {
                let again = if reachable { self.answer(flight, reply) } else { Some((flight, reply)) };
                let Some((flight, reply)) = again else { continue };
                if Instant::now() >= until {
                    self.fail(&flight, reply);
                    continue;
                }
                flight.stamp(Phase::WaitingForSource);
                left.push(Waiting { flight, reply, until });
            }
            let mut state = self.state();
            state.waiting.append(&mut left);
            // Others may have come to wait while those before them were answered.
            if reachable
                && state.waiting.is_empty()
                && let Some(since) = state.since.take()
            {
                log::info!(
                    "the store can be reached again after {:.1} s: {} READs waited for it, {} of them in vain",
                    since.elapsed().as_secs_f64(),
                    state.waited,
                    state.failed
                );
            }
        }
    }
}
