//! Requests of servers, and the checks before they are executed.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use stencilfs::control::{CONTROL_VERSION, Failure, FileKey, Received};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::units::Bytes;

use crate::jobs::{self, Job, Outcome};
use crate::kept;
use crate::link::{MAX_KEYS, NumberedReply, NumberedRequest, ServerRequest, SupervisorReply};
use crate::supervisor::{Purpose, Server, Supervisor};

/// Longest time for creating or freezing a file: the file system may block.
const FILE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for the search for processes that use backings.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(2);

/// A request whose reply depends on a job.
#[derive(Debug)]
pub struct Pending {
    number: u64,
    work: Work,
}

/// The work of the job.
#[derive(Debug)]
enum Work {
    /// Create the file of a backing.
    Create(FileKey),
    /// Freeze a backing.
    Freeze(FileKey),
    /// Find out which of these backings are unused.
    FindUnused(Vec<FileKey>),
}

impl Supervisor {
    /// Receives one request of the server or of the candidate.
    pub(crate) fn receive(&mut self, candidate: bool) {
        let received = match candidate {
            true => self.candidate.as_ref().map(|c| c.server.link.try_receive::<NumberedRequest>()),
            false => self.server.as_ref().map(|s| s.link.try_receive::<NumberedRequest>()),
        };
        match received {
            Some(Ok(Received::Message(request, fd))) => self.handle_request(candidate, request, fd),
            Some(Ok(Received::Nothing)) | None => {}
            Some(Ok(Received::Closed) | Err(_)) if candidate => {
                self.candidate_failed("the new server exited")
            }
            Some(Ok(Received::Closed) | Err(_)) => self.server_died(),
        }
    }

    fn sender(&mut self, candidate: bool) -> Option<&mut Server> {
        if candidate { self.candidate.as_mut().map(|c| &mut c.server) } else { self.server.as_mut() }
    }

    fn handle_request(&mut self, candidate: bool, request: NumberedRequest, fd: Option<OwnedFd>) {
        let number = request.number;
        let Some(server) = self.sender(candidate) else { return };
        if number <= server.last_request {
            // Repeated: the server does not know whether the previous supervisor or this one has received it.
            return;
        }
        if server.busy {
            log::error!("protocol error: the server sends requests without waiting for replies");
            return if candidate { self.candidate_failed("protocol error") } else { self.server_died() };
        }
        server.last_request = number;
        let answer = match request.ask {
            ServerRequest::Handshake { control_version, version, lacks, reply } => Some(
                self.handshake(candidate, control_version, (version, lacks), reply, fd)
                    .map(|()| SupervisorReply::Done),
            ),
            ServerRequest::Serving if candidate => {
                self.promote_candidate();
                return self.reply(false, number, Ok(SupervisorReply::Done), None);
            }
            ServerRequest::GiveUp { failure } => {
                self.record_failure(candidate, failure);
                Some(Ok(SupervisorReply::Done))
            }
            _ if candidate => Some(Err(Error::failed("the server does not serve yet"))),
            ServerRequest::Serving => {
                if let Some(server) = &mut self.server {
                    server.row.serving = true;
                }
                (self.failure, self.start_at) = (None, None);
                self.announce();
                Some(Ok(SupervisorReply::Done))
            }
            ServerRequest::Reserve { key, size, bytes } => self.reserve(number, key, Bytes::new(size), bytes),
            ServerRequest::Freeze { key } => self.freeze(number, key),
            ServerRequest::Evict { keys } => self.evict(number, keys),
            ServerRequest::Register { key, identity } => {
                let id = self.backings.register(&self.state.fuse, &key, identity);
                if id.is_ok() {
                    self.save();
                    self.notify.store_backings(&self.backings);
                }
                Some(id.map(SupervisorReply::Backing))
            }
            ServerRequest::Decode { key, why } => {
                let noted = self.backings.decode(key, why);
                self.save();
                Some(noted.map(|()| SupervisorReply::Done))
            }
            ServerRequest::GiveBack { key } => {
                self.to_close.extend(self.backings.give_back(&key));
                Some(Ok(SupervisorReply::Done))
            }
            ServerRequest::Condemned { ring, grace_ms } => {
                self.acted(ring, grace_ms);
                Some(Ok(SupervisorReply::Done))
            }
            ServerRequest::Progress { key, bytes } => {
                self.backings.progress(&key, bytes);
                Some(Ok(SupervisorReply::Done))
            }
        };
        if let Some(answer) = answer {
            self.reply(candidate, number, answer, None);
        }
    }

    fn record_failure(&mut self, candidate: bool, failure: Failure) {
        match &mut self.candidate {
            Some(new) if candidate => new.failure = Some(failure),
            _ => {
                log::error!("the server cannot start: {}", failure.clone().into_error());
                self.failure = Some(failure);
            }
        }
    }

    // These three return `None` if the reply is already sent, or a job will provide it.

    fn reserve(
        &mut self,
        number: u64,
        key: FileKey,
        size: Bytes,
        bytes: u64,
    ) -> Option<Result<SupervisorReply>> {
        match self.backings.reserve(&self.state.chosen, &key, bytes) {
            Ok(SupervisorReply::Room) => {
                let cache = self.state.chosen.cache.clone();
                let job = Job::start(FILE_TIMEOUT, &self.state.private_fds(&self.callers), || {
                    jobs::make_backing(&cache, size, Bytes::new(bytes)).map(Some)
                });
                self.await_job(job, Pending { number, work: Work::Create(key) })
            }
            Ok(SupervisorReply::Backing(id)) => match self.backings.copy(&key) {
                Ok(file) => {
                    self.reply(false, number, Ok(SupervisorReply::Backing(id)), Some(file));
                    None
                }
                Err(error) => Some(Err(error)),
            },
            other => Some(other),
        }
    }

    fn freeze(&mut self, number: u64, key: FileKey) -> Option<Result<SupervisorReply>> {
        let filled = self.backings.filled(&key);
        if let Ok(None) = filled {
            return Some(Ok(SupervisorReply::Done));
        }
        let job = filled.and_then(|filled| {
            let cache = &self.state.chosen.cache;
            Job::start(FILE_TIMEOUT, &self.state.private_fds(&self.callers), || {
                filled.map_or(Ok(()), |(file, room)| jobs::freeze_backing(cache, file, room)).map(|()| None)
            })
        });
        self.await_job(job, Pending { number, work: Work::Freeze(key) })
    }

    fn evict(&mut self, number: u64, mut keys: Vec<FileKey>) -> Option<Result<SupervisorReply>> {
        if self.candidate.is_some() {
            // The candidate was started with the current backings: they stay until it serves.
            return Some(Ok(SupervisorReply::Evicted(Vec::new())));
        }
        keys.truncate(MAX_KEYS);
        let (store, device) = (self.state.options.store.clone(), self.state.device);
        let job = Job::start_with_outcome(SEARCH_TIMEOUT * 2, &self.state.private_fds(&self.callers), || {
            Ok((Outcome::Unused(jobs::unused(&store, device, &keys, SEARCH_TIMEOUT)?), None))
        });
        self.await_job(job, Pending { number, work: Work::FindUnused(keys) })
    }

    fn await_job(&mut self, job: Result<Job>, pending: Pending) -> Option<Result<SupervisorReply>> {
        let server = self.server.as_mut().map_or(0, |s| {
            s.busy = true;
            s.row.process.pid
        });
        self.add_job(job, Purpose::ServerRequest(server, pending));
        None
    }

    /// Replies to a request whose job has ended, if the server that sent it is still the current one.
    pub(crate) fn job_ended(&mut self, server: u32, pending: Pending, outcome: Outcome, fd: Option<OwnedFd>) {
        match &mut self.server {
            Some(current) if current.row.process.pid == server => current.busy = false,
            _ => return,
        }
        let refused = |outcome| match outcome {
            Outcome::Failed(failure) => failure.into_error(),
            other => Error::failed(format!("unexpected result of a job: {other:?}")),
        };
        let Pending { number, work } = pending;
        let (answer, file) = match (work, outcome, fd) {
            (Work::Create(key), Outcome::Done, Some(file)) => {
                match self.backings.made(&key, file).and_then(kept::duplicate) {
                    Ok(file) => (Ok(SupervisorReply::Room), Some(file)),
                    Err(error) => (Err(error), None),
                }
            }
            (Work::Freeze(key), Outcome::Done, _) => {
                self.backings.frozen(&key);
                (Ok(SupervisorReply::Done), None)
            }
            (Work::FindUnused(keys), Outcome::Unused(indices), _) => {
                let mut unused: Vec<FileKey> =
                    indices.into_iter().filter_map(|index| keys.get(index as usize).cloned()).collect();
                if self.candidate.is_some() {
                    unused.clear();
                }
                self.notify.forget_backings(&self.backings, &unused);
                self.backings.close(&self.state.fuse, &unused);
                (Ok(SupervisorReply::Evicted(unused)), None)
            }
            (_, outcome, _) => (Err(refused(outcome)), None),
        };
        if answer.is_ok() {
            self.save();
        }
        self.reply(false, number, answer, file);
    }

    /// Sends a reply. A server that does not accept it is replaced; the death of a candidate is noticed elsewhere.
    fn reply(&mut self, candidate: bool, number: u64, answer: Result<SupervisorReply>, fd: Option<OwnedFd>) {
        let answer = answer.unwrap_or_else(|e| SupervisorReply::Refused(Failure::from(&e)));
        let Some(server) = self.sender(candidate) else { return };
        match server.link.try_send(&NumberedReply { number, answer }, fd.as_ref().map(AsFd::as_fd)) {
            Err(e) if !candidate => {
                log::error!("cannot send a reply to the server: {e}");
                self.server_died();
            }
            _ => {}
        }
    }

    /// Handles the handshake of a server. The first reply to INIT goes to the kernel; the kernel accepts no second one,
    /// so the replies of later servers must be the same.
    fn handshake(
        &mut self,
        candidate: bool,
        control_version: u32,
        (version, lacks): (String, Vec<String>),
        reply: Vec<u8>,
        table: Option<OwnedFd>,
    ) -> Result<()> {
        if control_version != CONTROL_VERSION {
            return Err(Error::failed(format!(
                "the server uses protocol version {control_version}, expected {CONTROL_VERSION}"
            )));
        }
        let first = self.state.reply.is_none();
        if self.state.reply.as_ref().is_some_and(|known| *known != reply) {
            return Err(Error::failed("this server's reply to INIT differs from the first server's")
                .remedy("unmount and mount again with the new version"));
        }
        if first {
            // Saved before the kernel gets the reply: a supervisor that takes over must not send another one.
            self.state.reply = Some(reply.clone());
            self.save();
        }
        if !candidate {
            // A saved reply may not have reached the kernel. If it has, the kernel returns ENOENT for the repeated one.
            match fuse_dev::write_reply(&self.state.fuse, &reply) {
                Err(e) if first => {
                    self.state.reply = None;
                    self.save();
                    return Err(Error::failed("the kernel rejects the reply to INIT").because(e));
                }
                Err(e) if e.raw_os_error() != Some(libc::ENOENT) => {
                    return Err(Error::failed("cannot write the reply to INIT").because(e));
                }
                _ => {}
            }
        }
        match (&mut self.candidate, &mut self.server) {
            (Some(new), _) if candidate => {
                (new.server.row.version, new.server.row.lacks) = (version, lacks);
                new.table = table;
            }
            (_, Some(server)) => {
                (server.row.version, server.row.lacks) = (version, lacks);
                self.watchdog.watch(table);
            }
            _ => {}
        }
        self.save();
        Ok(())
    }
}
