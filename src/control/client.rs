//! Asks supervisors.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{MountStatus, Request, Residency, Response, UnmountMode};
use super::registry::{CONTROL_SOCKET, Mount};
use super::wire::Channel;
use crate::error::{Error, Result};

/// A supervisor that does not answer for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

impl Mount {
    /// How the mount does.
    ///
    /// # Errors
    /// When the supervisor does not answer.
    pub fn status(&self) -> Result<MountStatus> {
        match ask(&self.dir, &Request::Status)? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// How much of each passthrough backing is in the page cache. Only the supervisor can see that.
    ///
    /// # Errors
    /// When the supervisor does not answer.
    pub fn residency(&self) -> Result<Vec<Residency>> {
        match ask(&self.dir, &Request::Residency)? {
            Response::Residency { files } => Ok(files),
            other => Err(unexpected(&other)),
        }
    }
}

/// Asks the supervisor to end its mount.
///
/// # Errors
/// [`Code::InUse`](crate::error::Code::InUse) where it is in use; or the supervisor does not answer.
pub fn request_unmount(mount: &Mount, mode: UnmountMode) -> Result<()> {
    match ask(&mount.dir, &Request::Unmount { mode })? {
        Response::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Error {
    Error::failed(format!("the supervisor gave an answer to another question: {response:?}"))
        .remedy("stencil and stencil-mountd are of different versions: install both from one build")
}

/// Sends one request to the supervisor whose record is in `dir`. A [`Response::Failed`] comes back as the error it is.
///
/// # Errors
/// When there is no supervisor, it does not answer within half a minute, or it refuses.
pub fn ask(dir: &Path, request: &Request) -> Result<Response> {
    let path = dir.join(CONTROL_SOCKET);
    let lost = |e| {
        Error::io("cannot talk to the supervisor of the mount", &path, e)
            .remedy("see whether it runs with `stencil status`; its log is beside that socket")
    };
    let stream = connect(dir).map_err(lost)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
    let channel = Channel::new(OwnedFd::from(stream));
    channel.send(request, None).map_err(lost)?;
    match channel.receive::<Response>().map_err(lost)? {
        Some((Response::Failed(failure), _)) => Err(failure.into_error()),
        Some((response, _)) => Ok(response),
        None => Err(lost(std::io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Socket addresses hold 107 bytes; a longer path is reached through its folder's descriptor.
fn connect(dir: &Path) -> std::io::Result<UnixStream> {
    let path = dir.join(CONTROL_SOCKET);
    if path.as_os_str().len() < 108 {
        return UnixStream::connect(path);
    }
    let folder = std::fs::File::open(dir)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
    UnixStream::connect(format!("/proc/self/fd/{fd}/{CONTROL_SOCKET}"))
}
