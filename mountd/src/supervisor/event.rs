//! Events for the supervisor's state machine, and the actions that the machine returns.
//!
//! [`Machine::handle`](super::machine::Machine::handle) takes one event and returns actions, which the event loop
//! executes in order. If the outcome of an action matters, the documentation of the action names the event that reports
//! the outcome. This event is handled before any other, unless it reports the end of a job or the exit of a process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use stencilfs::control::{Failure, FileKey, Request, Response, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::store::Proof;
use stencilfs::sys::process::{Ended, ProcessId};
use stencilfs::units::Bytes;

use super::kernel_decode::Opened;
use super::program::Program;
use crate::protocol::{Numbered, ServerReply, ServerRequest};

/// The number of a server. Unique during the life of one supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(pub u64);

/// The number of a connection to the control socket. Unique during the life of one supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallerId(pub u64);

/// The number of a job: a child process for an operation that may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// Values that the event loop reads before each event, as the machine has no clock.
#[derive(Debug, Clone, Copy)]
pub struct Inputs {
    /// The monotonic clock.
    pub now: Instant,
    /// The wall clock.
    pub wall: SystemTime,
    /// Requests of the kernel that servers have answered since the mount was made.
    pub answers: u64,
}

/// The purpose of a new server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Replaces a server that has died, or is the first server of the mount.
    Replacement,
    /// Runs beside the current server, and replaces it when the candidate is ready to answer the kernel.
    Candidate,
}

/// A server that was just started.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    /// The number from [`Action::StartServer`].
    pub id: ServerId,
    /// The process.
    pub process: ProcessId,
}

/// The result of a job.
#[derive(Debug)]
pub enum JobResult {
    /// The job is done; the descriptor of the file, for a job that creates or opens a file.
    Done(Option<OwnedFd>),
    /// The file that the kernel decodes, for a job that freezes a backing for kernel decode.
    Decoded(Opened),
    /// Indices of the keys whose files no process uses.
    Unused(Vec<u64>),
    /// The operation failed, or the job died or timed out.
    Failed(Error),
}

/// An event for the machine.
#[derive(Debug)]
pub enum Event {
    /// Time has passed, possibly beyond a deadline.
    Tick,
    /// A termination signal arrived.
    Signal {
        /// True if the signal aborts a mount that is already draining.
        may_abort: bool,
    },
    /// A caller of the control socket sent a request, with the descriptor of a program if the request needs one.
    Request(CallerId, Request, Option<OwnedFd>),
    /// A caller closed its connection.
    CallerGone(CallerId),
    /// A server sent a request, with a descriptor if the request has one.
    Message(ServerId, Numbered<ServerRequest>, Option<OwnedFd>),
    /// The socket of a server was closed, or carried an invalid message.
    LinkClosed(ServerId),
    /// A server process has exited.
    Exited(ServerId),
    /// Outcome of [`Action::EndServer`].
    ServerEnded {
        /// The server.
        id: ServerId,
        /// Exit status; `None` for a process that is not a child or still runs.
        status: Option<Ended>,
        /// True if the OOM killer killed a process in the control group of the server.
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
    /// Outcome of [`Action::StartJob`]; immediately if the job cannot be started.
    JobEnded(JobId, JobResult),
    /// Outcome of [`Action::WriteRecord`].
    RecordWritten(Result<()>),
    /// [`Action::BecomeProgram`] failed; this supervisor continues.
    ExecFailed(CallerId, Error),
    /// The FUSE connection is closed: the mount has ended.
    MountOver,
}

/// The operation of a job.
#[derive(Debug)]
pub enum Task {
    /// Creates the empty file of a backing.
    CreateBacking {
        /// Length of the file in bytes.
        size: Bytes,
        /// Space that the data will occupy.
        data: Bytes,
    },
    /// Makes the file of a backing immutable; the machine holds the file.
    FreezeBacking {
        /// The backed file.
        key: FileKey,
        /// Space that was reserved.
        reserved: Bytes,
    },
    /// Remembers in the store when a file was verified for kernel decode; `None` forgets the verification.
    Remember(FileKey, Option<(Proof, u64)>),
    /// Finds the keys whose files no process uses through a backing.
    FindUnused(Vec<FileKey>),
    /// Unmounts.
    Unmount(UnmountMode),
    /// Closes files that no other process has open. May take long, because the file system frees their space.
    CloseFiles(Vec<OwnedFd>),
    /// Runs `check` of a new supervisor program, which checks whether the program can read the ledger.
    CheckProgram(Arc<Program>),
}

/// An action that the event loop executes for the machine.
#[derive(Debug)]
pub enum Action {
    /// Starts a server from a program. Outcome: [`Event::ServerStarted`].
    StartServer(ServerId, Role, Arc<Program>),
    /// Kills a server and reads its exit status, without waiting for the exit. Outcome: [`Event::ServerEnded`], and
    /// [`Event::Exited`] when the process exits.
    EndServer(ServerId),
    /// Kills a server whose exit status is not needed. Outcome: [`Event::Exited`] when the process exits.
    KillServer(ServerId),
    /// Passes the in-flight table of the current server to the watchdog; `None` if there is no current server.
    Watch(Option<OwnedFd>),
    /// Makes the kernel send all unanswered requests again (`FUSE_NOTIFY_RESEND`).
    Resend,
    /// Replies to a request of a server.
    Reply(ServerId, Numbered<ServerReply>, Option<OwnedFd>),
    /// Sends the INIT reply to the kernel. Outcome: [`Event::InitReplyWritten`].
    WriteInitReply {
        /// The server whose handshake it is.
        id: ServerId,
        /// The number of its request.
        number: u64,
        /// The complete packet.
        init_reply: Vec<u8>,
        /// True if the kernel had no reply before.
        is_first: bool,
    },
    /// Registers a backing on the FUSE connection; the machine holds the file. Outcome: [`Event::BackingRegistered`].
    RegisterBacking(ServerId, u64, FileKey),
    /// Closes backings of the FUSE connection by their ids.
    CloseBackings(Vec<u32>),
    /// Starts a job. Outcome: [`Event::JobEnded`].
    StartJob(JobId, Task),
    /// Writes the mount state to the ledger.
    Save,
    /// Writes the record of the mount. Outcome: [`Event::RecordWritten`].
    WriteRecord,
    /// Increments the ring in the counters page: the server then reads the list of condemned templates from the ledger.
    Ring,
    /// Reports to the service manager, and to the process that started the mount, that the mount is served.
    Announce,
    /// Sends new backings to the descriptor store of the service manager.
    StoreBackings,
    /// Removes backings from the descriptor store of the service manager, by their ids.
    ForgetBackings(Vec<u32>),
    /// Reports to the service manager that the mount is ending.
    AnnounceStop,
    /// Stops or kills the process of a thread that needs a damaged block.
    StopReader {
        /// The thread.
        thread: u32,
        /// The file.
        key: FileKey,
        /// Offset of the READ in the file.
        offset: u64,
        /// When a server read the request, in time since boot.
        arrived: Duration,
    },
    /// Counts a server that the watchdog replaced.
    CountReplaced,
    /// Responds to a caller of the control socket.
    Respond(CallerId, Result<Response>, Option<OwnedFd>),
    /// Responds to a caller with the mount state.
    RespondState(CallerId),
    /// Responds to a caller with those of the given inode numbers that the kernel has cached.
    RespondInodes(CallerId, Vec<u64>),
    /// Sets whether a caller must stay connected while it has no pending request.
    KeepCaller(CallerId, bool),
    /// Executes another program in this process. The event loop continues only on failure: [`Event::ExecFailed`].
    BecomeProgram(Arc<Program>, CallerId),
    /// Ends the supervisor with an error, because no server of this mount has ever answered the kernel.
    GiveUp(Error),
}

impl Action {
    /// Returns the reply [`ServerReply::Done`] to a request of a server.
    pub fn done(server: ServerId, number: u64) -> Action {
        Action::reply(server, number, Ok(ServerReply::Done), None)
    }

    /// Returns a reply to a request of a server; an error becomes [`ServerReply::Refused`].
    pub fn reply(server: ServerId, number: u64, reply: Result<ServerReply>, file: Option<OwnedFd>) -> Action {
        let body = reply.unwrap_or_else(|e| ServerReply::Refused(Failure::from(&e)));
        Action::Reply(server, Numbered { number, body }, file)
    }

    /// Returns the action that reports the result of a request to its caller; `None` if the request has no caller.
    pub fn answer(caller: Option<CallerId>, result: Result<()>) -> Option<Action> {
        Some(Action::Respond(caller?, result.map(|()| Response::Done), None))
    }
}
