//! Store outages: the store is unmounted, moved away, unreadable, or on a server that is down.
//!
//! A READ waits for a while, as for a slow disk, since an error would end the guest. Waiting READs occupy no thread, so
//! that requests that need no store are answered meanwhile. All other requests fail at once.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control::Phase;
use stencilfs::store::Store;

use crate::protocol::stats::{Counter, Stats};
use crate::server::in_flight::Flight;
use crate::server::pending::ReadReply;
use crate::server::read::Reader;
use crate::server::refusal::Refusal;

/// Interval between two attempts to reach the store.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Longest wait for a store that is away: of READs, hydrations, and the startup of a successor.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(30);

/// Retries `work` for at most `timeout`, while `is_away` returns true for its error.
///
/// # Errors
/// Returns the last error of `work`.
pub fn retry_while<T, E>(
    timeout: Duration,
    is_away: impl Fn(&E) -> bool,
    mut work: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + timeout;
    loop {
        match work() {
            Err(error) if is_away(&error) && Instant::now() < until => thread::sleep(RETRY_INTERVAL),
            result => return result,
        }
    }
}

/// A READ that waits for the store.
struct Waiting {
    flight: Flight,
    reply: ReadReply,
    until: Instant,
}

#[derive(Default)]
struct State {
    /// Start of the current outage.
    since: Option<Instant>,
    /// Bounded by the number of parking slots in the in-flight table.
    waiting: Vec<Waiting>,
    /// Number of READs that have waited during this outage.
    waited: u64,
    /// Number of READs that have failed during this outage.
    failed: u64,
}

/// READs that wait for the store.
pub struct StoreOutage {
    store: Store,
    reader: Arc<Reader>,
    stats: Stats,
    timeout: Duration,
    state: Mutex<State>,
    wake: Condvar,
}

impl std::fmt::Debug for StoreOutage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoreOutage({} READs wait)", self.state().waiting.len())
    }
}

impl StoreOutage {
    /// Starts a thread that answers waiting READs. A READ waits for at most `timeout`.
    pub fn new(store: Store, reader: Arc<Reader>, stats: Stats, timeout: Duration) -> Arc<StoreOutage> {
        let (state, wake) = (Mutex::default(), Condvar::new());
        let outage = Arc::new(StoreOutage { store, reader, stats, timeout, state, wake });
        let ours = Arc::clone(&outage);
        thread::spawn(move || ours.watch());
        outage
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a request failed because the store is away. The log has one line at the start of an outage and one
    /// at its end.
    pub fn note(&self) {
        self.start(&mut self.state());
    }

    fn start(&self, state: &mut State) {
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
            let timeout = self.timeout;
            log::error!("{error}; READs wait up to {timeout:?} for the store, other requests fail with EIO");
        }
        self.wake.notify_all();
    }

    /// Answers a READ when the store can be reached again, or with an error after the timeout.
    pub fn wait(&self, mut flight: Flight, reply: ReadReply) {
        let until = Instant::now() + self.timeout;
        let mut state = self.state();
        self.start(&mut state);
        state.waited += 1;
        self.stats.count(Counter::SourceWaits);
        if flight.park(Phase::WaitingForStore) {
            state.waiting.push(Waiting { flight, reply, until });
            return;
        }
        drop(state);
        // All parking slots are taken: wait in this thread.
        let mut unanswered = Some((flight, reply));
        let attempt = || {
            let Some((flight, reply)) = unanswered.take() else { return Ok(()) };
            unanswered = self.reader.answer(flight, reply);
            let Some((flight, _)) = &unanswered else { return Ok(()) };
            flight.stamp(Phase::WaitingForStore);
            Err(())
        };
        if retry_while(self.timeout, |()| true, attempt).is_err()
            && let Some((flight, reply)) = unanswered
        {
            self.fail(&flight, reply);
        }
    }

    fn fail(&self, flight: &Flight, reply: ReadReply) {
        self.stats.count(Counter::Failed);
        let mut state = self.state();
        state.failed += 1;
        if state.failed == 1 {
            let request = flight.request();
            log::error!(
                "READ at {} of inode {} failed with EIO: the store was away for {:?}; further failures are not logged",
                request.offset,
                request.ino,
                self.timeout
            );
        }
        drop(state);
        flight.replying();
        reply(Err(Refusal::Away));
    }

    fn watch(&self) {
        loop {
            drop(
                self.wake
                    .wait_while(self.state(), |s| s.since.is_none())
                    .unwrap_or_else(PoisonError::into_inner),
            );
            thread::sleep(RETRY_INTERVAL);
            self.attempt();
        }
    }

    /// Answers the waiting READs if the store can be reached. Otherwise answers those READs with an error that have
    /// timed out.
    fn attempt(&self) {
        let reachable = self.store.check_reachable().is_ok();
        let waiting = std::mem::take(&mut self.state().waiting);
        let mut still_waiting = Vec::new();
        for Waiting { flight, reply, until } in waiting {
            let unanswered =
                if reachable { self.reader.answer(flight, reply) } else { Some((flight, reply)) };
            let Some((flight, reply)) = unanswered else { continue };
            if Instant::now() >= until {
                self.fail(&flight, reply);
                continue;
            }
            flight.stamp(Phase::WaitingForStore);
            still_waiting.push(Waiting { flight, reply, until });
        }
        let mut state = self.state();
        state.waiting.append(&mut still_waiting);
        // More READs may have started to wait while earlier ones were answered.
        if reachable
            && state.waiting.is_empty()
            && let Some(since) = state.since.take()
        {
            log::info!(
                "the store can be reached again after {:.1} s: READs that waited: {}, failed: {}",
                since.elapsed().as_secs_f64(),
                state.waited,
                state.failed
            );
        }
    }
}
