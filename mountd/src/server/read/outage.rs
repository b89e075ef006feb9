//! Store outages: the store is unmounted, moved away, unreadable, or on a server that is down.
//!
//! A READ waits for a while, as for a slow disk, since an error would end the guest. Waiting READs occupy no thread, so
//! that requests that need no store are answered meanwhile. All other requests fail at once.

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

/// Interval between checks of the store.
pub const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Time after which a waiting READ fails.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A READ that waits for the store.
#[derive(Debug)]
struct Waiting {
    flight: Flight,
    reply: ReplyData,
    until: Instant,
}

/// Retries `work` while the store is away, for as long as a READ would wait.
///
/// # Errors
/// Returns the last error of `work`.
pub fn retry_while_away<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + LONGEST_WAIT;
    loop {
        match work() {
            Err(error) if error.code() == Code::TryAgain && Instant::now() < until => {
                thread::sleep(RETRY_INTERVAL)
            }
            result => return result,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Start of the current outage.
    since: Option<Instant>,
    /// Bounded by the parking slots in the table of pending requests.
    waiting: Vec<Waiting>,
    /// Number of READs that have waited in this outage, and of those that have failed.
    waited: u64,
    failed: u64,
}

/// READs that wait for the store.
#[derive(Debug)]
pub struct StoreOutage {
    store: Store,
    reader: Arc<Reader>,
    stats: Stats,
    state: Mutex<State>,
    wake: Condvar,
}

impl StoreOutage {
    /// Starts a thread that watches the store.
    pub fn new(store: Store, reader: Arc<Reader>, stats: Stats) -> Arc<StoreOutage> {
        let source =
            Arc::new(StoreOutage { store, reader, stats, state: Mutex::default(), wake: Condvar::new() });
        let ours = Arc::clone(&source);
        thread::spawn(move || ours.watch());
        source
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a request failed because the store is away. The log has one line at the start of an outage and one
    /// at its end.
    pub fn note_outage(&self) {
        self.start_outage(&mut self.state());
    }

    fn start_outage(&self, state: &mut State) {
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
            log::error!(
                "{error}; READs wait up to {LONGEST_WAIT:?} for the store, other requests fail with EIO"
            );
        }
        self.wake.notify_all();
    }

    /// Answers a READ when the store can be reached again, or with an error after [`LONGEST_WAIT`].
    pub fn wait(&self, mut flight: Flight, mut reply: ReplyData) {
        let until = Instant::now() + LONGEST_WAIT;
        let mut state = self.state();
        self.start_outage(&mut state);
        state.waited += 1;
        self.stats.count(Counter::SourceWaits);
        if flight.park(Phase::WaitingForStore) {
            state.waiting.push(Waiting { flight, reply, until });
            return;
        }
        drop(state);
        // All parking slots are taken: wait in this thread.
        while Instant::now() < until {
            flight.stamp(Phase::WaitingForStore);
            thread::sleep(RETRY_INTERVAL);
            match self.answer(flight, reply) {
                Some(again) => (flight, reply) = again,
                None => return,
            }
        }
        self.fail(&flight, reply);
    }

    /// Sends the reply. Returns the READ if the store is still away.
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
            let request = flight.request();
            log::error!(
                "READ at {} of inode {} failed with EIO: the store was away for {LONGEST_WAIT:?}; further ones are not logged",
                request.offset,
                request.ino
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
            thread::sleep(RETRY_INTERVAL);
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
                flight.stamp(Phase::WaitingForStore);
                left.push(Waiting { flight, reply, until });
            }
            let mut state = self.state();
            state.waiting.append(&mut left);
            // More READs may have started to wait while earlier ones were answered.
            if reachable
                && state.waiting.is_empty()
                && let Some(since) = state.since.take()
            {
                log::info!(
                    "the store can be reached again after {:.1} s: {} READs waited, {} failed",
                    since.elapsed().as_secs_f64(),
                    state.waited,
                    state.failed
                );
            }
        }
    }
}
