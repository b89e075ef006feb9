//! The watchdog: checks that requests of the kernel are answered in time.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use stencilfs::control::{InFlightTable, Phase};
use stencilfs::sys::fusectl::Waiting;

use crate::stats::{Counter, Stats};

/// Longest interval between checks.
const MAX_INTERVAL: Duration = Duration::from_millis(500);

/// The watchdog of one mount.
#[derive(Debug)]
pub struct Watchdog {
    /// A server that makes no progress with a request for this long is replaced; zero disables the watchdog.
    limit: Duration,
    /// The kernel's count of unanswered requests (fusectl), including those that no server has read.
    waiting: Option<Waiting>,
    /// Pending requests that the current server has read.
    table: Option<InFlightTable>,
    /// Since when requests are unread and none is answered, and the value of the `answers` counter at that time.
    idle: Option<(Instant, u64)>,
    /// True after the current outage was logged.
    outage_logged: bool,
}

impl Watchdog {
    /// Creates the watchdog for the connection of `device`.
    pub fn new(limit: Duration, device: u64) -> Watchdog {
        let waiting = Waiting::of(device)
            .inspect_err(|e| log::warn!("cannot watch for requests that no server reads: fusectl: {e}"));
        Watchdog { limit, waiting: waiting.ok(), table: None, idle: None, outage_logged: false }
    }

    /// Returns the interval between checks.
    pub fn interval(&self) -> Duration {
        let interval = if self.limit.is_zero() { MAX_INTERVAL } else { self.limit / 10 };
        interval.clamp(Duration::from_millis(20), MAX_INTERVAL)
    }

    /// Switches to the server with this table of pending requests.
    pub fn watch(&mut self, table: Option<OwnedFd>) {
        let table = table.map(InFlightTable::map).transpose();
        self.table = table
            .inspect_err(|e| log::error!("cannot map the server's table of requests: {e}"))
            .ok()
            .flatten();
        self.idle = None;
        self.outage_logged = false;
    }

    /// Returns the reason to replace a server that was started at `since` and does not serve yet, if there is one.
    pub fn check_startup(&self, since: Instant) -> Option<String> {
        let elapsed = since.elapsed();
        let late = !self.limit.is_zero() && elapsed >= self.limit;
        late.then(|| format!("the server does not serve {:.1} s after its start", elapsed.as_secs_f64()))
    }

    /// Returns the reason to replace the server, if there is one.
    pub fn check(&mut self, stats: &Stats) -> Option<String> {
        if self.limit.is_zero() {
            return None;
        }
        let table = self.table.as_ref();
        if let Some(stuck) = table.and_then(InFlightTable::stillest).filter(|r| r.still >= self.limit) {
            return Some(format!("{stuck}"));
        }
        let oldest = table.and_then(InFlightTable::oldest);
        match oldest.filter(|r| r.phase == Phase::WaitingForSource && r.age >= self.limit) {
            Some(slow) if !self.outage_logged => {
                log::warn!("the store is slow: {slow}; a restart of the server would not help");
                stats.count(Counter::SlowSource);
                self.outage_logged = true;
            }
            Some(_) => {}
            None => self.outage_logged = false,
        }
        let answers = stats.get(Counter::Answers);
        let waiting = self.waiting.as_ref().and_then(|w| w.read().ok()).unwrap_or(0);
        let parked = table.map_or(0, InFlightTable::parked) as u64;
        // Requests that a server has read are timed by its table.
        if waiting <= parked || oldest.is_some() || self.idle.is_some_and(|(_, before)| before != answers) {
            self.idle = None;
        }
        if waiting <= parked || oldest.is_some() {
            return None;
        }
        let (since, _) = *self.idle.get_or_insert((Instant::now(), answers));
        let idle = since.elapsed();
        (idle >= self.limit)
            .then(|| format!("{} requests unread for {:.1} s", waiting - parked, idle.as_secs_f64()))
    }
}
