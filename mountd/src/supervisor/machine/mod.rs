//! The supervisor's decisions: one event in, actions out. No system call that waits, no clock, no mount.
//!
//! The machine composes the life of servers ([`Lifecycle`]), handovers ([`Handover`]), removals ([`Removal`]), backings
//! ([`Backings`]) and the end of the mount ([`Shutdown`]). These invariants hold, whatever the order of events:
//!
//! 1. No server gets the id of a backing that was not frozen and then verified.
//! 2. No backing that a process uses is closed: a job has found it unused after the server stopped handing it out, or its
//!    template was removed and the server has let go of it.
//! 3. A removal is told that its templates are condemned only when no server can open them.
//! 4. A request of a server gets at most one reply, and so does a request of a caller.
//! 5. Each death of a server has one resend, after its exit; a dismissed candidate has one more, when it is killed.

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

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencilfs::control::{CONTROL_VERSION, FileKey, ServerRow, Snapshot, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::{Ended, ProcessId};

pub use self::backings::Backings;
pub use self::backoff::log_end;
use self::handover::Handover;
pub use self::handover::TRIAL_LIMIT;
pub use self::initial_state::{InitialState, MountFacts};
use self::lifecycle::{Lifecycle, ServerState};
pub use self::removal::Removal;
use self::shutdown::{OnSignal, Shutdown};
use super::event::{Action, CallerId, Event, Inputs, JobId, Role, ServerId, Started, Task};
use super::program::Program;
use crate::protocol::Numbered;

/// A record that could not be written is written again after this time.
const RECORD_RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Purpose {
    /// The file of a backing is created for a request.
    Create(ServerId, u64, FileKey),
    /// A backing is frozen for a request.
    Freeze(ServerId, u64, FileKey),
    /// Unused backings are sought for a request.
    FindUnused(ServerId, u64, Vec<FileKey>),
    /// The mount is detached for a caller, or for a signal.
    Unmount(Option<CallerId>, UnmountMode),
    CloseFiles,
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
    /// Takes up a mount. Returns the numbers of its leaving servers, in their order, and the first actions.
    pub fn new(begin: InitialState, inputs: &Inputs) -> (Machine, Vec<ServerId>, Vec<Action>) {
        let mut lifecycle = Lifecycle::new(begin.has_served, begin.restarts);
        let server = begin.server.map(|row| ServerState::new(lifecycle.next_id(), row, None, inputs));
        let serving = server.as_ref().map(|server| server.row.serving);
        if let Some(server) = server {
            lifecycle.started(server);
        }
        let mut leaving = Vec::new();
        for process in begin.leaving {
            let id = lifecycle.next_id();
            lifecycle.leave(id, process);
            leaving.push(id);
        }
        let mut machine = Machine {
            mount: begin.mount,
            lifecycle,
            handover: Handover::new(begin.program),
            removal: begin.removal,
            backings: begin.backings,
            shutdown: Shutdown::new(begin.draining),
            jobs: HashMap::new(),
            next_job: 1,
            rings: begin.rings,
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

    /// Handles one event.
    pub fn handle(&mut self, event: Event, inputs: &Inputs) -> Vec<Action> {
        match event {
            Event::Tick => {}
            Event::Signal { forces } => self.signal(forces),
            Event::Request(caller, request, program) => self.request(caller, request, program, inputs),
            Event::CallerGone(caller) => {
                let gone = self.removal.caller_gone(caller);
                self.dropped(gone);
            }
            Event::Message(id, Numbered { number, body }, file) => self.message(id, number, body, file),
            Event::LinkClosed(id) => self.end_server(id, "it exited"),
            Event::Exited(id) => self.exited(id),
            Event::ServerEnded { id, how, oom } => self.lost(id, how, oom, inputs),
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

    /// The watchdog gives up the current server.
    pub fn replace_server(&mut self, why: &str) -> Vec<Action> {
        log::error!("watchdog: {why}: the server is replaced");
        self.actions.push(Action::CountReplaced);
        self.handover.go_back();
        if let Some(server) = self.lifecycle.current() {
            self.actions.push(Action::EndServer(server.id));
        }
        std::mem::take(&mut self.actions)
    }

    /// When an event is due if nothing else happens.
    pub fn next_wakeup(&self) -> Option<Instant> {
        let times =
            [self.lifecycle.start_at(), self.record_at, self.handover.deadline(), self.removal.next_expiry()];
        times.into_iter().flatten().min()
    }

    /// The current server.
    pub fn current(&self) -> Option<&ServerState> {
        self.lifecycle.current()
    }

    /// True for the current server, a candidate, and a server that leaves.
    pub fn knows(&self, id: ServerId) -> bool {
        let is_current = self.lifecycle.current().is_some_and(|server| server.id == id);
        let is_candidate = self.handover.candidate().is_some_and(|candidate| candidate.server.id == id);
        is_current || is_candidate || self.lifecycle.is_leaving(id)
    }

    /// True while a job runs.
    pub fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// The mount.
    pub fn mount(&self) -> &MountFacts {
        &self.mount
    }

    /// The backings.
    pub fn backings(&self) -> &Backings {
        &self.backings
    }

    /// The program that servers are started from.
    pub fn program(&self) -> &Arc<Program> {
        self.handover.program()
    }

    /// The mount state: what a successor reads, and what `stencil status` shows. `serving_only`: a server that only starts
    /// is left out.
    pub fn snapshot(&self, supervisor: ProcessId, serving_only: bool, counters: Counters) -> Snapshot {
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
            counters,
        }
    }

    /// What follows from the state alone, whatever the event was.
    fn advance(&mut self, inputs: &Inputs) {
        if self.is_over {
            return;
        }
        if let Some(id) = self.handover.overdue(inputs.now) {
            self.candidate_failed(id, "timed out after 5 s waiting for the new server");
        }
        if self.lifecycle.current().is_some_and(|s| s.row.serving && s.has_answered(inputs.answers)) {
            self.handover.proven();
        }
        if self.record_at.is_some_and(|at| inputs.now >= at) {
            self.record();
        }
        let expired = self.removal.expire(inputs.now);
        self.dropped(expired);
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
            (Err(error), None) => log::error!("{error}; trying again each second"),
            (Ok(()), Some(_)) => log::info!("the record of the mount is written"),
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
            // The server has yet to read the mount state, which has all that was rung for.
            ServerState::new(id, row, Some(self.rings), inputs)
        });
        match (role, server) {
            (Role::Replacement, Ok(server)) => {
                self.lifecycle.started(server);
                // From here on another supervisor finds it.
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

    /// A server that has died, or is of no use: how it ended is found out first.
    fn end_server(&mut self, id: ServerId, why: &str) {
        if self.lifecycle.get_mut(id).is_some() {
            self.actions.push(Action::EndServer(id));
        } else {
            self.candidate_failed(id, why);
        }
    }

    fn lost(&mut self, id: ServerId, how: Option<Ended>, oom: bool, inputs: &Inputs) {
        if !self.lifecycle.lost(id, how, oom, inputs) {
            return;
        }
        self.shutdown.close_later(self.backings.drop_unfinished());
        self.actions.push(Action::Watch(None));
        if self.lifecycle.backoff().is_persistent() {
            self.handover.go_back();
        }
    }

    fn exited(&mut self, id: ServerId) {
        if let Some(process) = self.lifecycle.exited(id) {
            log::info!("server {} exited", process.pid);
            // What it had read since its successor started comes again.
            self.resend();
        } else {
            self.end_server(id, "it exited");
        }
    }

    fn resend(&mut self) {
        if self.mount.init_reply.is_some() && !self.is_over {
            self.actions.push(Action::Resend);
        }
    }

    fn dismiss(&mut self, server: &ServerState) {
        self.lifecycle.leave(server.id, server.row.process);
        self.actions.push(Action::KillServer(server.id));
    }

    // Handover.

    /// Starts a candidate of that program.
    fn begin_trial(&mut self, program: Arc<Program>, caller: Option<CallerId>) {
        let id = self.lifecycle.next_id();
        self.handover.begin_trial(Arc::clone(&program), caller);
        self.actions.extend([Action::Save, Action::StartServer(id, Role::Candidate, program)]);
    }

    /// Starts a server of the program that this supervisor has become.
    pub fn try_program(&mut self, program: Program, caller: Option<CallerId>) -> Vec<Action> {
        self.begin_trial(Arc::new(program), caller);
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
        // Only now: a supervisor that takes over from here on finds the new server.
        if let Some(old) = old {
            self.dismiss(&old);
            self.actions.push(Action::Save);
        }
        self.respond(candidate.caller, Ok(()));
    }

    /// The candidate does not come to serve: the current server continues, and gets what the candidate had read.
    fn candidate_failed(&mut self, id: ServerId, why: &str) {
        if self.handover.get_mut(id).is_none() {
            return;
        }
        let Some(candidate) = self.handover.dismiss() else { return };
        self.dismiss(&candidate.server);
        // At once: a candidate that cannot exit for a while may have read requests.
        self.resend();
        let caller = candidate.caller;
        let error = candidate.error(why);
        log::error!("{error}");
        self.respond(caller, Err(error));
    }

    fn restart(&mut self, caller: CallerId, supervisor: bool, program: Option<OwnedFd>) -> Result<()> {
        let program = program.ok_or_else(|| Error::failed("no program came with the restart request"))?;
        self.handover.expect_idle()?;
        let program = Arc::new(Program::new(program));
        if supervisor {
            self.handover.begin_check();
            self.actions.push(Action::Save);
            self.job(Purpose::Check(Arc::clone(&program), caller), Task::CheckProgram(program));
        } else {
            self.begin_trial(program, Some(caller));
        }
        Ok(())
    }

    // The end of the mount.

    fn signal(&mut self, forces: bool) {
        match self.shutdown.signal(forces) {
            OnSignal::Drain => {
                log::info!("a signal asks for the end of the mount: unmounting");
                self.actions.push(Action::AnnounceStop);
                self.unmount(None, UnmountMode::Plain);
            }
            OnSignal::Abort => {
                log::info!("a second signal asks for the end of the mount: aborting the connection");
                self.unmount(None, UnmountMode::Force);
            }
            OnSignal::Ignore => {
                log::info!(
                    "a further signal has no effect; to end the mount now, run 'stencil umount --force'"
                );
            }
        }
    }

    /// Takes the mount out of the tree; where it is in use, it ends with its last mapping.
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
                    log::warn!("the mount is in use: detached, and served until its last user ends");
                }
                None => {}
            },
        }
    }
}

/// Counters by name.
pub type Counters = BTreeMap<String, u64>;

#[cfg(test)]
mod tests;
