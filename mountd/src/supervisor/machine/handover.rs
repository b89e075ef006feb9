//! Handover to another program, while clones continue: of the server alone, or of the supervisor and then its server.
//!
//! A new server runs beside the current one as a *candidate* until it answers the kernel; a candidate that does not is
//! dismissed, and the current server goes on. A new supervisor program first checks that it can read the ledger; then
//! this process becomes that program by execve(2), once no job runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencilfs::control::Failure;
use stencilfs::error::{Error, Result};

use super::lifecycle::ServerState;
use crate::supervisor::event::{CallerId, ServerId};
use crate::supervisor::program::Program;

/// A new program must answer within this time.
pub const TRIAL_LIMIT: Duration = Duration::from_secs(5);

/// A server that is to replace the current one.
#[derive(Debug)]
pub struct Candidate {
    /// Its state.
    pub server: ServerState,
    /// Its program.
    pub program: Arc<Program>,
    /// The caller that asked for it; none if a new supervisor started it.
    pub caller: Option<CallerId>,
    /// Its in-flight table, once it has introduced itself.
    pub table: Option<OwnedFd>,
    /// Why it cannot start, if it said so.
    pub failure: Option<Failure>,
}

impl Candidate {
    /// The error for the caller if the candidate does not come to serve.
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
    /// A candidate runs.
    Trial(Box<Candidate>),
    /// A program checks the ledger.
    Checking,
    /// This process becomes that program as soon as it can.
    Ready(Arc<Program>, CallerId),
}

/// Programs of a mount, and the handover under way.
#[derive(Debug)]
pub struct Handover {
    program: Arc<Program>,
    /// The program before a handover, until a server of the new one has answered a request.
    previous: Option<Arc<Program>>,
    state: State,
}

impl Handover {
    /// Servers are started from that program.
    pub fn new(program: Program) -> Handover {
        Handover { program: Arc::new(program), previous: None, state: State::Idle }
    }

    /// The program that servers are started from.
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    /// Checks that no handover is under way.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if there is one.
    pub fn expect_idle(&self) -> Result<()> {
        match self.state {
            State::Idle => Ok(()),
            _ => Err(Error::try_again("another restart of this mount is under way")),
        }
    }

    /// A candidate of that program is to be started.
    pub fn begin_trial(&mut self, program: Arc<Program>, caller: Option<CallerId>) {
        self.state = State::Starting(program, caller);
    }

    /// The program of the candidate that is being started.
    pub fn starting(&self) -> Option<&Arc<Program>> {
        match &self.state {
            State::Starting(program, _) => Some(program),
            _ => None,
        }
    }

    /// The candidate runs.
    pub fn trial_started(&mut self, server: ServerState) {
        if let State::Starting(program, caller) = std::mem::replace(&mut self.state, State::Idle) {
            let candidate = Candidate { server, program, caller, table: None, failure: None };
            self.state = State::Trial(Box::new(candidate));
        }
    }

    /// The candidate could not be started; returns the caller that waits for it.
    pub fn trial_not_started(&mut self) -> Option<CallerId> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Starting(_, caller) => caller,
            other => {
                self.state = other;
                None
            }
        }
    }

    /// The candidate.
    pub fn candidate(&self) -> Option<&Candidate> {
        match &self.state {
            State::Trial(candidate) => Some(candidate),
            _ => None,
        }
    }

    /// The candidate, if it is that server.
    pub fn get_mut(&mut self, id: ServerId) -> Option<&mut Candidate> {
        match &mut self.state {
            State::Trial(candidate) if candidate.server.id == id => Some(candidate),
            _ => None,
        }
    }

    /// True while a second server exists that may have read an older mount state.
    pub fn has_candidate(&self) -> bool {
        matches!(self.state, State::Starting(..) | State::Trial(_))
    }

    /// The candidate, if it has not come to serve in time.
    pub fn overdue(&self, now: Instant) -> Option<ServerId> {
        let late = |since: Instant| now.saturating_duration_since(since) > TRIAL_LIMIT;
        self.candidate().filter(|c| late(c.server.since)).map(|c| c.server.id)
    }

    /// When the candidate is overdue.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.candidate()?.server.since + TRIAL_LIMIT)
    }

    /// Takes out the candidate: it does not come to serve.
    pub fn dismiss(&mut self) -> Option<Candidate> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Trial(candidate) => Some(*candidate),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Takes out the candidate: it serves now, and later servers are started from its program.
    pub fn promote(&mut self) -> Option<Candidate> {
        let candidate = self.dismiss()?;
        let program = Arc::clone(&candidate.program);
        self.previous = Some(std::mem::replace(&mut self.program, program));
        Some(candidate)
    }

    /// A server of the program has answered a request: it works.
    pub fn proven(&mut self) {
        self.previous = None;
    }

    /// Servers of the program do not work: returns to the program before, if it has not proven itself.
    pub fn go_back(&mut self) {
        if let Some(previous) = self.previous.take() {
            let (new, old) = (self.program.path.display(), previous.path.display());
            log::error!("servers of {new} do not answer: returning to {old}");
            self.program = previous;
        }
    }

    /// A program checks whether it can replace this supervisor.
    pub fn begin_check(&mut self) {
        self.state = State::Checking;
    }

    /// The check has succeeded.
    pub fn check_passed(&mut self, program: Arc<Program>, caller: CallerId) {
        self.state = State::Ready(program, caller);
    }

    /// The check has failed.
    pub fn check_failed(&mut self) {
        self.state = State::Idle;
    }

    /// Takes out the program that this process is to become.
    pub fn take_ready(&mut self) -> Option<(Arc<Program>, CallerId)> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Ready(program, caller) => Some((program, caller)),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// True if this process is to become another program.
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
    fn a_promoted_program_is_left_again_until_it_has_proven_itself() {
        let now = Instant::now();
        let mut handover = Handover::new(program("old"));
        handover.begin_trial(Arc::new(program("new")), Some(CallerId(1)));
        assert!(handover.expect_idle().is_err() && handover.has_candidate());
        handover.trial_started(server(2, now));
        assert!(handover.get_mut(ServerId(1)).is_none() && handover.get_mut(ServerId(2)).is_some());
        assert_eq!(handover.promote().unwrap().caller, Some(CallerId(1)));
        assert_eq!(handover.program().path, PathBuf::from("new"));
        handover.go_back();
        assert_eq!(handover.program().path, PathBuf::from("old"));
        handover.begin_trial(Arc::new(program("new")), None);
        handover.trial_started(server(3, now));
        handover.promote().unwrap();
        handover.proven();
        handover.go_back();
        assert_eq!(handover.program().path, PathBuf::from("new"));
        assert!(handover.expect_idle().is_ok());
    }

    #[test]
    fn a_candidate_has_a_time_limit_and_its_failure_is_told() {
        let now = Instant::now();
        let mut handover = Handover::new(program("old"));
        assert!(handover.dismiss().is_none() && handover.deadline().is_none());
        handover.begin_trial(Arc::new(program("new")), None);
        handover.trial_started(server(2, now));
        assert_eq!(handover.overdue(now + TRIAL_LIMIT), None);
        assert_eq!(handover.overdue(now + TRIAL_LIMIT * 2), Some(ServerId(2)));
        assert_eq!(handover.deadline(), Some(now + TRIAL_LIMIT));
        let failure = Failure::from(&Error::failed("no locked memory"));
        handover.get_mut(ServerId(2)).unwrap().failure = Some(failure);
        let error = handover.dismiss().unwrap().error("it exited").to_string();
        assert!(error.contains("new") && error.contains("no locked memory"), "{error}");
        assert_eq!(handover.program().path, PathBuf::from("old"));
        handover.begin_trial(Arc::new(program("new")), Some(CallerId(4)));
        assert_eq!((handover.trial_not_started(), handover.trial_not_started()), (Some(CallerId(4)), None));
    }

    #[test]
    fn a_checked_program_is_taken_once() {
        let mut handover = Handover::new(program("old"));
        handover.begin_check();
        assert!(handover.expect_idle().is_err() && !handover.has_candidate());
        handover.check_failed();
        assert!(handover.expect_idle().is_ok() && handover.take_ready().is_none());
        handover.begin_check();
        handover.check_passed(Arc::new(program("new")), CallerId(1));
        assert!(handover.is_ready());
        assert_eq!(handover.take_ready().map(|(_, caller)| caller), Some(CallerId(1)));
        assert!(handover.take_ready().is_none() && handover.expect_idle().is_ok());
    }
}
