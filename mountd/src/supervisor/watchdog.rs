//! Sees that requests of the kernel are answered in time.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use stencilfs::control::{InFlightTable, Phase};
use stencilfs::sys::fusectl::Waiting;

use crate::protocol::stats::{Counter, Stats};

/// It never looks less often.
const SELDOM: Duration = Duration::from_millis(500);

/// What it watches.
#[derive(Debug)]
pub struct Watchdog {
    /// A server that leaves a request alone for so long is replaced; zero for never.
    limit: Duration,
    /// The kernel's count of requests without an answer, those that no server has read included.
    waiting: Option<Waiting>,
    /// Requests that the present server has read.
    table: Option<InFlightTable>,
    /// Since when nothing is answered though something waits, and how much was answered by then.
    idle: Option<(Instant, u64)>,
    /// The slow source was told of.
    told: bool,
}

impl Watchdog {
    /// Watches the connection of that device.
    pub fn new(limit: Duration, device: u64) -> Watchdog {
        let waiting = Waiting::of(device)
            .inspect_err(|e| log::warn!("requests that no server reads go unwatched: fusectl: {e}"));
        Watchdog { limit, waiting: waiting.ok(), table: None, idle: None, told: false }
    }

    /// How often it wants to look.
    pub fn interval(&self) -> Duration {
        let often = if self.limit.is_zero() { SELDOM } else { self.limit / 10 };
        often.clamp(Duration::from_millis(20), SELDOM)
    }

    /// From now on this server is watched.
    pub fn watch(&mut self, table: Option<OwnedFd>) {
        let table = table.map(InFlightTable::map).transpose();
        self.table = table.inspect_err(|e| log::error!("the server's table of requests: {e}")).ok().flatten();
        self.idle = None;
        self.told = false;
    }

    /// Why a server that was started then, and does not serve yet, is to be replaced, if it is.
    pub fn look_at_start(&self, since: Instant) -> Option<String> {
        let waits = since.elapsed();
        let late = !self.limit.is_zero() && waits >= self.limit;
        late.then(|| format!("it does not serve {:.1} s after its start", waits.as_secs_f64()))
    }

    /// Why the server is to be replaced, if it is.
    pub fn look(&mut self, stats: &Stats) -> Option<String> {
        if self.limit.is_zero() {
            return None;
        }
        let table = self.table.as_ref();
        if let Some(stuck) = table.and_then(InFlightTable::stillest).filter(|r| r.still >= self.limit) {
            return Some(format!("{stuck}"));
        }
        let oldest = table.and_then(InFlightTable::oldest);
        match oldest.filter(|r| r.phase == Phase::WaitingForSource && r.age >= self.limit) {
            Some(slow) if !self.told => {
                log::warn!("the store is slow: {slow}; another server could not help");
                stats.count(Counter::SlowSource);
                self.told = true;
            }
            Some(_) => {}
            None => self.told = false,
        }
        let answers = stats.get(Counter::Answers);
        let waiting = self.waiting.as_ref().and_then(|w| w.read().ok()).unwrap_or(0);
        let parked = table.map_or(0, InFlightTable::parked) as u64;
        // What a server has read is timed by its own table.
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
