//! The watchdog: detects servers that do not answer the kernel's requests in time.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use stencilfs::control::{InFlight, InFlightTable, Phase};
use stencilfs::sys::fuse::control_fs::Waiting;

use crate::protocol::stats::{Counter, Stats};

/// Longest interval between two checks.
const MAX_INTERVAL: Duration = Duration::from_millis(500);

/// The measurements of one check.
#[derive(Debug, Default)]
struct Reading {
    /// The request that has been in its phase for the longest time.
    longest_in_phase: Option<InFlight>,
    /// The in-flight request that was read first.
    oldest: Option<InFlight>,
    /// Requests without a reply, as counted by the kernel, including requests that no server has read.
    waiting: u64,
    /// Requests that wait in the server without occupying a thread.
    parked: u64,
    /// Requests that were answered since the mount was made.
    answers: u64,
}

/// The result of a check.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    /// The store is slow, which is logged once. Replacing the server would not help.
    SlowStore(String),
    /// The server must be replaced, for this reason.
    Replace(String),
}

/// Decides from measurements; makes no system call.
#[derive(Debug)]
struct Judge {
    /// A server that makes no progress on a request for this long is replaced; zero disables the watchdog.
    limit: Duration,
    /// Time since which no server has read the waiting requests, and the number of answers at that time.
    idle: Option<(Instant, u64)>,
    /// True if the slow store was already logged.
    reported: bool,
}

impl Judge {
    fn judge(&mut self, reading: &Reading, now: Instant) -> Verdict {
        if self.limit.is_zero() {
            return Verdict::Fine;
        }
        if let Some(stuck) = reading.longest_in_phase.as_ref().filter(|r| r.still >= self.limit) {
            return Verdict::Replace(stuck.to_string());
        }
        let slow = |r: &&InFlight| r.phase == Phase::WaitingForStore && r.age >= self.limit;
        let slow = reading.oldest.as_ref().filter(slow);
        let is_new = slow.is_some() && !std::mem::replace(&mut self.reported, slow.is_some());
        self.reported = slow.is_some();
        // For requests that the server has read, the in-flight table has the times.
        let unread = reading.waiting > reading.parked && reading.oldest.is_none();
        if !unread || self.idle.is_some_and(|(_, before)| before != reading.answers) {
            self.idle = None;
        }
        if unread {
            let (since, _) = *self.idle.get_or_insert((now, reading.answers));
            let idle = now.saturating_duration_since(since);
            if idle >= self.limit {
                let count = reading.waiting - reading.parked;
                let requests = if count == 1 { "request" } else { "requests" };
                return Verdict::Replace(format!(
                    "{count} {requests} unread for {:.1} s",
                    idle.as_secs_f64()
                ));
            }
        }
        match slow {
            Some(slow) if is_new => Verdict::SlowStore(slow.to_string()),
            _ => Verdict::Fine,
        }
    }
}

/// Watches the servers of one mount.
#[derive(Debug)]
pub struct Watchdog {
    judge: Judge,
    waiting: Option<Waiting>,
    /// Requests that the current server has read.
    table: Option<InFlightTable>,
}

impl Watchdog {
    /// Creates a watchdog for the connection of `device`.
    pub fn new(limit: Duration, device: u64) -> Watchdog {
        let waiting = Waiting::of(device).inspect_err(|e| {
            log::warn!("the watchdog cannot detect requests that no server reads: fusectl: {e}")
        });
        let judge = Judge { limit, idle: None, reported: false };
        Watchdog { judge, waiting: waiting.ok(), table: None }
    }

    /// Returns the interval between two checks.
    pub fn interval(&self) -> Duration {
        let interval = if self.judge.limit.is_zero() { MAX_INTERVAL } else { self.judge.limit / 10 };
        interval.clamp(Duration::from_millis(20), MAX_INTERVAL)
    }

    /// Sets the in-flight table of the current server; `None` if there is no current server.
    pub fn watch(&mut self, table: Option<OwnedFd>) {
        let table = table.map(InFlightTable::map).transpose();
        self.table = table.inspect_err(|e| log::error!("cannot map the in-flight table: {e}")).ok().flatten();
        (self.judge.idle, self.judge.reported) = (None, false);
    }

    /// Checks a server that was started at `since` and does not serve yet. Returns the reason to replace the server, if
    /// any.
    pub fn check_startup(&self, since: Instant) -> Option<String> {
        let waits = since.elapsed();
        let late = !self.judge.limit.is_zero() && waits >= self.judge.limit;
        late.then(|| format!("the server is not ready to serve after {:.1} s", waits.as_secs_f64()))
    }

    /// Checks the current server. Returns the reason to replace the server, if any.
    pub fn check(&mut self, stats: &Stats) -> Option<String> {
        let table = self.table.as_ref();
        let reading = Reading {
            longest_in_phase: table.and_then(InFlightTable::longest_in_phase),
            oldest: table.and_then(InFlightTable::oldest),
            waiting: self.waiting.as_ref().and_then(|w| w.read().ok()).unwrap_or(0),
            parked: table.map_or(0, InFlightTable::parked) as u64,
            answers: stats.get(Counter::Answers),
        };
        match self.judge.judge(&reading, Instant::now()) {
            Verdict::Fine => None,
            Verdict::SlowStore(request) => {
                log::warn!("the store is slow: {request}; the server is not replaced");
                stats.count(Counter::SlowSource);
                None
            }
            Verdict::Replace(reason) => Some(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn judge() -> Judge {
        Judge { limit: LIMIT, idle: None, reported: false }
    }

    fn request(phase: Phase, age: Duration, still: Duration) -> Option<InFlight> {
        Some(InFlight { unique: 1, opcode: 15, ino: 2, offset: 0, size: 4096, phase, age, still })
    }

    #[test]
    fn a_server_without_progress_on_a_request_is_replaced() {
        let now = Instant::now();
        let stuck = request(Phase::Decoding, LIMIT, LIMIT);
        let reading = Reading { longest_in_phase: stuck, waiting: 1, ..Reading::default() };
        assert!(matches!(judge().judge(&reading, now), Verdict::Replace(_)));
        let never = Judge { limit: Duration::ZERO, ..judge() };
        assert_eq!({ never }.judge(&reading, now), Verdict::Fine);
        let young = request(Phase::Decoding, LIMIT, LIMIT / 2);
        let reading = Reading { longest_in_phase: young, waiting: 1, ..Reading::default() };
        assert_eq!(judge().judge(&reading, now), Verdict::Fine);
    }

    #[test]
    fn a_server_that_reads_no_requests_is_replaced_unless_it_answers_some() {
        let now = Instant::now();
        let unread = |answers| Reading { waiting: 3, parked: 1, answers, ..Reading::default() };
        let mut judge = judge();
        assert_eq!(judge.judge(&unread(5), now), Verdict::Fine);
        assert_eq!(judge.judge(&unread(6), now + LIMIT), Verdict::Fine, "a request was answered meanwhile");
        let verdict = judge.judge(&unread(6), now + LIMIT * 2);
        assert_eq!(verdict, Verdict::Replace("2 requests unread for 10.0 s".into()));
        let parked = Reading { waiting: 1, parked: 1, ..Reading::default() };
        assert_eq!(
            judge.judge(&parked, now + LIMIT * 3),
            Verdict::Fine,
            "the only request waits for a backing"
        );
    }

    #[test]
    fn a_slow_store_is_reported_once_and_the_server_is_not_replaced() {
        let now = Instant::now();
        let slow = || Reading {
            oldest: request(Phase::WaitingForStore, LIMIT, Duration::ZERO),
            waiting: 1,
            ..Reading::default()
        };
        let mut judge = judge();
        assert!(matches!(judge.judge(&slow(), now), Verdict::SlowStore(_)));
        assert_eq!(judge.judge(&slow(), now), Verdict::Fine);
        assert_eq!(judge.judge(&Reading::default(), now), Verdict::Fine);
        assert!(matches!(judge.judge(&slow(), now), Verdict::SlowStore(_)), "a second time");
    }

    #[test]
    fn the_watchdog_reads_the_table_of_the_current_server() {
        use stencilfs::control::{Op, RequestInfo};
        use stencilfs::sys::memory::memfd::SharedCounters;

        let limit = Duration::from_millis(50);
        let stats = Stats::new(SharedCounters::create().unwrap());
        let mut watchdog = Watchdog::new(limit, u64::MAX);
        assert_eq!(watchdog.interval(), Duration::from_millis(20));
        assert_eq!(watchdog.check(&stats), None, "there is no server");
        let table = InFlightTable::create().unwrap();
        watchdog.watch(Some(table.fd().try_clone().unwrap()));
        table.enter(0, &RequestInfo { unique: 7, op: Op::Read, ino: 2, offset: 0, size: 4096, thread: 0 });
        table.stamp(0, Phase::Decoding);
        let start = Instant::now();
        let reason = loop {
            if let Some(reason) = watchdog.check(&stats) {
                break reason;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "a stuck request is not noticed");
        };
        assert!(start.elapsed() >= limit && reason.contains("READ"), "{reason}");
        watchdog.watch(None);
        assert_eq!(watchdog.check(&stats), None);
        assert!(watchdog.check_startup(start).is_some());
        assert_eq!(watchdog.check_startup(Instant::now() + limit), None);
        assert_eq!(Watchdog::new(Duration::ZERO, u64::MAX).interval(), MAX_INTERVAL);
    }

    #[test]
    fn a_slow_store_is_counted_and_keeps_its_server() {
        use stencilfs::control::{Op, RequestInfo};
        use stencilfs::sys::memory::memfd::SharedCounters;

        let stats = Stats::new(SharedCounters::create().unwrap());
        let mut watchdog = Watchdog::new(Duration::from_millis(200), u64::MAX);
        let table = InFlightTable::create().unwrap();
        watchdog.watch(Some(table.fd().try_clone().unwrap()));
        table.enter(0, &RequestInfo { unique: 7, op: Op::Read, ino: 2, offset: 0, size: 4096, thread: 0 });
        let start = Instant::now();
        while stats.get(Counter::SlowSource) == 0 {
            // Each attempt to reach the store is progress.
            table.stamp(0, Phase::WaitingForStore);
            assert_eq!(watchdog.check(&stats), None);
            assert!(start.elapsed() < Duration::from_secs(60), "a slow store is not noticed");
        }
        table.stamp(0, Phase::WaitingForStore);
        assert_eq!((watchdog.check(&stats), stats.get(Counter::SlowSource)), (None, 1), "it is logged once");
    }
}
