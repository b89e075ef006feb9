//! Delays between the end of a server and the start of its successor.
//!
//! Readers of the mount wait while no server runs, so a successor starts immediately if another process killed a server
//! that worked. If a server ends for another reason soon after its start, its successor probably ends for the same
//! reason. After a few such early ends in a row, each further start is delayed longer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stencilfs::control::ServerEnd;
use stencilfs::sys::process::{self, Ended};

/// Number of early ends in a row without a delay of the next start.
pub const EARLY_ENDS_WITHOUT_DELAY: u32 = 3;
/// The end of a server that has served for longer than this is not early, whatever the reason.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// A server that has served for longer than this works: if it has answered no request, then all its requests were opens
/// that wait for a backing.
const WORKING_AFTER: Duration = Duration::from_secs(1);
const MIN_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(10);

/// The end of one server.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// The process.
    pub pid: u32,
    /// Exit status; `None` for a process that is not a child or still runs.
    pub status: Option<Ended>,
    /// Time since the start of the process.
    pub lived: Duration,
    /// True if the server was serving, that is, after its handshake.
    pub serving: bool,
    /// True if requests of the kernel were answered while the server was current.
    pub answered: bool,
    /// True if the OOM killer killed a process in the control group of the server since its start.
    pub oom: bool,
}

/// Logs the exit status of a child process.
pub fn log_end(pid: u32, status: Ended) {
    log::debug!("process {pid} ended: {status}");
    if let Ended::Signal(number @ (libc::SIGSYS | libc::SIGSEGV | libc::SIGABRT)) = status {
        log::error!(
            "process {pid} was killed by {}: this is a bug in stencil-mountd",
            process::signal_name(number)
        );
    }
}

/// The ends of earlier servers, and the time of the next start.
#[derive(Debug, Default)]
pub struct Backoff {
    early_ends: u32,
    last: Option<ServerEnd>,
    next_start: Option<SystemTime>,
}

impl Backoff {
    /// Records the end of a server. Returns the delay before the next start, if any.
    pub fn note(&mut self, end: End, wall: SystemTime) -> Option<Duration> {
        let worked = end.answered || end.serving && end.lived > WORKING_AFTER;
        let from_outside = !end.oom
            && end
                .status
                .is_none_or(|status| status == Ended::Signal(rustix::process::Signal::KILL.as_raw()));
        let settled = end.serving && end.lived > SETTLED_AFTER;
        self.early_ends = if settled || worked && from_outside { 0 } else { self.early_ends + 1 };
        let how = end.status.map_or_else(|| "replaced".to_owned(), |status| status.to_string());
        if let Some(status) = end.status {
            log_end(end.pid, status);
        }
        let memory =
            if end.oom { ", likely out of memory: its control group counts an OOM kill" } else { "" };
        log::warn!("server {} ended after {:.1} s: {how}{memory}", end.pid, end.lived.as_secs_f64());
        self.last = Some(ServerEnd {
            pid: end.pid,
            at: wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            how,
            out_of_memory: end.oom,
            lived_seconds: end.lived.as_secs_f64(),
        });
        self.delay(wall)
    }

    /// Records that a server could not be started. Returns the delay before the next attempt.
    pub fn note_failed_start(&mut self, wall: SystemTime) -> Duration {
        self.early_ends += 1;
        self.delay(wall).unwrap_or(MIN_DELAY)
    }

    /// Records that a server was started.
    pub fn note_started(&mut self) {
        self.next_start = None;
    }

    /// Returns true if so many servers in a row have ended early that the next end causes a delay.
    pub fn is_persistent(&self) -> bool {
        self.early_ends >= EARLY_ENDS_WITHOUT_DELAY
    }

    /// Returns the number of early ends and failed starts in a row.
    pub fn early_ends(&self) -> u32 {
        self.early_ends
    }

    /// Returns the end of the last server.
    pub fn last(&self) -> Option<&ServerEnd> {
        self.last.as_ref()
    }

    /// Returns the time of the next start in seconds since 1970, if the start is delayed.
    pub fn next_start(&self) -> Option<f64> {
        Some(self.next_start?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
    }

    fn delay(&mut self, wall: SystemTime) -> Option<Duration> {
        let delay = self
            .early_ends
            .checked_sub(EARLY_ENDS_WITHOUT_DELAY + 1)
            .map(|beyond| MIN_DELAY.saturating_mul(2 << beyond.min(10)).min(MAX_DELAY));
        self.next_start = delay.map(|delay| wall + delay);
        if let Some(delay) = delay {
            log::error!(
                "{} servers in a row could not be started or ended soon after their start; starting the next one in {delay:?}",
                self.early_ends
            );
        }
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(30);
    const KILLED: Ended = Ended::Signal(9);

    fn end(status: Ended, lived: Duration, answered: bool, oom: bool) -> End {
        End { pid: 1, status: Some(status), lived, serving: true, answered, oom }
    }

    #[test]
    fn kills_from_outside_cause_no_delay() {
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            assert_eq!(backoff.note(end(KILLED, SOON, true, false), UNIX_EPOCH), None);
        }
    }

    #[test]
    fn early_ends_cause_growing_delays_until_a_server_settles() {
        for (status, answered, oom) in [
            (KILLED, true, true),
            (KILLED, false, false),
            (Ended::Code(1), true, false),
            (Ended::Signal(11), true, false),
        ] {
            let mut backoff = Backoff::default();
            let mut note = |lived| backoff.note(end(status, lived, answered, oom), UNIX_EPOCH);
            let delays: Vec<_> = (0..14).map(|_| note(SOON)).collect();
            assert_eq!(delays[..3], [None; 3], "{status}");
            let seconds: Vec<f64> = delays[3..].iter().map(|p| p.unwrap().as_secs_f64()).collect();
            assert_eq!(seconds, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0, 10.0], "{status}");
            assert_eq!(note(SETTLED_AFTER * 2), None);
            assert_eq!(backoff.last().map(|last| last.out_of_memory), Some(oom));
            assert!(!backoff.is_persistent() && backoff.next_start().is_none());
        }
    }

    #[test]
    fn the_time_of_a_delayed_start_is_reported() {
        let mut backoff = Backoff::default();
        for _ in 0..EARLY_ENDS_WITHOUT_DELAY {
            assert_eq!(backoff.note_failed_start(UNIX_EPOCH), MIN_DELAY);
        }
        assert_eq!(backoff.note_failed_start(UNIX_EPOCH), MIN_DELAY * 2);
        assert_eq!((backoff.next_start(), backoff.early_ends()), (Some(0.2), 4));
        backoff.note_started();
        assert_eq!(backoff.next_start(), None);
    }
}
