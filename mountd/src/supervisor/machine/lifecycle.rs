//! The lifecycle of servers: started, serving, lost, exited.
//!
//! At most one server is *current*: it answers the kernel, or is starting up. A lost server is killed, and is *leaving*
//! until it exits; its successor starts without waiting for the exit. When a leaving server has exited, the kernel must
//! resend the requests that the server had read and not answered: one resend for each server. Each successor also makes
//! the kernel resend when it starts, so that readers need not wait for that exit.

use std::time::Instant;

use stencilfs::control::{Failure, ServerRow};
use stencilfs::error::Error;
use stencilfs::sys::process::{Ended, ProcessId};

use super::backoff::{Backoff, End};
use crate::supervisor::event::{Inputs, ServerId};

/// The decision whether a server's request is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The request is new.
    New,
    /// The request was received before. The server sent it again because another supervisor took over.
    Repeated,
    /// The server has not waited for the reply to its previous request.
    OutOfTurn,
}

/// The supervisor's state of one running server.
#[derive(Debug)]
pub struct ServerState {
    /// The number of the server.
    pub id: ServerId,
    /// The part of the state that is in the mount state, for `stencil status` and for a supervisor that takes over.
    pub row: ServerRow,
    /// Time at which the server was started or taken over.
    pub since: Instant,
    /// Count of rings when the server was started; `None` for a server that was taken over.
    pub rings_at_start: Option<u32>,
    answers_before: u64,
    last_number: u64,
    /// True while a job determines the reply to the last request.
    busy: bool,
}

impl ServerState {
    /// Creates the state of a server that was started or taken over now.
    pub fn new(id: ServerId, row: ServerRow, rings_at_start: Option<u32>, inputs: &Inputs) -> ServerState {
        let (since, answers_before) = (inputs.now, inputs.answers);
        ServerState { id, row, since, rings_at_start, answers_before, last_number: 0, busy: false }
    }

    /// Decides whether a request with this number is carried out. The numbers of the requests of one server increase.
    pub fn admit(&mut self, number: u64) -> Admission {
        if number <= self.last_number {
            return Admission::Repeated;
        }
        if self.busy {
            return Admission::OutOfTurn;
        }
        self.last_number = number;
        Admission::New
    }

    /// Records that a job determines the reply to the last request.
    pub fn start_job(&mut self) {
        self.busy = true;
    }

    /// Records that the job for the request `number` has ended. Returns false if the server does not wait for that
    /// reply.
    pub fn end_job(&mut self, number: u64) -> bool {
        number == self.last_number && std::mem::take(&mut self.busy)
    }

    /// Returns true if requests of the kernel were answered since the server was started or taken over.
    pub fn has_answered(&self, answers: u64) -> bool {
        answers != self.answers_before
    }
}

/// A server that was killed and has not exited yet.
#[derive(Debug)]
struct Leaving {
    id: ServerId,
    process: ProcessId,
}

/// All servers of a mount except candidates.
#[derive(Debug)]
pub struct Lifecycle {
    current: Option<ServerState>,
    leaving: Vec<Leaving>,
    backoff: Backoff,
    start_at: Option<Instant>,
    starting: bool,
    failure: Option<Failure>,
    has_served: bool,
    restarts: u64,
    next_id: u64,
}

impl Lifecycle {
    /// Creates the state of a mount without servers. If the mount `has_served`, processes may depend on the mount, and
    /// the supervisor never gives up.
    pub fn new(has_served: bool, restarts: u64) -> Lifecycle {
        Lifecycle {
            current: None,
            leaving: Vec::new(),
            backoff: Backoff::default(),
            start_at: None,
            starting: false,
            failure: None,
            has_served,
            restarts,
            next_id: 1,
        }
    }

    /// Returns a new number for a server.
    pub fn next_id(&mut self) -> ServerId {
        let id = ServerId(self.next_id);
        self.next_id += 1;
        id
    }

    /// Returns the current server.
    pub fn current(&self) -> Option<&ServerState> {
        self.current.as_ref()
    }

    /// Returns the current server, if its number is `id`.
    pub fn get_mut(&mut self, id: ServerId) -> Option<&mut ServerState> {
        self.current.as_mut().filter(|server| server.id == id)
    }

    /// Returns true if the current server answers the kernel.
    pub fn is_serving(&self) -> bool {
        self.current.as_ref().is_some_and(|server| server.row.serving)
    }

    /// Returns the processes of the leaving servers.
    pub fn leaving(&self) -> impl Iterator<Item = ProcessId> {
        self.leaving.iter().map(|server| server.process)
    }

    /// Returns true if the server is leaving.
    pub fn is_leaving(&self, id: ServerId) -> bool {
        self.leaving.iter().any(|server| server.id == id)
    }

    /// Returns true if there are leaving servers, which may still send replies to the kernel.
    pub fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Returns the ends of earlier servers.
    pub fn backoff(&self) -> &Backoff {
        &self.backoff
    }

    /// Returns the number of servers that were started to replace other servers.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Returns the time of the next start, if the start is delayed.
    pub fn start_at(&self) -> Option<Instant> {
        self.start_at
    }

    /// Returns true if a server must be started now.
    ///
    /// # Errors
    /// Returns the reason to give up, if the mount has never served and its servers cannot start.
    pub fn start_due(&mut self, now: Instant) -> Result<bool, Error> {
        if self.current.is_some() || self.starting || self.start_at.is_some_and(|at| now < at) {
            return Ok(false);
        }
        if !self.has_served && (self.failure.is_some() || self.backoff.is_persistent()) {
            return Err(self.failure.take().map_or_else(
                || {
                    Error::failed("the server exits before it answers the kernel")
                        .hint("run 'stencil mount -f' with STENCIL_LOG=debug to see the reason")
                },
                Failure::into_error,
            ));
        }
        self.starting = true;
        Ok(true)
    }

    /// Records that a server was started or taken over, and makes it current.
    pub fn started(&mut self, server: ServerState) {
        (self.starting, self.start_at) = (false, None);
        self.backoff.note_started();
        self.current = Some(server);
    }

    /// Records that a server could not be started.
    pub fn start_failed(&mut self, inputs: &Inputs) {
        self.starting = false;
        self.start_at = Some(inputs.now + self.backoff.note_failed_start(inputs.wall));
    }

    /// Records that the current server answers the kernel.
    pub fn serves(&mut self) {
        if let Some(server) = &mut self.current {
            server.row.serving = true;
        }
        (self.failure, self.start_at, self.has_served) = (None, None, true);
    }

    /// Records the reason why the current server cannot start.
    pub fn cannot_start(&mut self, failure: Failure) {
        log::error!("the server cannot start: {}", failure.clone().into_error());
        self.failure = Some(failure);
    }

    /// Records that the server `id` has died or was abandoned, and schedules the start of its successor. Returns false
    /// if the server is not current.
    pub fn lost(&mut self, id: ServerId, status: Option<Ended>, oom: bool, inputs: &Inputs) -> bool {
        let Some(server) = self.current.take_if(|server| server.id == id) else { return false };
        let end = End {
            pid: server.row.process.pid,
            status,
            lived: inputs.now.saturating_duration_since(server.since),
            serving: server.row.serving,
            answered: server.has_answered(inputs.answers),
            oom,
        };
        self.start_at = self.backoff.note(end, inputs.wall).map(|delay| inputs.now + delay);
        self.restarts += 1;
        self.add_leaving(id, server.row.process);
        true
    }

    /// Makes another server current, which serves already. Returns the previous current server.
    pub fn replace(&mut self, mut server: ServerState) -> Option<ServerState> {
        server.row.serving = true;
        self.restarts += 1;
        self.has_served = true;
        (self.failure, self.start_at) = (None, None);
        self.current.replace(server)
    }

    /// Adds a killed server to the leaving servers.
    pub fn add_leaving(&mut self, id: ServerId, process: ProcessId) {
        self.leaving.push(Leaving { id, process });
    }

    /// Records that a server process has exited. Returns the process if the server was leaving.
    pub fn exited(&mut self, id: ServerId) -> Option<ProcessId> {
        let at = self.leaving.iter().position(|server| server.id == id)?;
        Some(self.leaving.swap_remove(at).process)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::time::{Duration, SystemTime};

    fn inputs() -> Inputs {
        Inputs { now: Instant::now(), wall: SystemTime::UNIX_EPOCH, answers: 0 }
    }

    fn server(lifecycle: &mut Lifecycle, at: &Inputs) -> ServerId {
        let id = lifecycle.next_id();
        let process = ProcessId { pid: id.0 as u32, identity: id.0 };
        let row = ServerRow {
            process,
            version: String::new(),
            program: PathBuf::new(),
            lacks: Vec::new(),
            serving: false,
        };
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(true));
        lifecycle.started(ServerState::new(id, row, Some(0), at));
        id
    }

    #[test]
    fn the_successor_of_a_lost_server_starts_before_that_server_exits() {
        let at = inputs();
        let mut lifecycle = Lifecycle::new(false, 0);
        let first = server(&mut lifecycle, &at);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false), "one server at a time");
        lifecycle.serves();
        assert!(!lifecycle.lost(ServerId(99), None, false, &at), "another server");
        assert!(lifecycle.lost(first, Some(Ended::Signal(9)), false, &Inputs { answers: 1, ..at }));
        assert!(!lifecycle.lost(first, None, false, &at), "a server is lost only once");
        let second = server(&mut lifecycle, &at);
        assert_eq!((lifecycle.restarts(), lifecycle.leaving().count()), (1, 1));
        assert_eq!(lifecycle.exited(second), None, "the current server is not leaving");
        assert!(
            lifecycle.exited(first).is_some() && lifecycle.exited(first).is_none(),
            "a server exits only once"
        );
        assert!(!lifecycle.has_leaving());
    }

    #[test]
    fn the_supervisor_gives_up_only_if_the_mount_has_never_served() {
        let at = inputs();
        for has_served in [false, true] {
            let mut lifecycle = Lifecycle::new(has_served, 0);
            let id = server(&mut lifecycle, &at);
            lifecycle.cannot_start(Failure::from(&Error::failed("no store")));
            lifecycle.lost(id, Some(Ended::Code(1)), false, &at);
            let due = lifecycle.start_due(at.now).map_err(|e| e.to_string());
            assert_eq!(due, if has_served { Ok(true) } else { Err("no store".into()) });
        }
        let mut lifecycle = Lifecycle::new(false, 0);
        for _ in 0..3 {
            lifecycle.start_due(at.now).unwrap();
            lifecycle.start_failed(&at);
        }
        let error = lifecycle.start_due(at.now + Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("before it answers"), "{error}");
    }

    #[test]
    fn a_failed_start_is_retried_after_a_delay() {
        let at = inputs();
        let mut lifecycle = Lifecycle::new(true, 0);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(true));
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false), "a server is being started");
        lifecycle.start_failed(&at);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false));
        let later = lifecycle.start_at().expect("a delay");
        assert_eq!(lifecycle.start_due(later).ok(), Some(true));
    }

    #[test]
    fn requests_are_admitted_once_and_in_turn() {
        let at = inputs();
        let mut lifecycle = Lifecycle::new(true, 0);
        let id = server(&mut lifecycle, &at);
        let server = lifecycle.get_mut(id).unwrap();
        assert_eq!(server.admit(1), Admission::New);
        assert_eq!(server.admit(1), Admission::Repeated);
        server.start_job();
        assert_eq!(server.admit(1), Admission::Repeated, "sent again to a new supervisor");
        assert_eq!(server.admit(2), Admission::OutOfTurn);
        assert!(!server.end_job(7), "the job of another request");
        assert!(server.end_job(1) && !server.end_job(1), "one reply");
        assert_eq!(server.admit(2), Admission::New);
    }
}
