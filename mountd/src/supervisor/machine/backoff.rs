//! How servers end, and how long their successors wait.
//!
//! Readers wait while no server runs, so a successor starts at once after each kill from outside. A server that ends by
//! itself, or for lack of memory, soon after its start would only do so again: after a few of these in a row each next
//! one waits longer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stencilfs::control::ServerEnd;
use stencilfs::sys::process::{self, Ended};

/// Early ends in a row after which the next server waits.
pub const FREE_ENDS: u32 = 3;
/// A server that has served for this long has not ended early, whatever ended it.
const SETTLED: Duration = Duration::from_secs(10);
/// A server that has served for this long has answered requests, or had only opens that wait for a backing.
const WORKED: Duration = Duration::from_secs(1);
const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The end of one server.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// The process.
    pub pid: u32,
    /// Exit status; unknown for a process that is no child or still runs.
    pub how: Option<Ended>,
    /// Time since its start.
    pub lived: Duration,
    /// True if the server had answered the kernel's handshake.
    pub serving: bool,
    /// True if requests were answered in its time.
    pub answered: bool,
    /// True if the OOM killer struck in its control group in its time.
    pub oom: bool,
}

/// Logs how a child process ended.
pub fn log_end(pid: u32, end: Ended) {
    log::debug!("process {pid} ended: {end}");
    if let Ended::Signal(number @ (libc::SIGSYS | libc::SIGSEGV | libc::SIGABRT)) = end {
        log::error!(
            "process {pid} was killed by {}: this is a bug in stencil-mountd",
            process::signal_name(number)
        );
    }
}

/// Ends of earlier servers.
#[derive(Debug, Default)]
pub struct Backoff {
    early_ends: u32,
    last: Option<ServerEnd>,
    next_start: Option<SystemTime>,
}

impl Backoff {
    /// Notes an end and returns the pause before the next start.
    pub fn note(&mut self, end: End, wall: SystemTime) -> Option<Duration> {
        let worked = end.answered || end.serving && end.lived > WORKED;
        let from_outside = !end.oom
            && end.how.is_none_or(|how| how == Ended::Signal(rustix::process::Signal::KILL.as_raw()));
        let settled = end.serving && end.lived > SETTLED;
        self.early_ends = if settled || worked && from_outside { 0 } else { self.early_ends + 1 };
        let how = end.how.map_or_else(|| "replaced".to_owned(), |how| how.to_string());
        if let Some(how) = end.how {
            log_end(end.pid, how);
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
        self.pause(wall)
    }

    /// Notes that a server could not be started, and returns the pause before the next try.
    pub fn note_failed_start(&mut self, wall: SystemTime) -> Duration {
        self.early_ends += 1;
        self.pause(wall).unwrap_or(MIN_PAUSE)
    }

    /// Notes that a server was started.
    pub fn note_started(&mut self) {
        self.next_start = None;
    }

    /// True if too many servers in a row ended early.
    pub fn is_persistent(&self) -> bool {
        self.early_ends >= FREE_ENDS
    }

    /// Servers in a row that ended early.
    pub fn early_ends(&self) -> u32 {
        self.early_ends
    }

    /// The last end.
    pub fn last(&self) -> Option<&ServerEnd> {
        self.last.as_ref()
    }

    /// When the next server starts, in seconds since 1970, if it waits.
    pub fn next_start(&self) -> Option<f64> {
        Some(self.next_start?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
    }

    fn pause(&mut self, wall: SystemTime) -> Option<Duration> {
        let pause = self
            .early_ends
            .checked_sub(FREE_ENDS + 1)
            .map(|beyond| MIN_PAUSE.saturating_mul(2 << beyond.min(10)).min(MAX_PAUSE));
        self.next_start = pause.map(|pause| wall + pause);
        if let Some(pause) = pause {
            log::error!(
                "{} servers in a row ended soon after their start: waiting {pause:?}",
                self.early_ends
            );
        }
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(30);
    const KILLED: Ended = Ended::Signal(9);

    fn end(how: Ended, lived: Duration, answered: bool, oom: bool) -> End {
        End { pid: 1, how: Some(how), lived, serving: true, answered, oom }
    }

    #[test]
    fn kills_from_outside_cause_no_pause() {
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            assert_eq!(backoff.note(end(KILLED, SOON, true, false), UNIX_EPOCH), None);
        }
    }

    #[test]
    fn early_ends_cause_growing_pauses_until_a_server_settles() {
        for (how, answered, oom) in [
            (KILLED, true, true),
            (KILLED, false, false),
            (Ended::Code(1), true, false),
            (Ended::Signal(11), true, false),
        ] {
            let mut backoff = Backoff::default();
            let mut note = |lived| backoff.note(end(how, lived, answered, oom), UNIX_EPOCH);
            let pauses: Vec<_> = (0..14).map(|_| note(SOON)).collect();
            assert_eq!(pauses[..3], [None; 3], "{how}");
            let seconds: Vec<f64> = pauses[3..].iter().map(|p| p.unwrap().as_secs_f64()).collect();
            assert_eq!(seconds, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0, 10.0], "{how}");
            assert_eq!(note(SETTLED * 2), None);
            assert_eq!(backoff.last().map(|last| last.out_of_memory), Some(oom));
            assert!(!backoff.is_persistent() && backoff.next_start().is_none());
        }
    }

    #[test]
    fn the_next_start_is_told_while_a_server_waits() {
        let mut backoff = Backoff::default();
        for _ in 0..FREE_ENDS {
            assert_eq!(backoff.note_failed_start(UNIX_EPOCH), MIN_PAUSE);
        }
        assert_eq!(backoff.note_failed_start(UNIX_EPOCH), MIN_PAUSE * 2);
        assert_eq!((backoff.next_start(), backoff.early_ends()), (Some(0.2), 4));
        backoff.note_started();
        assert_eq!(backoff.next_start(), None);
    }
}
