//! Handover to another program while clones continue to run: of the server only, or of the supervisor and then its
//! server.
//!
//! A new server is a *candidate*, which runs beside the current server until it is ready to answer the kernel. A
//! candidate that does not become ready in time is dismissed, and the current server continues. A new supervisor
//! program first checks that it can read the ledger; then this process executes that program by execve(2), when no job
//! is running.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencilfs::control::Failure;
use stencilfs::error::{Error, Result};

use super::lifecycle::ServerState;
use crate::supervisor::event::{CallerId, ServerId};
use crate::supervisor::program::Program;

/// Longest time until a candidate serves, and of the check of a new supervisor program.
pub const TRIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that will replace the current server.
#[derive(Debug)]
pub struct Candidate {
    /// The state of the server.
    pub server: ServerState,
    /// The program of the server.
    pub program: Arc<Program>,
    /// The caller that requested the restart; `None` if a new supervisor program started the candidate.
    pub caller: Option<CallerId>,
    /// The in-flight table of the server, after its handshake.
    pub table: Option<OwnedFd>,
    /// The reason why the server cannot start, if it reported one.
    pub failure: Option<Failure>,
}

impl Candidate {
    /// Returns the error for the caller if the candidate was dismissed. `why` is the reason if the server reported
    /// none.
    pub fn error(self, why: &str) -> Error {
        let path = self.program.path.display();
        let context = format!("the new server, {path}, does not serve; the current server continues");
        self.failure.map_or_else(|| Error::failed(why), Failure::into_error).context(context)
    }
}

#[derive(Debug)]
enum State {
    Idle,
    /// A candidate is being started.
    Starting(Arc<Program>, Option<CallerId>),
    /// A candidate is running, but does not serve yet.
    Trial(Box<Candidate>),
    /// A new supervisor program is checking the ledger.
    Checking,
    /// This process will execute the program when no job is running.
    Ready(Arc<Program>, CallerId),
}

/// The programs of a mount, and the handover in progress.
#[derive(Debug)]
pub struct Handover {
    program: Arc<Program>,
    /// The program before the last handover, until a server of the new program has answered a request.
    previous: Option<Arc<Program>>,
    state: State,
}

impl Handover {
    /// Creates the state of a mount whose servers are started from `program`, without a handover.
    pub fn new(program: Program) -> Handover {
        Handover { program: Arc::new(program), previous: None, state: State::Idle }
    }

    /// Returns the program that servers are started from.
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    /// Checks that no handover is in progress.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if a handover is in progress.
    pub fn expect_idle(&self) -> Result<()> {
        match self.state {
            State::Idle => Ok(()),
            _ => Err(Error::try_again("another restart of this mount is in progress")),
        }
    }

    /// Records that a candidate is being started from `program`.
    pub fn start_trial(&mut self, program: Arc<Program>, caller: Option<CallerId>) {
        self.state = State::Starting(program, caller);
    }

    /// Returns the program of the candidate that is being started.
    pub fn starting(&self) -> Option<&Arc<Program>> {
        match &self.state {
            State::Starting(program, _) => Some(program),
            _ => None,
        }
    }

    /// Records that the candidate was started.
    pub fn trial_started(&mut self, server: ServerState) {
        if let State::Starting(program, caller) = std::mem::replace(&mut self.state, State::Idle) {
            let candidate = Candidate { server, program, caller, table: None, failure: None };
            self.state = State::Trial(Box::new(candidate));
        }
    }

    /// Records that the candidate could not be started. Returns the caller that requested the restart.
    pub fn trial_not_started(&mut self) -> Option<CallerId> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Starting(_, caller) => caller,
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Returns the running candidate.
    pub fn candidate(&self) -> Option<&Candidate> {
        match &self.state {
            State::Trial(candidate) => Some(candidate),
            _ => None,
        }
    }

    /// Returns the running candidate, if it is the server `id`.
    pub fn get_mut(&mut self, id: ServerId) -> Option<&mut Candidate> {
        match &mut self.state {
            State::Trial(candidate) if candidate.server.id == id => Some(candidate),
            _ => None,
        }
    }

    /// Returns true while a candidate exists, or is being started. The candidate may have read an older mount state.
    pub fn has_candidate(&self) -> bool {
        matches!(self.state, State::Starting(..) | State::Trial(_))
    }

    /// Returns the candidate if it has timed out.
    pub fn overdue(&self, now: Instant) -> Option<ServerId> {
        let late = |since: Instant| now.saturating_duration_since(since) > TRIAL_TIMEOUT;
        self.candidate().filter(|c| late(c.server.since)).map(|c| c.server.id)
    }

    /// Returns the time at which the candidate times out.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.candidate()?.server.since + TRIAL_TIMEOUT)
    }

    /// Removes and returns the candidate, which will not serve.
    pub fn dismiss(&mut self) -> Option<Candidate> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Trial(candidate) => Some(*candidate),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Removes and returns the candidate, which serves from now on. Later servers are started from its program.
    pub fn promote(&mut self) -> Option<Candidate> {
        let candidate = self.dismiss()?;
        let program = Arc::clone(&candidate.program);
        self.previous = Some(std::mem::replace(&mut self.program, program));
        Some(candidate)
    }

    /// Records that a server of the program has answered a request: there is no return to the previous program any
    /// more.
    pub fn confirm_program(&mut self) {
        self.previous = None;
    }

    /// Returns to the previous program, because servers of the current program do not work. Has no effect if a server
    /// of the current program has answered a request.
    pub fn revert(&mut self) {
        if let Some(previous) = self.previous.take() {
            let (new, old) = (self.program.path.display(), previous.path.display());
            log::error!("servers of {new} do not answer requests; returning to {old}");
            self.program = previous;
        }
    }

    /// Records that a new supervisor program is checking the ledger.
    pub fn start_check(&mut self) {
        self.state = State::Checking;
    }

    /// Records that the check has succeeded: this process will execute the program.
    pub fn check_passed(&mut self, program: Arc<Program>, caller: CallerId) {
        self.state = State::Ready(program, caller);
    }

    /// Records that the check has failed.
    pub fn check_failed(&mut self) {
        self.state = State::Idle;
    }

    /// Removes and returns the program that this process will execute, with the caller that requested the restart.
    pub fn take_ready(&mut self) -> Option<(Arc<Program>, CallerId)> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Ready(program, caller) => Some((program, caller)),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Returns true if this process will execute another program.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::time::SystemTime;

    use stencilfs::control::ServerRow;
    use stencilfs::sys::process::ProcessId;

    use crate::supervisor::event::Inputs;

    fn program(path: &str) -> Program {
        Program { file: tempfile::tempfile().unwrap().into(), path: path.into() }
    }

    fn server(number: u64, now: Instant) -> ServerState {
        let process = ProcessId { pid: 100 + number as u32, identity: number };
        let (version, program, lacks) = (String::new(), PathBuf::new(), Vec::new());
        let row = ServerRow { process, version, program, lacks, serving: false };
        let inputs = Inputs { now, wall: SystemTime::UNIX_EPOCH, answers: 0 };
        ServerState::new(ServerId(number), row, None, &inputs)
    }

    #[test]
    fn a_promoted_program_can_be_reverted_until_its_server_has_answered() {
        let now = Instant::now();
        let mut handover = Handover::new(program("old"));
        handover.start_trial(Arc::new(program("new")), Some(CallerId(1)));
        assert!(handover.expect_idle().is_err() && handover.has_candidate());
        handover.trial_started(server(2, now));
        assert!(handover.get_mut(ServerId(1)).is_none() && handover.get_mut(ServerId(2)).is_some());
        assert_eq!(handover.promote().unwrap().caller, Some(CallerId(1)));
        assert_eq!(handover.program().path, PathBuf::from("new"));
        handover.revert();
        assert_eq!(handover.program().path, PathBuf::from("old"));
        handover.start_trial(Arc::new(program("new")), None);
        handover.trial_started(server(3, now));
        handover.promote().unwrap();
        handover.confirm_program();
        handover.revert();
        assert_eq!(handover.program().path, PathBuf::from("new"));
        assert!(handover.expect_idle().is_ok());
    }

    #[test]
    fn a_candidate_times_out_and_its_failure_is_reported() {
        let now = Instant::now();
        let mut handover = Handover::new(program("old"));
        assert!(handover.dismiss().is_none() && handover.deadline().is_none());
        handover.start_trial(Arc::new(program("new")), None);
        handover.trial_started(server(2, now));
        assert_eq!(handover.overdue(now + TRIAL_TIMEOUT), None);
        assert_eq!(handover.overdue(now + TRIAL_TIMEOUT * 2), Some(ServerId(2)));
        assert_eq!(handover.deadline(), Some(now + TRIAL_TIMEOUT));
        let failure = Failure::from(&Error::failed("no locked memory"));
        handover.get_mut(ServerId(2)).unwrap().failure = Some(failure);
        let error = handover.dismiss().unwrap().error("the new server exited").to_string();
        assert!(error.contains("new") && error.contains("no locked memory"), "{error}");
        assert_eq!(handover.program().path, PathBuf::from("old"));
        handover.start_trial(Arc::new(program("new")), Some(CallerId(4)));
        assert_eq!((handover.trial_not_started(), handover.trial_not_started()), (Some(CallerId(4)), None));
    }

    #[test]
    fn a_checked_program_is_executed_once() {
        let mut handover = Handover::new(program("old"));
        handover.start_check();
        assert!(handover.expect_idle().is_err() && !handover.has_candidate());
        handover.check_failed();
        assert!(handover.expect_idle().is_ok() && handover.take_ready().is_none());
        handover.start_check();
        handover.check_passed(Arc::new(program("new")), CallerId(1));
        assert!(handover.is_ready());
        assert_eq!(handover.take_ready().map(|(_, caller)| caller), Some(CallerId(1)));
        assert!(handover.take_ready().is_none() && handover.expect_idle().is_ok());
    }
}
