//! The supervisor's decisions: a state machine that takes an event and returns actions. It has no clock and makes no
//! system call that blocks, so that tests need no mount.
//!
//! The machine consists of the lifecycle of servers ([`Lifecycle`]), handovers ([`Handover`]), removals ([`Removal`]),
//! backings ([`Backings`]) and the shutdown of the mount ([`Shutdown`]). In any order of events these invariants hold:
//!
//! 1. No server gets the id of a backing that was not frozen and then verified.
//! 2. No backing that a process uses is closed. A backing is closed after a job has found it unused, once the server
//!    answers no more opens with it; or after its template was removed and the server has dropped the backing.
//! 3. The caller of a removal gets the response that its templates are condemned only when no server can open them any
//!    more.
//! 4. Each request of a server gets at most one reply, and each request of a caller at most one response.
//! 5. The supervisor requests one resend for each server that exits, after the exit, and one more for each dismissed
//!    candidate, when the candidate is killed. The resend that a successor requests at its start is not counted.

mod backings;
mod backoff;
mod control_requests;
mod handover;
mod initial_state;
mod job_results;
mod lifecycle;
mod removal;
mod server_requests;
mod shutdown;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencilfs::control::{CONTROL_VERSION, FileKey, ServerRow, Snapshot, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::{Ended, ProcessId};

pub use self::backings::Backings;
pub use self::backoff::log_end;
use self::handover::Handover;
pub use self::handover::TRIAL_TIMEOUT;
pub use self::initial_state::{InitialState, MountFacts};
use self::lifecycle::{Lifecycle, ServerState};
pub use self::removal::Removal;
use self::shutdown::{OnSignal, Shutdown};
use super::event::{Action, CallerId, Event, Inputs, JobId, Role, ServerId, Started, Task};
use super::program::Program;
use crate::protocol::Numbered;
use crate::protocol::stats::Figures;

/// Delay before another attempt to write a record.
const RECORD_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The purpose of a job.
#[derive(Debug)]
enum Purpose {
    /// Creates the file of a backing, for a request of a server.
    Create(ServerId, u64, FileKey),
    /// Freezes a backing, for a request of a server.
    Freeze(ServerId, u64, FileKey),
    /// Remembers the verification of a backing.
    Remember,
    /// Remembers the result of a scrub, for a request of a server.
    Scrubbed(ServerId, u64),
    /// Finds unused backings, for a request of a server.
    FindUnused(ServerId, u64, Vec<FileKey>),
    /// Unmounts, for a caller or for a signal.
    Unmount(Option<CallerId>, UnmountMode),
    /// Closes files of backings.
    CloseFiles,
    /// Checks a new supervisor program, for a caller.
    Check(Arc<Program>, CallerId),
}

/// The supervisor of one mount, without its descriptors.
#[derive(Debug)]
pub struct Machine {
    mount: MountFacts,
    lifecycle: Lifecycle,
    handover: Handover,
    removal: Removal,
    backings: Backings,
    shutdown: Shutdown,
    jobs: HashMap<JobId, Purpose>,
    next_job: u64,
    rings: u32,
    record_at: Option<Instant>,
    is_over: bool,
    actions: Vec<Action>,
}

impl Machine {
    /// Creates the machine of a mount. Returns also the numbers of the leaving servers, in the order of
    /// [`InitialState::leaving`], and the first actions.
    pub fn new(initial_state: InitialState, inputs: &Inputs) -> (Machine, Vec<ServerId>, Vec<Action>) {
        let mut lifecycle = Lifecycle::new(initial_state.has_served, initial_state.restarts);
        let server = initial_state.server.map(|row| ServerState::new(lifecycle.next_id(), row, None, inputs));
        let serving = server.as_ref().map(|server| server.row.serving);
        if let Some(server) = server {
            lifecycle.started(server);
        }
        let mut leaving = Vec::new();
        for process in initial_state.leaving {
            let id = lifecycle.next_id();
            lifecycle.add_leaving(id, process);
            leaving.push(id);
        }
        let mut machine = Machine {
            mount: initial_state.mount,
            lifecycle,
            handover: Handover::new(initial_state.program),
            removal: initial_state.removal,
            backings: initial_state.backings,
            shutdown: Shutdown::new(initial_state.draining),
            jobs: HashMap::new(),
            next_job: 1,
            rings: initial_state.rings,
            record_at: None,
            is_over: false,
            actions: Vec::new(),
        };
        match serving {
            Some(true) => machine.announce(),
            Some(false) => machine.record(),
            None => {}
        }
        machine.advance(inputs);
        let actions = std::mem::take(&mut machine.actions);
        (machine, leaving, actions)
    }

    /// Handles one event. Returns the actions, to be executed in order.
    pub fn handle(&mut self, event: Event, inputs: &Inputs) -> Vec<Action> {
        match event {
            Event::Tick => {}
            Event::Signal { may_abort } => self.signal(may_abort),
            Event::Request(caller, request, program) => self.request(caller, request, program, inputs),
            Event::CallerGone(caller) => {
                let gone = self.removal.caller_gone(caller);
                self.rows_dropped(gone);
            }
            Event::Message(id, Numbered { number, body }, file) => self.message(id, number, body, file),
            Event::LinkClosed(id) => self.end_server(id, "the new server exited"),
            Event::Exited(id) => self.exited(id),
            Event::ServerEnded { id, status, oom } => self.lost(id, status, oom, inputs),
            Event::ServerStarted(role, started) => self.started(role, started, inputs),
            Event::InitReplyWritten { id, number, is_first, result } => {
                self.init_reply_written(id, number, is_first, result);
            }
            Event::BackingRegistered(id, number, key, result) => {
                self.backing_registered(id, number, &key, result);
            }
            Event::JobEnded(job, result) => self.job_ended(job, result),
            Event::RecordWritten(result) => self.record_written(result, inputs),
            Event::ExecFailed(caller, error) => self.respond(Some(caller), Err(error)),
            Event::MountOver => self.is_over = true,
        }
        self.advance(inputs);
        std::mem::take(&mut self.actions)
    }

    /// Replaces the current server; `why` is the reason that the watchdog gives.
    pub fn replace_server(&mut self, why: &str) -> Vec<Action> {
        log::error!("watchdog: {why}; replacing the server");
        self.actions.push(Action::CountReplaced);
        self.handover.revert();
        if let Some(server) = self.lifecycle.current() {
            self.actions.push(Action::EndServer(server.id));
        }
        std::mem::take(&mut self.actions)
    }

    /// Returns the time of the next deadline, at which the machine needs an [`Event::Tick`].
    pub fn next_wakeup(&self) -> Option<Instant> {
        let times =
            [self.lifecycle.start_at(), self.record_at, self.handover.deadline(), self.removal.next_expiry()];
        times.into_iter().flatten().min()
    }

    /// Returns the current server.
    pub fn current(&self) -> Option<&ServerState> {
        self.lifecycle.current()
    }

    /// Returns true if the server is current, a candidate, or leaving.
    pub fn tracks(&self, id: ServerId) -> bool {
        let is_current = self.lifecycle.current().is_some_and(|server| server.id == id);
        let is_candidate = self.handover.candidate().is_some_and(|candidate| candidate.server.id == id);
        is_current || is_candidate || self.lifecycle.is_leaving(id)
    }

    /// Returns true while a job is running.
    pub fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Returns the properties of the mount.
    pub fn mount(&self) -> &MountFacts {
        &self.mount
    }

    /// Returns the backings of the mount.
    pub fn backings(&self) -> &Backings {
        &self.backings
    }

    /// Returns the program that servers are started from.
    pub fn program(&self) -> &Arc<Program> {
        self.handover.program()
    }

    /// Returns the mount state, for the ledger and for `stencil status`. With `serving_only`, the state contains the
    /// current server only if it serves.
    pub fn snapshot(&self, supervisor: ProcessId, serving_only: bool, figures: Figures) -> Snapshot {
        let server = self.lifecycle.current().map(|server| server.row.clone());
        let backoff = self.lifecycle.backoff();
        Snapshot {
            control_version: CONTROL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            options: self.mount.options.clone(),
            device: self.mount.device,
            record: self.mount.record.clone(),
            supervisor,
            init: self.mount.init.clone(),
            reply: self.mount.init_reply.clone(),
            chosen: self.mount.chosen.clone(),
            server: server.filter(|row| row.serving || !serving_only),
            leaving: self.lifecycle.leaving().collect(),
            page: self.mount.counters_page,
            draining: self.shutdown.is_draining(),
            restarts: self.lifecycle.restarts(),
            last_end: backoff.last().cloned(),
            early_ends: backoff.early_ends(),
            next_start: backoff.next_start(),
            backings: self.backings.rows(),
            store_id: self.mount.store_id.clone(),
            condemned: self.removal.rows(),
            counters: figures.counters,
            latencies: figures.latencies,
        }
    }

    /// Performs the transitions that depend on the state and the time only; runs after each event.
    fn advance(&mut self, inputs: &Inputs) {
        if self.is_over {
            return;
        }
        if let Some(id) = self.handover.overdue(inputs.now) {
            let limit = TRIAL_TIMEOUT.as_secs();
            self.candidate_failed(id, &format!("timed out after {limit} s waiting for the new server"));
        }
        if self.lifecycle.current().is_some_and(|s| s.row.serving && s.has_answered(inputs.answers)) {
            self.handover.confirm_program();
        }
        if self.record_at.is_some_and(|at| inputs.now >= at) {
            self.record();
        }
        let expired = self.removal.expire(inputs.now);
        self.rows_dropped(expired);
        self.settle(inputs);
        if self.lifecycle.is_serving()
            && let Some(files) = self.shutdown.take_files()
        {
            self.job(Purpose::CloseFiles, Task::CloseFiles(files));
        }
        if self.jobs.is_empty()
            && self.handover.is_ready()
            && let Some((program, caller)) = self.handover.take_ready()
        {
            self.actions.extend([Action::Save, Action::BecomeProgram(program, caller)]);
        }
        match self.lifecycle.start_due(inputs.now) {
            Ok(true) => {
                let id = self.lifecycle.next_id();
                let program = Arc::clone(self.handover.program());
                self.actions.extend([Action::Save, Action::StartServer(id, Role::Replacement, program)]);
            }
            Ok(false) => {}
            Err(error) => self.actions.push(Action::GiveUp(error)),
        }
    }

    fn record(&mut self) {
        self.actions.extend([Action::Save, Action::WriteRecord]);
    }

    fn announce(&mut self) {
        self.record();
        self.actions.push(Action::Announce);
    }

    fn respond(&mut self, caller: Option<CallerId>, result: Result<()>) {
        self.actions.extend(Action::answer(caller, result));
    }

    fn job(&mut self, purpose: Purpose, task: Task) {
        let job = JobId(self.next_job);
        self.next_job += 1;
        self.jobs.insert(job, purpose);
        self.actions.push(Action::StartJob(job, task));
    }

    fn record_written(&mut self, result: Result<()>, inputs: &Inputs) {
        match (&result, self.record_at) {
            (Err(error), None) => log::error!("{error}; retrying every second"),
            (Ok(()), Some(_)) => log::info!("the record of the mount was written after earlier errors"),
            _ => {}
        }
        self.record_at = result.err().map(|_| inputs.now + RECORD_RETRY_INTERVAL);
    }

    // Servers.

    fn started(&mut self, role: Role, started: Result<Started>, inputs: &Inputs) {
        let program = match role {
            Role::Replacement => Some(self.handover.program()),
            Role::Candidate => self.handover.starting(),
        };
        let path = program.map(|program| program.path.clone()).unwrap_or_default();
        let server = started.map(|Started { id, process }| {
            let (version, lacks) = (String::new(), Vec::new());
            let row = ServerRow { process, version, program: path, lacks, serving: false };
            // The server reads the ledger after its start, so its list is at least as new as the last ring.
            ServerState::new(id, row, Some(self.rings), inputs)
        });
        match (role, server) {
            (Role::Replacement, Ok(server)) => {
                self.lifecycle.started(server);
                // From here on a supervisor that takes over finds the server.
                self.record();
            }
            (Role::Replacement, Err(error)) => {
                log::error!("{error}");
                self.lifecycle.start_failed(inputs);
            }
            (Role::Candidate, Ok(server)) => self.handover.trial_started(server),
            (Role::Candidate, Err(error)) => {
                log::error!("{error}");
                let caller = self.handover.trial_not_started();
                self.respond(caller, Err(error));
            }
        }
    }

    /// Ends a server that has died or has violated the protocol. [`Action::EndServer`] reads the exit status of the
    /// current server first; a candidate is dismissed for the reason `why`.
    fn end_server(&mut self, id: ServerId, why: &str) {
        if self.lifecycle.get_mut(id).is_some() {
            self.actions.push(Action::EndServer(id));
        } else {
            self.candidate_failed(id, why);
        }
    }

    fn lost(&mut self, id: ServerId, status: Option<Ended>, oom: bool, inputs: &Inputs) {
        if !self.lifecycle.lost(id, status, oom, inputs) {
            return;
        }
        self.shutdown.close_later(self.backings.drop_unfinished());
        self.actions.push(Action::Watch(None));
        if self.lifecycle.backoff().is_persistent() {
            self.handover.revert();
        }
    }

    fn exited(&mut self, id: ServerId) {
        if let Some(process) = self.lifecycle.exited(id) {
            log::info!("server {} exited", process.pid);
            // The server may have read requests until its exit.
            self.resend();
        } else {
            self.end_server(id, "the new server exited");
        }
    }

    fn resend(&mut self) {
        if self.mount.init_reply.is_some() && !self.is_over {
            self.actions.push(Action::Resend);
        }
    }

    fn dismiss(&mut self, server: &ServerState) {
        self.lifecycle.add_leaving(server.id, server.row.process);
        self.actions.push(Action::KillServer(server.id));
    }

    // Handover.

    /// Starts a candidate from `program`.
    fn start_trial(&mut self, program: Arc<Program>, caller: Option<CallerId>) {
        let id = self.lifecycle.next_id();
        self.handover.start_trial(Arc::clone(&program), caller);
        self.actions.extend([Action::Save, Action::StartServer(id, Role::Candidate, program)]);
    }

    /// Starts a candidate from the program that this process has executed.
    pub fn try_program(&mut self, program: Program, caller: Option<CallerId>) -> Vec<Action> {
        self.start_trial(Arc::new(program), caller);
        std::mem::take(&mut self.actions)
    }

    fn promote_candidate(&mut self) {
        let Some(candidate) = self.handover.promote() else { return };
        let (pid, path) = (candidate.server.row.process.pid, candidate.program.path.display());
        log::info!("server {pid} of {path} replaces the current server");
        let old = self.lifecycle.replace(candidate.server);
        self.shutdown.close_later(self.backings.drop_unfinished());
        self.actions.push(Action::Watch(candidate.table));
        self.announce();
        // The old server is dismissed only after the new record is written: a supervisor that takes over from here on
        // finds the new server.
        if let Some(old) = old {
            self.dismiss(&old);
            self.actions.push(Action::Save);
        }
        self.respond(candidate.caller, Ok(()));
    }

    /// Dismisses the candidate. The current server continues, and gets the requests that the candidate has read.
    fn candidate_failed(&mut self, id: ServerId, why: &str) {
        if self.handover.get_mut(id).is_none() {
            return;
        }
        let Some(candidate) = self.handover.dismiss() else { return };
        self.dismiss(&candidate.server);
        // The kernel resends the requests that the candidate may have read. It does so before the candidate exits,
        // because the exit may take long.
        self.resend();
        let caller = candidate.caller;
        let error = candidate.error(why);
        log::error!("{error}");
        self.respond(caller, Err(error));
    }

    fn restart(&mut self, caller: CallerId, supervisor: bool, program: Option<OwnedFd>) -> Result<()> {
        let program = program.ok_or_else(|| Error::failed("the restart request contains no program"))?;
        self.handover.expect_idle()?;
        let program = Arc::new(Program::new(program));
        if supervisor {
            self.handover.start_check();
            self.actions.push(Action::Save);
            self.job(Purpose::Check(Arc::clone(&program), caller), Task::CheckProgram(program));
        } else {
            self.start_trial(program, Some(caller));
        }
        Ok(())
    }

    // Shutdown.

    fn signal(&mut self, may_abort: bool) {
        match self.shutdown.signal(may_abort) {
            OnSignal::Drain => {
                log::info!("received a termination signal: unmounting");
                self.actions.push(Action::AnnounceStop);
                self.unmount(None, UnmountMode::Plain);
            }
            OnSignal::Abort => {
                log::info!("received another termination signal: aborting the connection");
                self.unmount(None, UnmountMode::Force);
            }
            OnSignal::Ignore => {
                log::info!(
                    "ignoring the signal: the mount is already draining; to end the mount now, run 'stencil \
                     umount --force'"
                );
            }
        }
    }

    /// Unmounts. A mount in use is detached, and ends with its last mapping.
    pub fn drain(&mut self) -> Vec<Action> {
        self.shutdown.drain();
        self.unmount(None, UnmountMode::Plain);
        std::mem::take(&mut self.actions)
    }

    fn unmount(&mut self, caller: Option<CallerId>, mode: UnmountMode) {
        self.job(Purpose::Unmount(caller, mode), Task::Unmount(mode));
    }

    fn unmounted(&mut self, caller: Option<CallerId>, mode: UnmountMode, failed: Option<Error>) {
        if caller.is_some() {
            return self.respond(caller, failed.map_or(Ok(()), Err));
        }
        match self.shutdown.unmounted(mode, failed.is_some()) {
            Some(mode) => self.unmount(None, mode),
            None => match failed {
                Some(error) => log::error!("{error}"),
                None if mode == UnmountMode::Lazy => {
                    log::warn!(
                        "the mount is in use: detached, and served until the last process that uses it exits"
                    );
                }
                None => {}
            },
        }
    }
}

#[cfg(test)]
mod tests;
