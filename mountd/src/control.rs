//! The supervisor's control socket.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use stencilfs::control::{CONTROL_SOCKET, Channel, Failure, Request, Response};
use stencilfs::error::{Error, Result};

use crate::supervisor::Shared;

/// A caller that says nothing for so long is left.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens in the record's folder, which only its owner can enter.
///
/// # Errors
/// The system's.
pub fn listen(dir: &Path) -> Result<UnixListener> {
    let path = dir.join(CONTROL_SOCKET);
    let bind = || {
        if path.as_os_str().len() < 108 {
            return UnixListener::bind(&path);
        }
        let folder = std::fs::File::open(dir)?;
        UnixListener::bind(format!("/proc/self/fd/{}/{CONTROL_SOCKET}", folder.as_raw_fd()))
    };
    bind().map_err(|e| Error::io("cannot listen on the control socket", &path, e))
}

/// Answers callers, each in its own thread, for as long as the process lives.
pub fn answer_callers(listener: UnixListener, shared: Arc<Shared>) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || {
                        shared.callers.fetch_add(1, Ordering::SeqCst);
                        if let Err(error) = answer(stream, &shared) {
                            log::warn!("a caller of the control socket was lost: {error}");
                        }
                        shared.callers.fetch_sub(1, Ordering::SeqCst);
                    });
                }
                Err(error) => {
                    log::warn!("the control socket: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    });
}

fn answer(stream: UnixStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let channel = Channel::new(OwnedFd::from(stream));
    while let Some((request, _)) = channel.receive::<Request>()? {
        let response = match request {
            Request::Status => shared.status().map(|s| Response::Status(Box::new(s))),
            Request::Residency => shared.residency().map(|files| Response::Residency { files }),
            Request::Unmount { mode } => shared.unmount(mode).map(|()| Response::Done),
        };
        channel.send(&response.unwrap_or_else(|e| Response::Failed(Failure::from(&e))), None)?;
    }
    Ok(())
}
