//! The supervisor: holds what must outlive a server, and starts a new server when one dies.
//!
//! One thread with one event loop that never blocks elsewhere: control socket, link to the server, exits of processes,
//! signals and timers. Work that may take long runs in child processes (`jobs`).

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
use crate::begin::StartedMount;
use crate::control::Callers;
use crate::deaths::{self, Death, Deaths, FREE_DEATHS};
use crate::jobs::Job;
use crate::kept::{MountState, Program};
use crate::notify::Notify;
use crate::requests::{Condemned, Pending};
use crate::signals::Signals;
use crate::stats::Counter;
use crate::watchdog::Watchdog;
pub use servers::Server;

/// Interval between attempts to write a record.
const RECORD_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Longest time until a server of a new program must serve the kernel.
pub const PROBATION: Duration = Duration::from_secs(5);

/// Source of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
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

/// Purpose of a job.
#[derive(Debug)]
pub enum Purpose {
    /// Work for a request of the server with this PID.
    ServerRequest(u32, Pending),
    /// An unmount, requested by a caller or (`None`) by a signal.
    Unmount(Option<u64>, UnmountMode),
    /// Closes files of abandoned backings, which may take the file system long.
    Close,
    /// Checks whether a program can replace this one; with the caller that requested the restart.
    Check(Program, u64),
}

/// A server that is about to replace the current one.
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
    pub(crate) state: MountState,
    pub(crate) backings: Backings,
    pub(crate) server: Option<Server>,
    pub(crate) candidate: Option<Candidate>,
    /// Servers that were killed and have not exited yet. Each entry is a process in the kernel, which bounds their
    /// number.
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
    /// Creates the supervisor of a mount, with its current server, if any, and the server's table of pending requests.
    pub fn new(taken: StartedMount, callers: Callers, signals: Signals, notify: Notify) -> Supervisor {
        let StartedMount { state, backings, server, leaving, condemned, drains: _ } = taken;
        let mut watchdog = Watchdog::new(state.options.watchdog, state.device);
        let server = server.map(|(server, table)| {
            watchdog.watch(table);
            server
        });
        let resend_needed = !leaving.is_empty();
        let open = |server: ProcessId| server.open().ok().flatten().map(|pidfd| (server, pidfd));
        let supervisor = Supervisor {
            state,
            backings,
            server,
            candidate: None,
            leaving: leaving.into_iter().filter_map(open).collect(),
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
        if resend_needed {
            // For the servers that have exited meanwhile; for the others the requests are sent again when they exit.
            supervisor.resend();
        }
        supervisor
    }

    /// Serves until the connection is closed.
    ///
    /// # Errors
    /// Returns an error if no server ever served the mount, with the callers that must be told.
    pub fn run(mut self) -> std::result::Result<(), (Error, Callers)> {
        if let Err(e) =
            rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::FUTURE)
        {
            log::warn!("cannot lock the supervisor's memory: {e}");
        }
        match &self.server {
            Some(server) if server.row.serving => self.announce(),
            Some(_) => self.record(),
            None => {}
        }
        if self.state.stats.get(Counter::Answers) > 0 {
            // The mount is in use: it must be kept even if the next servers fail.
            self.callers.served();
        }
        while !fuse_dev::is_over(&self.state.fuse) {
            if let Err(error) = self.ensure_server() {
                return Err((error, self.callers));
            }
            self.run_once();
            if self.jobs.is_empty()
                && self.candidate.is_none()
                && let Some((program, caller)) = self.successor_program.take()
            {
                self.exec_program(program, caller);
            }
        }
        log::info!("the mount has ended");
        self.notify.stopping();
        let until = Instant::now() + Duration::from_secs(2);
        while !(self.jobs.is_empty() && self.server.is_none()) && Instant::now() < until {
            self.run_once();
            // The closed connection makes poll(2) return at once.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.server.iter().chain(self.candidate.as_ref().map(|c| &c.server)).for_each(Server::kill);
        self.callers.end();
        Ok(())
    }

    /// Waits for events and handles them.
    fn run_once(&mut self) {
        let events = self.wait();
        for event in events {
            match event {
                Event::Signals => self.signalled(),
                Event::Listener => self.callers.accept(&self.state.listener),
                Event::Caller(id) => self.called(id),
                Event::Server => self.receive(false),
                Event::Candidate => self.receive(true),
                Event::ServerEnd => self.server_died(),
                Event::Leaving(server) => {
                    log::info!("server {} exited", server.pid);
                    self.leaving.retain(|(other, _)| *other != server);
                    // The kernel sends the requests again that the server has read since its successor was started.
                    self.resend();
                }
                Event::Connection | Event::Job(_) => {}
            }
        }
        self.update_jobs();
        if let Some(candidate) = &self.candidate
            && candidate.server.since.elapsed() > PROBATION
        {
            self.candidate_failed("timed out after 5 s waiting for the new server");
        }
        let why = match &self.server {
            Some(server) if server.row.serving => self.watchdog.check(&self.state.stats),
            Some(server) => self.watchdog.check_startup(server.since),
            None => None,
        };
        if let Some(why) = why {
            log::error!("watchdog: {why}: replacing the server");
            self.state.stats.count(Counter::WatchdogReplaced);
            self.revert_program();
            self.server_died();
        }
        let answers = self.state.stats.get(Counter::Answers);
        if self.server.as_ref().is_some_and(|s| s.row.serving && s.answers != answers) {
            self.state.previous = None;
        }
        if self.record_at.is_some_and(|at| Instant::now() >= at) {
            self.record();
        }
        self.update_condemned();
        self.close_elsewhere();
        self.notify.ping();
        while let Ok(Some((pid, end))) = process::reap_one() {
            deaths::log_exit(pid, end);
        }
    }

    fn wait(&self) -> Vec<Event> {
        let mut all: Vec<(Event, BorrowedFd<'_>)> =
            vec![(Event::Signals, self.signals.as_fd()), (Event::Connection, self.state.fuse.as_fd())];
        if self.callers.has_room() {
            all.push((Event::Listener, self.state.listener.as_fd()));
        }
        all.extend(self.callers.channels().map(|(id, channel)| (Event::Caller(id), channel)));
        if let Some(server) = &self.server {
            all.extend([(Event::Server, server.link.as_fd()), (Event::ServerEnd, server.pidfd.as_fd())]);
        }
        all.extend(self.candidate.iter().map(|c| (Event::Candidate, c.server.link.as_fd())));
        all.extend(self.leaving.iter().map(|(server, pidfd)| (Event::Leaving(*server), pidfd.as_fd())));
        all.extend(self.jobs.iter().enumerate().map(|(at, (job, _))| (Event::Job(at), job.channel.as_fd())));
        // Of the connection only POLLERR is of interest, which is always reported.
        let flags = |event| if event == Event::Connection { PollFlags::empty() } else { PollFlags::IN };
        let mut polled: Vec<PollFd<'_>> =
            all.iter().map(|(event, fd)| PollFd::from_borrowed_fd(*fd, flags(*event))).collect();
        let next = self.start_at.into_iter().chain(self.record_at).min();
        let pause = next.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
        let pause = pause.min(self.watchdog.interval());
        if poll_for(&mut polled, Some(pause)).is_err() {
            return Vec::new();
        }
        let ready = all.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty());
        ready.map(|((event, _), _)| *event).collect()
    }

    /// Starts a server if there is none, unless the start is delayed.
    fn ensure_server(&mut self) -> Result<()> {
        if self.server.is_some() || self.start_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        if self.callers.nobody_served_yet() && (self.failure.is_some() || self.deaths.early >= FREE_DEATHS) {
            return Err(self.failure.take().map_or_else(
                || {
                    Error::failed("the server died before it served the mount")
                        .remedy("run the mount with -f and STENCIL_LOG=debug to see the reason")
                },
                Failure::into_error,
            ));
        }
        self.save();
        match Server::start(&self.state, &self.backings, &self.state.program, false) {
            Ok(server) => {
                self.server = Some(server);
                self.start_at = None;
                self.deaths.started();
                // The record names the server, so that another supervisor can find it.
                self.record();
            }
            Err(error) => {
                log::error!("{error}");
                self.start_at = Some(Instant::now() + self.deaths.note_failed_start());
            }
        }
        Ok(())
    }

    /// Handles the death of the server, or kills it. The next server is started without waiting for its exit.
    pub(crate) fn server_died(&mut self) {
        let Some(server) = self.server.take() else { return };
        let pause = self.deaths.note(Death::of(&server, self.state.stats.get(Counter::Answers)));
        self.state.restarts += 1;
        self.dismiss(server);
        self.to_close.extend(self.backings.forget_unfinished());
        self.watchdog.watch(None);
        if self.deaths.early >= FREE_DEATHS {
            self.revert_program();
        }
        self.start_at = pause.map(|pause| Instant::now() + pause);
    }

    /// Returns to the previous program, if any: a new program that has not answered any request is of no use.
    fn revert_program(&mut self) {
        if let Some(previous) = self.state.previous.take() {
            let (new, old) = (self.state.program.name.display(), previous.name.display());
            log::error!("servers of {new} do not serve: switching back to {old}");
            self.state.program = previous;
        }
    }

    /// Kills a server; its exit is noticed later.
    pub(crate) fn dismiss(&mut self, server: Server) {
        server.kill();
        self.leaving.push((server.row.process, server.pidfd));
    }

    pub(crate) fn resend(&self) {
        if self.state.reply.is_some()
            && let Err(e) = fuse_dev::resend(&self.state.fuse)
        {
            log::error!("cannot make the kernel send requests again: {e}");
        }
    }

    /// Returns the state without descriptors, with this server.
    pub(crate) fn snapshot(&self, server: Option<ServerRow>) -> Result<Snapshot> {
        let leaving = self.leaving.iter().map(|(its, _)| *its).collect();
        let snapshot = self.state.snapshot(server, leaving, self.backings.rows())?;
        Ok(Snapshot {
            condemned: self.condemned.rows(),
            last_end: self.deaths.last.clone(),
            early_ends: self.deaths.early,
            next_start: self.deaths.next_start(),
            ..snapshot
        })
    }

    /// Writes the ledger.
    pub(crate) fn save(&mut self) {
        let server = self.server.as_ref().map(|s| s.row.clone());
        let text = self.snapshot(server).and_then(|snapshot| {
            serde_json::to_vec(&snapshot).map_err(|e| Error::failed(format!("cannot write the ledger: {e}")))
        });
        let written = text.and_then(|text| {
            self.state.ledger.write(&text).map_err(|e| Error::failed("cannot write the ledger").because(e))
        });
        if let Err(error) = written {
            log::error!("{error}");
        }
    }

    /// Writes ledger and record. Other programs take a mount for dead if all processes in its record are dead, so a
    /// failed write is retried until it succeeds.
    fn record(&mut self) {
        self.save();
        let server = self.server.as_ref().map(|s| s.row.process);
        let written = self.state.write_record(server);
        match (&written, self.record_at) {
            (Err(error), None) => log::error!("{error}; retrying"),
            (Ok(()), Some(_)) => log::info!("wrote the mount's record"),
            _ => {}
        }
        self.record_at = written.err().map(|_| Instant::now() + RECORD_RETRY_INTERVAL);
    }

    /// Announces the current server: in the record, to the service manager, and to the starter of the mount.
    pub(crate) fn announce(&mut self) {
        self.record();
        self.notify.ready(&self.state);
        self.callers.served();
    }
}
