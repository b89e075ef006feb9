//! How servers end, and how long their successors wait.
//!
//! Readers stand still while no server lives, so a successor starts at once: after a kill from outside always. Servers that
//! end by themselves, or for lack of memory, soon after they began would only do so again: after a few of them each next
//! one waits longer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stencilfs::control::ServerEnd;
use stencilfs::sys::cgroup::OomKills;
use stencilfs::sys::process::{self, Ended};

use crate::supervisor::Server;

/// So many servers in a row may end early; then each next one waits longer.
pub const FREE_DEATHS: u32 = 3;
/// A server that served for so long has not ended early, whatever ended it.
const SETTLED: Duration = Duration::from_secs(10);
/// One that served for so long has answered, or had nothing to answer but opens that wait for a backing.
const LIVED: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The end of one server.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    pub pid: u32,
    /// How it ended; unknown for one that is no child, or has not ended yet.
    pub how: Option<Ended>,
    pub lived: Duration,
    /// It had answered the kernel's handshake.
    pub serving: bool,
    /// Requests were answered in its time.
    pub answered: bool,
    /// The OOM killer has struck in its control group in its time.
    pub oom: bool,
}

/// A process whose descriptors are closed has ended within this time; longer than that no reader is to wait.
const LAST_STEPS: Duration = Duration::from_millis(2);

impl Death {
    /// That of a server, with `answers` requests answered until now. One that was given up and lives yet is not waited for.
    pub fn of(server: &Server, answers: u64) -> Death {
        Death {
            pid: server.row.process.pid,
            how: process::reap(&server.pidfd, LAST_STEPS),
            lived: server.since.elapsed(),
            serving: server.row.serving,
            answered: answers != server.answers,
            oom: server.oom_kills.as_ref().is_some_and(OomKills::have_risen),
        }
    }
}

/// Logs how a child has ended.
pub fn tell(pid: u32, end: Ended) {
    log::debug!("process {pid} has ended: {end}");
    if let Ended::Signal(number @ (libc::SIGSYS | libc::SIGSEGV | libc::SIGABRT)) = end {
        log::error!("process {pid} has ended by {}: a fault of ours", process::signal_name(number));
    }
}

/// What is known of the servers before.
#[derive(Debug, Default)]
pub struct Deaths {
    /// Servers in a row that have ended early.
    pub early: u32,
    /// The last end.
    pub last: Option<ServerEnd>,
    /// The next server starts then.
    next_start: Option<SystemTime>,
}

impl Deaths {
    /// Notes an end; the pause before the next start.
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
            tell(death.pid, how);
        }
        log::warn!(
            "server {} has died after {:.1} s: {}{}",
            death.pid,
            death.lived.as_secs_f64(),
            self.last.as_ref().map_or("", |last| &last.how),
            if death.oom { ", likely out of memory: its control group counts an OOM kill" } else { "" }
        );
        self.pause()
    }

    /// A server could not be started at all.
    pub fn note_failed_start(&mut self) -> Duration {
        self.early += 1;
        self.pause().unwrap_or(SHORTEST_PAUSE)
    }

    /// A server was started.
    pub fn started(&mut self) {
        self.next_start = None;
    }

    /// When the next one is, in seconds since 1970, where it waits.
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
            log::error!("{} servers in a row died soon after their start: waiting {pause:?}", self.early);
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
    fn kills_from_outside_are_never_paused_for() {
        let mut deaths = Deaths::default();
        for _ in 0..1000 {
            assert_eq!(deaths.note(death(KILLED, SOON, true, false)), None);
        }
    }

    #[test]
    fn servers_that_end_soon_wait_longer_and_longer_until_one_has_settled() {
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
