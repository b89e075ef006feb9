//! Sends requests to supervisors.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::listing::is_locked;
use super::registry::{CONTROL_SOCKET, Mount, Record, open_record, socket_path};
use super::status::MountStatus;
use crate::control::protocol::messages::{Request, Response, UnmountMode};
use crate::control::protocol::snapshot::Snapshot;
use crate::control::protocol::wire::Channel;
use crate::error::{Code, Error, Result};
use crate::sys::probe;
use crate::sys::socket::peer::Peer;
use crate::units::to_usize;

/// Longest wait for the reply of a supervisor.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a request is retried on a reset connection: a supervisor that replaces itself drops its connections.
const RETRY_WINDOW: Duration = Duration::from_secs(2);

/// Longest wait for a connection: the supervisor is stuck, or its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// Largest snapshot, in bytes: the size of the ledger.
const MAX_SNAPSHOT: u64 = 2 * crate::control::ledger::HALF_BYTES;

impl Mount {
    /// Returns the status of the mount.
    ///
    /// # Errors
    /// Returns an error if the supervisor does not reply.
    pub fn status(&self) -> Result<MountStatus> {
        Ok(MountStatus::new(self.snapshot()?, self))
    }

    /// Returns the state that the supervisor holds.
    ///
    /// # Errors
    /// Returns an error if the supervisor does not reply, or the reply cannot be parsed.
    pub fn snapshot(&self) -> Result<Snapshot> {
        match ask(&self.dir, &Request::Snapshot)? {
            (Response::Snapshot, Some(file)) => read_snapshot(&File::from(file)).map_err(|e| {
                Error::failed("cannot parse the supervisor's snapshot").because(e).hint(OTHER_VERSION)
            }),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

fn read_snapshot(file: &File) -> io::Result<Snapshot> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > MAX_SNAPSHOT {
        let reason = format!("expected a memory file of at most {MAX_SNAPSHOT} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let mut text = vec![0; to_usize(metadata.len())];
    file.read_exact_at(&mut text, 0)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Asks the supervisor to unmount.
///
/// # Errors
/// Returns [`Code::InUse`] if the mount is in use, and an error if the supervisor does not reply.
pub fn request_unmount(mount: &Mount, mode: UnmountMode) -> Result<()> {
    done(ask(&mount.dir, &Request::Unmount { mode })?)
}

/// Makes the server close the files that were deleted from the store, and waits until they are closed.
///
/// # Errors
/// Returns an error if the supervisor does not reply.
pub fn request_refresh(mount: &Mount) -> Result<()> {
    match ask(&mount.dir, &Request::Refresh)? {
        (Response::Settled { .. }, _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

/// Makes the supervisor start a new server from `program` and, with `supervisor`, execute the new supervisor too.
/// Returns when the new server serves the kernel.
///
/// # Errors
/// Returns the reason why the new process does not serve; the old process then continues.
pub fn request_restart(mount: &Mount, program: BorrowedFd<'_>, supervisor: bool) -> Result<()> {
    done(ask_with(&mount.dir, &Request::Restart { supervisor }, Some(program))?)
}

fn done(reply: (Response, Option<OwnedFd>)) -> Result<()> {
    match reply {
        (Response::Done, _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

pub(in crate::control) const SUPERVISOR_LOST: &str = "see the log in the directory of that socket; \
     'stencil status' reports a stuck or dead supervisor and the remedy";

const OTHER_VERSION: &str = "install stencil and stencil-mountd from one build, because their \
     versions differ, then run 'stencil restart'";

pub(in crate::control) fn unexpected(response: &Response) -> Error {
    log::debug!("unexpected reply of the supervisor: {response:?}");
    Error::failed("the supervisor sent an unexpected reply").hint(OTHER_VERSION)
}

/// Sends one request to the supervisor whose record is in `dir`. A [`Response::Failed`] becomes the error that it
/// carries.
///
/// # Errors
/// Returns an error if there is no supervisor, if the supervisor does not reply within 30 seconds, or if it refuses.
pub fn ask(dir: &Path, request: &Request) -> Result<(Response, Option<OwnedFd>)> {
    let until = Instant::now() + RETRY_WINDOW;
    loop {
        match ask_with(dir, request, None) {
            Err(error) if error.errno() == Some(libc::ECONNRESET) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            reply => return reply,
        }
    }
}

fn ask_with(
    dir: &Path,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(Response, Option<OwnedFd>)> {
    let path = dir.join(CONTROL_SOCKET);
    let lost = |e| Error::io("cannot reach the supervisor of the mount", &path, e).hint(SUPERVISOR_LOST);
    let channel = reach(dir).map_err(lost)?;
    channel.set_timeout(REPLY_TIMEOUT).map_err(lost)?;
    channel.send(request, fd).map_err(lost)?;
    match channel.receive::<Response>().map_err(lost)? {
        Some((Response::Failed(failure), _)) => Err(failure.into_error()),
        Some(reply) => Ok(reply),
        None => Err(lost(io::Error::from_raw_os_error(libc::ECONNRESET))),
    }
}

/// Connects to the supervisor whose record is in `dir`, and checks that the listening process is that supervisor.
///
/// # Errors
/// Returns the error of the socket, or `ConnectionReset` if another process listens, for example while another
/// supervisor takes over the mount.
pub(in crate::control) fn reach(dir: &Path) -> io::Result<Channel> {
    let folder = open_record(dir).map_err(|e| match e.code() {
        Code::NotFound => io::ErrorKind::NotFound.into(),
        _ => io::Error::other(e.to_string()),
    })?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let channel = Channel::new(socket);
    channel.set_timeout(CONNECT_TIMEOUT)?;
    // `sun_path` holds 107 bytes: the path goes through the descriptor of the directory.
    connect(&channel, &SocketAddrUnix::new(socket_path(&folder))?)?;
    let peer = Peer::of(&channel)?;
    let record = Record::read(&folder)?.ok_or(io::ErrorKind::ConnectionReset)?;
    // A PID of another PID namespace means nothing here.
    let foreign = record.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace());
    // A supervisor that takes over holds the lock before its record is written (its file system may be full).
    let unrecorded = || !record.supervisor().is_alive() && is_locked(&folder);
    let is_supervisor = foreign || peer.pid == Some(record.supervisor_pid) || unrecorded();
    match is_supervisor && peer.uid == folder.own_metadata()?.st_uid {
        true => Ok(channel),
        false => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}
