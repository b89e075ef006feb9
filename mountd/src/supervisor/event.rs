//! Events that the supervisor's state machines take, and actions that they return.
//!
//! [`Machine::handle`](super::machine::Machine::handle) takes one event and returns actions, to be executed in their
//! order. An action whose outcome matters names the event by which the outcome comes back; that event is handled before
//! any other.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use stencilfs::control::{Failure, FileKey, Request, Response, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::{Ended, ProcessId};
use stencilfs::units::Bytes;

use super::program::Program;
use crate::protocol::{Numbered, ServerReply, ServerRequest};

/// A server, in the life of one supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(pub u64);

/// A connection to the control socket, in the life of one supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallerId(pub u64);

/// A job: a child process that does what may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What the event loop reads before each event.
#[derive(Debug, Clone, Copy)]
pub struct Inputs {
    /// The monotonic clock.
    pub now: Instant,
    /// The wall clock.
    pub wall: SystemTime,
    /// Requests of the kernel that servers have answered since the mount was made.
    pub answers: u64,
}

/// What a server is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To serve in place of a server that has died.
    Replacement,
    /// To replace a server that serves, once the candidate answers the kernel.
    Candidate,
}

/// A server that was just started.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// The number that [`Action::StartServer`] gave it.
    pub id: ServerId,
    /// The process.
    pub process: ProcessId,
}

/// How a job ended.
#[derive(Debug)]
pub enum JobResult {
    /// The work is done; what it made comes as a descriptor.
    Done(Option<OwnedFd>),
    /// Indices of keys that no process uses.
    Unused(Vec<u64>),
    /// The work failed, or the job died or exceeded its time limit.
    Failed(Error),
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// A signal asks for the end of the mount.
    Signal {
        /// True if a signal of this kind ends a mount that drains already.
        forces: bool,
    },
    /// A caller of the control socket sent a request, with a program if the request names one.
    Request(CallerId, Request, Option<OwnedFd>),
    /// A caller closed its connection.
    CallerGone(CallerId),
    /// A server sent a request, with a descriptor if the request has one.
    Message(ServerId, Numbered<ServerRequest>, Option<OwnedFd>),
    /// The socket of a server is closed or carries what is no message.
    LinkClosed(ServerId),
    /// A server process has exited.
    Exited(ServerId),
    /// Outcome of [`Action::EndServer`].
    ServerEnded {
        /// The server.
        id: ServerId,
        /// Exit status; unknown for a process that is no child or still runs.
        how: Option<Ended>,
        /// True if the OOM killer struck in the server's control group.
        oom: bool,
    },
    /// Outcome of [`Action::StartServer`].
    ServerStarted(Role, Result<Started>),
    /// Outcome of [`Action::WriteInitReply`].
    InitReplyWritten {
        /// The server whose handshake it is.
        id: ServerId,
        /// The number of its request.
        number: u64,
        /// True if the kernel had no reply before.
        is_first: bool,
        /// The outcome.
        result: io::Result<()>,
    },
    /// Outcome of [`Action::RegisterBacking`].
    BackingRegistered(ServerId, u64, FileKey, io::Result<u32>),
    /// Outcome of [`Action::StartJob`]: at once if the job cannot be started.
    JobEnded(JobId, JobResult),
    /// Outcome of [`Action::WriteRecord`].
    RecordWritten(Result<()>),
    /// [`Action::BecomeProgram`] failed: this supervisor goes on.
    ExecFailed(CallerId, Error),
    /// The FUSE connection is over: the mount has ended.
    MountOver,
}

/// What a job does.
#[derive(Debug)]
pub enum Task {
    /// Creates the empty file of a backing.
    CreateBacking {
        /// Length of the file.
        size: Bytes,
        /// Room that its data will take.
        data: Bytes,
    },
    /// Makes the file of a backing immutable; the machine holds the file.
    FreezeBacking {
        /// The backed file.
        key: FileKey,
        /// Room that was reserved.
        reserved: Bytes,
    },
    /// Finds the keys whose inodes no process uses.
    FindUnused(Vec<FileKey>),
    /// Detaches the mount.
    Unmount(UnmountMode),
    /// Closes files that no other process has open; freeing their room may take long.
    CloseFiles(Vec<OwnedFd>),
    /// Has a program check whether it can continue from the ledger.
    CheckProgram(Arc<Program>),
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Start a server from a program. Outcome: [`Event::ServerStarted`].
    StartServer(ServerId, Role, Arc<Program>),
    /// Kill a server and find out how it ended, without waiting for its end. Outcome: [`Event::ServerEnded`]; its exit
    /// comes as [`Event::Exited`].
    EndServer(ServerId),
    /// Kill a server whose end matters to nobody; its exit comes as [`Event::Exited`].
    KillServer(ServerId),
    /// Watch the in-flight table of this server, or none.
    Watch(Option<OwnedFd>),
    /// Have the kernel send unanswered requests again (`FUSE_NOTIFY_RESEND`).
    Resend,
    /// Reply to a request of a server.
    Reply(ServerId, Numbered<ServerReply>, Option<OwnedFd>),
    /// Give the kernel the INIT reply. Outcome: [`Event::InitReplyWritten`].
    WriteInitReply {
        /// The server whose handshake it is.
        id: ServerId,
        /// The number of its request.
        number: u64,
        /// The whole packet.
        init_reply: Vec<u8>,
        /// True if the kernel had no reply before.
        is_first: bool,
    },
    /// Register a backing with the FUSE connection; the machine holds the file. Outcome: [`Event::BackingRegistered`].
    RegisterBacking(ServerId, u64, FileKey),
    /// Close backings of the FUSE connection by their ids.
    CloseBackings(Vec<u32>),
    /// Start a job. Outcome: [`Event::JobEnded`].
    StartJob(JobId, Task),
    /// Write the mount state to the ledger.
    Save,
    /// Write the record of the mount. Outcome: [`Event::RecordWritten`].
    WriteRecord,
    /// Ring the bell: the server reads the list of condemned templates again.
    Ring,
    /// Tell the service manager, and the process that started the mount, that it serves.
    Announce,
    /// Hand new backings to the service manager's descriptor store.
    StoreBackings,
    /// Take backings out of the service manager's descriptor store, by their ids.
    ForgetBackings(Vec<u32>),
    /// Tell the service manager that the mount ends.
    AnnounceStop,
    /// Count a server that the watchdog replaced.
    CountReplaced,
    /// Reply to a caller of the control socket.
    Respond(CallerId, Result<Response>, Option<OwnedFd>),
    /// Reply to a caller with the mount state.
    RespondState(CallerId),
    /// Ask the kernel which of these inodes it has, and reply to the caller.
    RespondInodes(CallerId, Vec<u64>),
    /// Keep a caller's connection while it waits for nothing, or allow a newer caller to take its slot.
    KeepCaller(CallerId, bool),
    /// Become another program, with all descriptors. Returns only on failure: [`Event::ExecFailed`].
    BecomeProgram(Arc<Program>, CallerId),
    /// End the supervisor: no server of this mount has ever answered.
    GiveUp(Error),
}

impl Action {
    /// A reply that carries out a request.
    pub fn done(server: ServerId, number: u64) -> Action {
        Action::reply(server, number, Ok(ServerReply::Done), None)
    }

    /// A reply, or the refusal that stands for an error.
    pub fn reply(server: ServerId, number: u64, reply: Result<ServerReply>, file: Option<OwnedFd>) -> Action {
        let body = reply.unwrap_or_else(|e| ServerReply::Refused(Failure::from(&e)));
        Action::Reply(server, Numbered { number, body }, file)
    }

    /// Reply to a caller that its request was carried out, or why not; nothing for a request of no caller.
    pub fn answer(caller: Option<CallerId>, result: Result<()>) -> Option<Action> {
        Some(Action::Respond(caller?, result.map(|()| Response::Done), None))
    }
}
