//! Asks supervisors.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::listing::is_locked;
use super::protocol::{Request, Response, UnmountMode};
use super::registry::{CONTROL_SOCKET, Mount, Record, open_record};
use super::snapshot::Snapshot;
use super::status::MountStatus;
use super::wire::Channel;
use crate::error::{Code, Error, Result};
use crate::sys::peer::Peer;
use crate::sys::probe;

/// A supervisor that does not answer for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

/// A supervisor that replaces itself loses its callers for a moment: questions are asked again for so long.
const AGAIN: Duration = Duration::from_secs(2);

/// A supervisor that takes no connection for so long is stuck, or has as many as it can wait for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// No snapshot is longer, in bytes: the ledger has no room for it.
const MAX_SNAPSHOT: u64 = 2 * super::ledger::HALF;

impl Mount {
    /// How the mount does.
    ///
    /// # Errors
    /// When the supervisor does not answer.
    pub fn status(&self) -> Result<MountStatus> {
        Ok(MountStatus::new(self.snapshot()?, self))
    }

    /// What the supervisor knows.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn snapshot(&self) -> Result<Snapshot> {
        match ask(&self.dir, &Request::Snapshot)? {
            (Response::Snapshot, Some(file)) => read_snapshot(&File::from(file)).map_err(|e| {
                Error::failed("the supervisor gave an answer that is not understood")
                    .because(e)
                    .remedy(OTHER_VERSION)
            }),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

fn read_snapshot(file: &File) -> io::Result<Snapshot> {
    let about = file.metadata()?;
    if !about.is_file() || about.len() > MAX_SNAPSHOT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a memory file of bounded size"));
    }
    let mut text = vec![0; about.len() as usize];
    file.read_exact_at(&mut text, 0)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Asks the supervisor to end its mount.
///
/// # Errors
/// [`Code::InUse`] where it is in use; or the supervisor does not answer.
pub fn request_unmount(mount: &Mount, mode: UnmountMode) -> Result<()> {
    done(ask(&mount.dir, &Request::Unmount { mode })?)
}

/// Has the server close what was given back in the store; comes back when it has.
///
/// # Errors
/// When the supervisor does not answer.
pub fn request_refresh(mount: &Mount) -> Result<()> {
    match ask(&mount.dir, &Request::Refresh)? {
        (Response::Settled { .. }, _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

/// Has the supervisor go on with that program: a new server, and with `supervisor` a new supervisor too. Comes back
/// once the new server answers the kernel.
///
/// # Errors
/// Why the new one does not; the old one then goes on.
pub fn request_restart(mount: &Mount, program: BorrowedFd<'_>, supervisor: bool) -> Result<()> {
    done(ask_with(&mount.dir, &Request::Restart { supervisor }, Some(program))?)
}

fn done(answer: (Response, Option<OwnedFd>)) -> Result<()> {
    match answer {
        (Response::Done, _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

pub(super) const SUPERVISOR_LOST: &str =
    "its log is beside that socket; where it is stuck or dead, `stencil status` says so, and what to do";

const OTHER_VERSION: &str = "stencil and stencil-mountd are of different versions: install both from one build, then run stencil restart";

pub(super) fn unexpected(response: &Response) -> Error {
    Error::failed(format!("the supervisor gave an answer to another question: {response:?}"))
        .remedy(OTHER_VERSION)
}

/// Sends one request to the supervisor whose record is in `dir`. A [`Response::Failed`] comes back as the error it is.
///
/// # Errors
/// When there is no supervisor, it does not answer within half a minute, or it refuses.
pub fn ask(dir: &Path, request: &Request) -> Result<(Response, Option<OwnedFd>)> {
    let until = Instant::now() + AGAIN;
    loop {
        match ask_with(dir, request, None) {
            Err(error) if error.errno() == Some(libc::ECONNRESET) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            answer => return answer,
        }
    }
}

fn ask_with(
    dir: &Path,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(Response, Option<OwnedFd>)> {
    let path = dir.join(CONTROL_SOCKET);
    let lost = |e| Error::io("cannot talk to the supervisor of the mount", &path, e).remedy(SUPERVISOR_LOST);
    let channel = reach(dir).map_err(lost)?;
    channel.set_patience(PATIENCE).map_err(lost)?;
    channel.send(request, fd).map_err(lost)?;
    match channel.receive::<Response>().map_err(lost)? {
        Some((Response::Failed(failure), _)) => Err(failure.into_error()),
        Some(answer) => Ok(answer),
        None => Err(lost(io::Error::from_raw_os_error(libc::ECONNRESET))),
    }
}

/// Connects to the supervisor whose record is in `dir`: no other process may have made the socket that is there.
///
/// # Errors
/// The socket's; `ConnectionReset` where another process listens, as while another supervisor takes the mount over.
pub(super) fn reach(dir: &Path) -> io::Result<Channel> {
    let folder = open_record(dir).map_err(|e| match e.code() {
        Code::NotFound => io::ErrorKind::NotFound.into(),
        _ => io::Error::other(e.to_string()),
    })?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let channel = Channel::new(socket);
    channel.set_patience(CONNECT_TIMEOUT)?;
    // Socket addresses hold 107 bytes; a longer path is reached through its folder's descriptor.
    connect(&channel, &SocketAddrUnix::new(super::socket_path(&folder))?)?;
    let peer = Peer::of(&channel)?;
    let record = Record::read(&folder)?.ok_or(io::ErrorKind::ConnectionReset)?;
    // A number of another PID namespace is another one here.
    let foreign = record.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace());
    // Another supervisor, whose record has found no room yet, has the lock of the folder.
    let unrecorded = || !record.supervisor().is_alive() && is_locked(&folder);
    let is_supervisor = foreign || peer.pid == Some(record.supervisor_pid) || unrecorded();
    match is_supervisor && peer.uid == folder.own_metadata()?.st_uid {
        true => Ok(channel),
        false => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}
