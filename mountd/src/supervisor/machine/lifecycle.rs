//! The life of servers: started, serving, lost, exited.
//!
//! At most one server is *current*: it answers the kernel, or starts to. A server that is lost is killed and *leaves*; its
//! successor starts without waiting for its exit. When a leaving server has exited, the kernel is asked to send again
//! what that server had read and not answered: once for each server.

use std::time::Instant;

use stencilfs::control::{Failure, ServerRow};
use stencilfs::error::Error;
use stencilfs::sys::process::{Ended, ProcessId};

use super::backoff::{Backoff, End};
use crate::supervisor::event::{Inputs, ServerId};

/// Whether a server's request is to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The request is new.
    New,
    /// The request was taken already: the server sent it again because it did not know which supervisor had read it.
    Repeated,
    /// The server did not wait for the reply to its last request.
    OutOfTurn,
}

/// What the supervisor knows of one server that runs.
#[derive(Debug)]
pub struct ServerState {
    /// Its number.
    pub id: ServerId,
    /// What `stencil status` shows, and a successor of this supervisor reads.
    pub row: ServerRow,
    /// When it was started, or taken over.
    pub since: Instant,
    /// Count of rings at its start; unknown for a server that was taken over.
    pub born_at_ring: Option<u32>,
    answers_before: u64,
    last_number: u64,
    busy: bool,
}

impl ServerState {
    /// A server that was started, or taken over, at this moment.
    pub fn new(id: ServerId, row: ServerRow, born_at_ring: Option<u32>, inputs: &Inputs) -> ServerState {
        let (since, answers_before) = (inputs.now, inputs.answers);
        ServerState { id, row, since, born_at_ring, answers_before, last_number: 0, busy: false }
    }

    /// Admits a request by its number. Numbers of one server grow.
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

    /// A job finds the reply to the last request.
    pub fn begin_job(&mut self) {
        self.busy = true;
    }

    /// The job of that request has ended. False if the server does not wait for it.
    pub fn end_job(&mut self, number: u64) -> bool {
        number == self.last_number && std::mem::take(&mut self.busy)
    }

    /// True if requests of the kernel were answered since it became current.
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

/// All servers of a mount but a candidate.
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
    /// A mount with no server yet. `has_served`: processes may rely on the mount, so the supervisor never gives it up.
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

    /// A number for a server.
    pub fn next_id(&mut self) -> ServerId {
        let id = ServerId(self.next_id);
        self.next_id += 1;
        id
    }

    /// The current server.
    pub fn current(&self) -> Option<&ServerState> {
        self.current.as_ref()
    }

    /// The current server, if it is that one.
    pub fn get_mut(&mut self, id: ServerId) -> Option<&mut ServerState> {
        self.current.as_mut().filter(|server| server.id == id)
    }

    /// True if the current server answers the kernel.
    pub fn is_serving(&self) -> bool {
        self.current.as_ref().is_some_and(|server| server.row.serving)
    }

    /// Servers that were killed and have not exited.
    pub fn leaving(&self) -> impl Iterator<Item = ProcessId> {
        self.leaving.iter().map(|one| one.process)
    }

    /// True for a server that was killed and has not exited.
    pub fn is_leaving(&self, id: ServerId) -> bool {
        self.leaving.iter().any(|one| one.id == id)
    }

    /// True while a killed server may still answer the kernel.
    pub fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Ends of earlier servers.
    pub fn backoff(&self) -> &Backoff {
        &self.backoff
    }

    /// Servers that were started in place of others.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// When the next server is to start, if it waits.
    pub fn start_at(&self) -> Option<Instant> {
        self.start_at
    }

    /// Whether a server is to be started now.
    ///
    /// # Errors
    /// Returns the reason to give up: the mount has never served, and its servers cannot start.
    pub fn start_due(&mut self, now: Instant) -> Result<bool, Error> {
        if self.current.is_some() || self.starting || self.start_at.is_some_and(|at| now < at) {
            return Ok(false);
        }
        if !self.has_served && (self.failure.is_some() || self.backoff.is_persistent()) {
            return Err(self.failure.take().map_or_else(
                || {
                    Error::failed("the server exits before it answers the kernel")
                        .remedy("run stencil mount -f with STENCIL_LOG=debug to see why")
                },
                Failure::into_error,
            ));
        }
        self.starting = true;
        Ok(true)
    }

    /// A server was started, or taken over: it is current.
    pub fn started(&mut self, server: ServerState) {
        (self.starting, self.start_at) = (false, None);
        self.backoff.note_started();
        self.current = Some(server);
    }

    /// No server could be started.
    pub fn start_failed(&mut self, inputs: &Inputs) {
        self.starting = false;
        self.start_at = Some(inputs.now + self.backoff.note_failed_start(inputs.wall));
    }

    /// The current server answers the kernel.
    pub fn serves(&mut self) {
        if let Some(server) = &mut self.current {
            server.row.serving = true;
        }
        (self.failure, self.start_at, self.has_served) = (None, None, true);
    }

    /// The server says why it cannot start.
    pub fn cannot_start(&mut self, failure: Failure) {
        log::error!("the server cannot start: {}", failure.clone().into_error());
        self.failure = Some(failure);
    }

    /// The current server has died or was given up. True if it was that one; its successor is due.
    pub fn lost(&mut self, id: ServerId, how: Option<Ended>, oom: bool, inputs: &Inputs) -> bool {
        let Some(server) = self.current.take_if(|server| server.id == id) else { return false };
        let end = End {
            pid: server.row.process.pid,
            how,
            lived: inputs.now.saturating_duration_since(server.since),
            serving: server.row.serving,
            answered: server.has_answered(inputs.answers),
            oom,
        };
        self.start_at = self.backoff.note(end, inputs.wall).map(|pause| inputs.now + pause);
        self.restarts += 1;
        self.leave(id, server.row.process);
        true
    }

    /// Another server becomes current; returns the one before.
    pub fn replace(&mut self, mut server: ServerState) -> Option<ServerState> {
        server.row.serving = true;
        self.restarts += 1;
        self.has_served = true;
        (self.failure, self.start_at) = (None, None);
        self.current.replace(server)
    }

    /// A killed server leaves.
    pub fn leave(&mut self, id: ServerId, process: ProcessId) {
        self.leaving.push(Leaving { id, process });
    }

    /// A process has exited. Returns it if it was a leaving server.
    pub fn exited(&mut self, id: ServerId) -> Option<ProcessId> {
        let at = self.leaving.iter().position(|one| one.id == id)?;
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
    fn a_lost_server_leaves_until_it_exits_and_its_successor_is_due_at_once() {
        let at = inputs();
        let mut lifecycle = Lifecycle::new(false, 0);
        let first = server(&mut lifecycle, &at);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false), "one server at a time");
        lifecycle.serves();
        assert!(!lifecycle.lost(ServerId(99), None, false, &at), "another server");
        assert!(lifecycle.lost(first, Some(Ended::Signal(9)), false, &Inputs { answers: 1, ..at }));
        assert!(!lifecycle.lost(first, None, false, &at), "a server is lost once");
        let second = server(&mut lifecycle, &at);
        assert_eq!((lifecycle.restarts(), lifecycle.leaving().count()), (1, 1));
        assert_eq!(lifecycle.exited(second), None, "the current server is inspected before it leaves");
        assert!(lifecycle.exited(first).is_some() && lifecycle.exited(first).is_none(), "one exit each");
        assert!(!lifecycle.has_leaving());
    }

    #[test]
    fn a_mount_that_never_served_is_given_up_and_one_that_served_is_not() {
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
    fn a_failed_start_is_tried_again_after_a_pause() {
        let at = inputs();
        let mut lifecycle = Lifecycle::new(true, 0);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(true));
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false), "a start is under way");
        lifecycle.start_failed(&at);
        assert_eq!(lifecycle.start_due(at.now).ok(), Some(false));
        let later = lifecycle.start_at().expect("a pause");
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
        server.begin_job();
        assert_eq!(server.admit(1), Admission::Repeated, "sent again to a new supervisor");
        assert_eq!(server.admit(2), Admission::OutOfTurn);
        assert!(!server.end_job(7), "the job of another request");
        assert!(server.end_job(1) && !server.end_job(1), "one reply");
        assert_eq!(server.admit(2), Admission::New);
    }
}
