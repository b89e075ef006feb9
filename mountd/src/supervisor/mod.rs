//! The supervisor: keeps what must outlive a server, and starts the next server when one dies.
//!
//! One thread, one loop, nothing that waits: the control socket, the way to the server, the ends of processes, signals
//! and the clock. What may take long is done in a process of its own (`jobs`).

mod servers;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use stencilfs::control::{Failure, ServerRow, Snapshot, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::sys::process::{self, ProcessId};
use stencilfs::sys::wait::poll_for;

use crate::backings::Backings;
use crate::begin::Taken;
use crate::control::Callers;
use crate::deaths::{self, Death, Deaths, FREE_DEATHS};
use crate::jobs::Job;
use crate::kept::{Kept, Program};
use crate::notify::Notify;
use crate::requests::{Condemned, Pending};
use crate::signals::Signals;
use crate::stats::Counter;
use crate::watchdog::Watchdog;
pub use servers::Server;

/// A record that could not be written is written again after this time.
const RECORD_PAUSE: Duration = Duration::from_secs(1);
/// A new program must answer the kernel within this time.
pub const PROBATION: Duration = Duration::from_secs(5);

/// Who takes part in the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Signals,
    Connection,
    Listener,
    Caller(u64),
    Server,
    Candidate,
    ServerEnd,
    Leaving(ProcessId),
    Job(usize),
}

/// What a job is for.
#[derive(Debug)]
pub enum Purpose {
    /// A question of the server of that number.
    Ask(u32, Pending),
    /// A caller's unmount, or a signal's.
    Unmount(Option<u64>, UnmountMode),
    /// Closing files of backings that were given up: the filesystem may take its time.
    Close,
    /// Whether a program can take the place of this one; which, and who asked.
    Check(Program, u64),
}

/// A server that is to take the place of the present one.
#[derive(Debug)]
pub struct Candidate {
    pub server: Server,
    pub program: Program,
    pub caller: Option<u64>,
    pub table: Option<OwnedFd>,
    pub failure: Option<Failure>,
}

/// The supervisor of one mount.
#[derive(Debug)]
pub struct Supervisor {
    pub(crate) kept: Kept,
    pub(crate) backings: Backings,
    pub(crate) server: Option<Server>,
    pub(crate) candidate: Option<Candidate>,
    /// Servers that were killed and are not gone yet. Each is a process that the kernel holds: there are
    /// never more entries than those.
    pub(crate) leaving: Vec<(ProcessId, OwnedFd)>,
    pub(crate) jobs: Vec<(Job, Purpose)>,
    pub(crate) callers: Callers,
    pub(crate) signals: Signals,
    pub(crate) condemned: Condemned,
    pub(crate) watchdog: Watchdog,
    pub(crate) notify: Notify,
    pub(crate) to_close: Vec<OwnedFd>,
    pub(crate) deaths: Deaths,
    pub(crate) start_at: Option<Instant>,
    record_at: Option<Instant>,
    pub(crate) failure: Option<Failure>,
    pub(crate) successor_program: Option<(Program, u64)>,
}

impl Supervisor {
    /// Takes up a mount, with its present server if there is one, and that one's table of requests.
    pub fn new(taken: Taken, callers: Callers, signals: Signals, notify: Notify) -> Supervisor {
        let Taken { kept, backings, server, leaving, condemned, drains: _ } = taken;
        let mut watchdog = Watchdog::new(kept.options.watchdog, kept.device);
        let server = server.map(|(server, table)| {
            watchdog.watch(table);
            server
        });
        let owed = !leaving.is_empty();
        let living = |its: ProcessId| its.open().ok().flatten().map(|pidfd| (its, pidfd));
        let supervisor = Supervisor {
            kept,
            backings,
            server,
            candidate: None,
            leaving: leaving.into_iter().filter_map(living).collect(),
            jobs: Vec::new(),
            callers,
            signals,
            condemned: Condemned::restore(condemned),
            watchdog,
            notify,
            to_close: Vec::new(),
            deaths: Deaths::default(),
            start_at: None,
            record_at: None,
            failure: None,
            successor_program: None,
        };
        if owed {
            // Of those that have gone meanwhile; that of the others is sent again when they have.
            supervisor.resend();
        }
        supervisor
    }

    /// Serves until the mount is over.
    ///
    /// # Errors
    /// That no server ever answered, and why; with those who are to be told.
    pub fn run(mut self) -> std::result::Result<(), (Error, Callers)> {
        if let Err(e) =
            rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::FUTURE)
        {
            log::warn!("the supervisor's memory is not locked: {e}");
        }
        match &self.server {
            Some(server) if server.row.serving => self.announce(),
            Some(_) => self.record(),
            None => {}
        }
        if self.kept.stats.get(Counter::Answers) > 0 {
            // Somebody relies on the mount: it is not given up, whatever becomes of the next server.
            self.callers.served();
        }
        while !fuse_dev::is_over(&self.kept.fuse) {
            if let Err(error) = self.keep_a_server() {
                return Err((error, self.callers));
            }
            self.turn();
            if self.jobs.is_empty()
                && self.candidate.is_none()
                && let Some((program, caller)) = self.successor_program.take()
            {
                self.become_program(program, caller);
            }
        }
        log::info!("the mount is over");
        self.notify.stopping();
        let until = Instant::now() + Duration::from_secs(2);
        while !(self.jobs.is_empty() && self.server.is_none()) && Instant::now() < until {
            self.turn();
            // The connection is ready all the time now.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.server.iter().chain(self.candidate.as_ref().map(|c| &c.server)).for_each(Server::kill);
        self.callers.end();
        Ok(())
    }

    /// One look at everything; waits until there is something to see.
    fn turn(&mut self) {
        let ready = self.wait();
        for who in ready {
            match who {
                Who::Signals => self.signalled(),
                Who::Listener => self.callers.accept(&self.kept.listener),
                Who::Caller(id) => self.called(id),
                Who::Server => self.hear(false),
                Who::Candidate => self.hear(true),
                Who::ServerEnd => self.server_died(),
                Who::Leaving(its) => {
                    log::info!("server {} has ended", its.pid);
                    self.leaving.retain(|(other, _)| *other != its);
                    // What it had read since its successor began comes again.
                    self.resend();
                }
                Who::Connection | Who::Job(_) => {}
            }
        }
        self.see_to_jobs();
        if let Some(candidate) = &self.candidate
            && candidate.server.since.elapsed() > PROBATION
        {
            self.candidate_failed("it did not answer within 5 s");
        }
        let why = match &self.server {
            Some(server) if server.row.serving => self.watchdog.look(&self.kept.stats),
            Some(server) => self.watchdog.look_at_start(server.since),
            None => None,
        };
        if let Some(why) = why {
            log::error!("watchdog: {why}: the server is replaced");
            self.kept.stats.count(Counter::WatchdogReplaced);
            self.go_back();
            self.server_died();
        }
        let answers = self.kept.stats.get(Counter::Answers);
        if self.server.as_ref().is_some_and(|s| s.row.serving && s.answers != answers) {
            self.kept.previous = None;
        }
        if self.record_at.is_some_and(|at| Instant::now() >= at) {
            self.record();
        }
        self.see_to_condemned();
        self.close_elsewhere();
        self.notify.ping();
        while let Ok(Some((pid, end))) = process::reap_one() {
            deaths::tell(pid, end);
        }
    }

    fn wait(&self) -> Vec<Who> {
        let mut all: Vec<(Who, BorrowedFd<'_>)> =
            vec![(Who::Signals, self.signals.as_fd()), (Who::Connection, self.kept.fuse.as_fd())];
        if self.callers.has_room() {
            all.push((Who::Listener, self.kept.listener.as_fd()));
        }
        all.extend(self.callers.channels().map(|(id, channel)| (Who::Caller(id), channel)));
        if let Some(server) = &self.server {
            all.extend([(Who::Server, server.link.as_fd()), (Who::ServerEnd, server.pidfd.as_fd())]);
        }
        all.extend(self.candidate.iter().map(|c| (Who::Candidate, c.server.link.as_fd())));
        all.extend(self.leaving.iter().map(|(its, pidfd)| (Who::Leaving(*its), pidfd.as_fd())));
        all.extend(self.jobs.iter().enumerate().map(|(at, (job, _))| (Who::Job(at), job.channel.as_fd())));
        let events = |who| if who == Who::Connection { PollFlags::empty() } else { PollFlags::IN };
        let mut polled: Vec<PollFd<'_>> =
            all.iter().map(|(who, fd)| PollFd::from_borrowed_fd(*fd, events(*who))).collect();
        let next = self.start_at.into_iter().chain(self.record_at).min();
        let pause = next.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
        let pause = pause.min(self.watchdog.interval());
        if poll_for(&mut polled, Some(pause)).is_err() {
            return Vec::new();
        }
        all.iter().zip(&polled).filter(|(_, p)| !p.revents().is_empty()).map(|((who, _), _)| *who).collect()
    }

    /// Starts a server where none is, unless it is to wait.
    fn keep_a_server(&mut self) -> Result<()> {
        if self.server.is_some() || self.start_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        if self.callers.nobody_served_yet() && (self.failure.is_some() || self.deaths.early >= FREE_DEATHS) {
            return Err(self.failure.take().map_or_else(
                || {
                    Error::failed("the server dies before it answers")
                        .remedy("start it with -f and STENCIL_LOG=debug to see why")
                },
                Failure::into_error,
            ));
        }
        self.save();
        match Server::start(&self.kept, &self.backings, &self.kept.program, false) {
            Ok(server) => {
                self.server = Some(server);
                self.start_at = None;
                self.deaths.started();
                // From here on another supervisor could find it.
                self.record();
            }
            Err(error) => {
                log::error!("{error}");
                self.start_at = Some(Instant::now() + self.deaths.note_failed_start());
            }
        }
        Ok(())
    }

    /// The server is gone, or is to go: the next one is started without waiting for its end.
    pub(crate) fn server_died(&mut self) {
        let Some(server) = self.server.take() else { return };
        let pause = self.deaths.note(Death::of(&server, self.kept.stats.get(Counter::Answers)));
        self.kept.restarts += 1;
        self.dismiss(server);
        self.to_close.extend(self.backings.forget_unfinished());
        self.watchdog.watch(None);
        if self.deaths.early >= FREE_DEATHS {
            self.go_back();
        }
        self.start_at = pause.map(|pause| Instant::now() + pause);
    }

    /// A new program that has not answered anything yet is of no use: back to the one before, if there is one.
    fn go_back(&mut self) {
        if let Some(previous) = self.kept.previous.take() {
            let (new, old) = (self.kept.program.name.display(), previous.name.display());
            log::error!("servers of {new} do not answer: going back to {old}");
            self.kept.program = previous;
        }
    }

    /// Ends a server; its end is noticed later.
    pub(crate) fn dismiss(&mut self, server: Server) {
        server.kill();
        self.leaving.push((server.row.process, server.pidfd));
    }

    pub(crate) fn resend(&self) {
        if self.kept.reply.is_some()
            && let Err(e) = fuse_dev::resend(&self.kept.fuse)
        {
            log::error!("cannot have requests sent again: {e}");
        }
    }

    /// Everything that is no descriptor, with that server.
    pub(crate) fn snapshot(&self, server: Option<ServerRow>) -> Result<Snapshot> {
        let leaving = self.leaving.iter().map(|(its, _)| *its).collect();
        let snapshot = self.kept.snapshot(server, leaving, self.backings.rows())?;
        Ok(Snapshot {
            condemned: self.condemned.rows(),
            last_end: self.deaths.last.clone(),
            early_ends: self.deaths.early,
            next_start: self.deaths.next_start(),
            ..snapshot
        })
    }

    /// Writes down what a successor must know.
    pub(crate) fn save(&mut self) {
        let server = self.server.as_ref().map(|s| s.row.clone());
        let text = self.snapshot(server).and_then(|snapshot| {
            serde_json::to_vec(&snapshot).map_err(|e| Error::failed(format!("cannot write the ledger: {e}")))
        });
        let written = text.and_then(|text| {
            self.kept.ledger.write(&text).map_err(|e| Error::failed("cannot write the ledger").because(e))
        });
        if let Err(error) = written {
            log::error!("{error}");
        }
    }

    /// Writes down who is to serve, for successors and other programs: whoever finds only dead ones in the record takes
    /// the mount for dead. So it is tried until it is done.
    fn record(&mut self) {
        self.save();
        let server = self.server.as_ref().map(|s| s.row.process);
        let written = self.kept.write_record(server);
        match (&written, self.record_at) {
            (Err(error), None) => log::error!("{error}; this is tried again"),
            (Ok(()), Some(_)) => log::info!("the mount's record is written"),
            _ => {}
        }
        self.record_at = written.err().map(|_| Instant::now() + RECORD_PAUSE);
    }

    /// Lets everybody know who serves: also the service manager, and who started the mount.
    pub(crate) fn announce(&mut self) {
        self.record();
        self.notify.ready(&self.kept);
        self.callers.served();
    }
}
