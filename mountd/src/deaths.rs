//! Records how servers end, and decides how long the next start is delayed.
//!
//! Reads of the mount block while no server is alive, so a successor starts at once, and always after a kill from
//! outside. Servers that end by themselves or run out of memory soon after their start are likely to do so again: after
//! [`FREE_DEATHS`] of them in a row, each further start is delayed longer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stencilfs::control::ServerEnd;
use stencilfs::sys::cgroup::OomKills;
use stencilfs::sys::process::{self, Ended};

use crate::supervisor::Server;

/// Number of consecutive early deaths without a delay.
pub const FREE_DEATHS: u32 = 3;
/// A server that served this long did not die early, whatever the cause.
const SETTLED: Duration = Duration::from_secs(10);
/// A server that served this long has worked: it has answered requests, or there were none but opens that wait for a
/// backing.
const LIVED: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The end of one server.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    pub pid: u32,
    /// How the server ended; `None` if it is not a child of this process, or has not exited yet.
    pub how: Option<Ended>,
    pub lived: Duration,
    /// True if the server had completed the handshake with the kernel.
    pub serving: bool,
    /// True if requests were answered during its lifetime.
    pub answered: bool,
    /// True if the OOM killer was active in its control group during its lifetime.
    pub oom: bool,
}

/// Longest wait for the exit of a process that has closed its descriptors; reads of the mount block meanwhile.
const EXIT_TIMEOUT: Duration = Duration::from_millis(2);

impl Death {
    /// Creates the record of a server's end; `answers` is the current number of answered requests. Does not wait for a
    /// server that was abandoned and is still alive.
    pub fn of(server: &Server, answers: u64) -> Death {
        Death {
            pid: server.row.process.pid,
            how: process::reap(&server.pidfd, EXIT_TIMEOUT),
            lived: server.since.elapsed(),
            serving: server.row.serving,
            answered: answers != server.answers,
            oom: server.oom_kills.as_ref().is_some_and(OomKills::have_risen),
        }
    }
}

/// Logs the exit of a child.
pub fn log_exit(pid: u32, end: Ended) {
    log::debug!("process {pid} exited: {end}");
    if let Ended::Signal(number @ (libc::SIGSYS | libc::SIGSEGV | libc::SIGABRT)) = end {
        log::error!("process {pid} was killed by {}: this is a bug in Stencil", process::signal_name(number));
    }
}

/// History of server deaths.
#[derive(Debug, Default)]
pub struct Deaths {
    /// Number of consecutive servers that died early.
    pub early: u32,
    /// The most recent death.
    pub last: Option<ServerEnd>,
    /// Time of the next start, while the start is delayed.
    next_start: Option<SystemTime>,
}

impl Deaths {
    /// Records a death. Returns the delay before the next start.
    pub fn note(&mut self, death: Death) -> Option<Duration> {
        let worked = death.answered || death.serving && death.lived > LIVED;
        let from_outside = !death.oom
            && death.how.is_none_or(|how| how == Ended::Signal(rustix::process::Signal::KILL.as_raw()));
        let settled = death.serving && death.lived > SETTLED;
        self.early = if settled || worked && from_outside { 0 } else { self.early + 1 };
        let how = death.how.map_or_else(|| "replaced".to_owned(), |how| how.to_string());
        self.last = Some(ServerEnd {
            pid: death.pid,
            at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            how,
            out_of_memory: death.oom,
            lived_seconds: death.lived.as_secs_f64(),
        });
        if let Some(how) = death.how {
            log_exit(death.pid, how);
        }
        log::warn!(
            "server {} died after {:.1} s: {}{}",
            death.pid,
            death.lived.as_secs_f64(),
            self.last.as_ref().map_or("", |last| &last.how),
            if death.oom { ", likely out of memory: its control group counts an OOM kill" } else { "" }
        );
        self.pause()
    }

    /// Records that a server could not be started. Returns the delay before the next attempt.
    pub fn note_failed_start(&mut self) -> Duration {
        self.early += 1;
        self.pause().unwrap_or(SHORTEST_PAUSE)
    }

    /// Records that a server was started.
    pub fn started(&mut self) {
        self.next_start = None;
    }

    /// Returns the time of the next start, in seconds since 1970, while the start is delayed.
    pub fn next_start(&self) -> Option<f64> {
        Some(self.next_start?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
    }

    fn pause(&mut self) -> Option<Duration> {
        let pause = self
            .early
            .checked_sub(FREE_DEATHS + 1)
            .map(|beyond| SHORTEST_PAUSE.saturating_mul(2 << beyond.min(10)).min(LONGEST_PAUSE));
        self.next_start = pause.map(|pause| SystemTime::now() + pause);
        if let Some(pause) = pause {
            log::error!(
                "{} servers in a row died soon after their start; next start in {pause:?}",
                self.early
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

    fn death(how: Ended, lived: Duration, answered: bool, oom: bool) -> Death {
        Death { pid: 1, how: Some(how), lived, serving: true, answered, oom }
    }

    #[test]
    fn kills_from_outside_cause_no_delay() {
        let mut deaths = Deaths::default();
        for _ in 0..1000 {
            assert_eq!(deaths.note(death(KILLED, SOON, true, false)), None);
        }
    }

    #[test]
    fn delays_grow_with_early_deaths_until_a_server_settles() {
        for (how, answered, oom) in [
            (KILLED, true, true),
            (KILLED, false, false),
            (Ended::Code(1), true, false),
            (Ended::Signal(11), true, false),
        ] {
            let mut deaths = Deaths::default();
            let pauses: Vec<_> = (0..14).map(|_| deaths.note(death(how, SOON, answered, oom))).collect();
            assert_eq!(pauses[..3], [None; 3], "{how}");
            let seconds: Vec<f64> = pauses[3..].iter().map(|p| p.unwrap().as_secs_f64()).collect();
            assert_eq!(seconds, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0, 10.0], "{how}");
            assert!(deaths.next_start.is_some());
            assert_eq!(deaths.note(death(how, SETTLED * 2, answered, oom)), None);
            assert_eq!(deaths.last.as_ref().map(|last| last.out_of_memory), Some(oom));
        }
    }
}
