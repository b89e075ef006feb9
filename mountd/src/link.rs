//! The protocol between server and supervisor: the server sends requests, the supervisor replies, one at a time.
//!
//! Requests have numbers. A supervisor that takes over from a dead one sends [`SupervisorReply::Again`]: a server that
//! waits for a reply then sends its request again, and drops replies to older requests. So every request may arrive
//! twice.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
pub use stencilfs::control::{Cache, FileKey};
use stencilfs::control::{Channel, Failure};
use stencilfs::error::{Error, Result};
use stencilfs::sys::wait::poll_for;

/// Most backings that one request or reply names.
pub const MAX_KEYS: usize = 64;

/// A numbered request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NumberedRequest {
    /// Greater than the numbers of all earlier requests of the same server; never 0.
    pub number: u64,
    /// The request.
    pub ask: ServerRequest,
}

/// The reply to the request with the same number.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NumberedReply {
    /// Number of the request.
    pub number: u64,
    /// The reply.
    pub answer: SupervisorReply,
}

/// A request of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerRequest {
    /// Identifies the server and its reply to INIT; the table of pending requests comes as descriptor. Answered by
    /// [`SupervisorReply::Done`] if the protocol version matches, and the reply to INIT is the one that the kernel has.
    Handshake {
        /// [`CONTROL_VERSION`](stencilfs::control::CONTROL_VERSION) of the server.
        control_version: u32,
        /// Version of the server.
        version: String,
        /// The parts of its sandbox that this kernel does not support, as text.
        lacks: Vec<String>,
        /// The complete reply to INIT.
        reply: Vec<u8>,
    },
    /// The server serves the kernel from now on. Answered by `Done`.
    Serving,
    /// Requests space and an empty file for a backing. Answered by [`SupervisorReply::Room`] with the file,
    /// [`SupervisorReply::Evict`], or [`SupervisorReply::Backing`] with the file of a ready backing.
    Reserve {
        /// The file.
        key: FileKey,
        /// Length of the file, in bytes.
        size: u64,
        /// Bytes of data in the file.
        bytes: u64,
    },
    /// Requests to close the unused ones of these backings, which the server no longer serves. Answered by
    /// [`SupervisorReply::Evicted`].
    Evict {
        /// The backings; at most [`MAX_KEYS`].
        keys: Vec<FileKey>,
    },
    /// The backing is filled: freeze it. Answered by `Done`.
    Freeze {
        /// The file.
        key: FileKey,
    },
    /// The frozen backing is verified: register it. Answered by [`SupervisorReply::Backing`].
    Register {
        /// The file.
        key: FileKey,
        /// `st_dev` and `st_ino` of the verified backing.
        identity: (u64, u64),
    },
    /// The reason why a file has no backing; `None` for a new attempt. Answered by `Done`.
    Decode {
        /// The file.
        key: FileKey,
        /// The reason, as text.
        why: Option<String>,
    },
    /// The backing is abandoned: release its space. Answered by `Done`.
    GiveBack {
        /// The file.
        key: FileKey,
    },
    /// Progress of filling a backing. Answered by `Done`.
    Progress {
        /// The file.
        key: FileKey,
        /// Bytes filled.
        bytes: u64,
    },
    /// The list of condemned templates is in effect. Answered by `Done`.
    Condemned {
        /// Number of rings of the bell before the list was read.
        ring: u32,
        /// How long the most recent open of a condemned template may take to be visible, in milliseconds.
        grace_ms: u64,
    },
    /// The server cannot start. Answered by `Done`.
    GiveUp {
        /// The reason.
        failure: Failure,
    },
}

/// A reply of the supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SupervisorReply {
    /// The request was executed.
    Done,
    /// The request was refused.
    Refused(Failure),
    /// Space is reserved; the file of the backing comes as descriptor.
    Room,
    /// There would be space without these backings: stop serving them, then request [`ServerRequest::Evict`].
    Evict(Vec<FileKey>),
    /// These backings were closed; the others of the request are in use.
    Evicted(Vec<FileKey>),
    /// Id of the backing on the connection.
    Backing(u32),
    /// A new supervisor has taken over: send a pending request again.
    Again,
}

/// The server's end of the link.
#[derive(Debug)]
pub struct Link(Mutex<End>);

#[derive(Debug)]
struct End {
    channel: Channel,
    /// The FUSE connection.
    kernel: Option<OwnedFd>,
    /// Number of the last request.
    last: u64,
    /// Longest wait for a reply; `None` waits without limit.
    timeout: Option<Duration>,
}

impl End {
    /// Waits for the supervisor or its successor. Fails when the FUSE connection is closed, as there will be no
    /// successor then.
    fn receive(&self) -> io::Result<Option<(NumberedReply, Option<OwnedFd>)>> {
        let mut both = vec![PollFd::new(&self.channel, PollFlags::IN)];
        both.extend(self.kernel.as_ref().map(|kernel| PollFd::new(kernel, PollFlags::empty())));
        match rustix::io::retry_on_intr(|| poll_for(&mut both, self.timeout))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ if both[0].revents().is_empty() => Err(io::ErrorKind::NotConnected.into()),
            _ => self.channel.receive(),
        }
    }
}

impl Link {
    /// Creates a link over `socket`. Until it serves, a server must limit the wait for replies by `timeout`: if the
    /// supervisor dies first, no other process may learn of the server.
    pub fn new(socket: OwnedFd, kernel: Option<OwnedFd>, timeout: Option<Duration>) -> Link {
        Link(Mutex::new(End { channel: Channel::new(socket), kernel, last: 0, timeout }))
    }

    /// Removes the limit on the wait for replies.
    pub fn wait_for_ever(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).timeout = None;
    }

    /// Sends a request and waits for the reply. A refusal becomes the error that it carries.
    ///
    /// # Errors
    /// Returns an error if the supervisor refuses. The death of the supervisor is not an error: its successor replies.
    pub fn request(
        &self,
        ask: &ServerRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(SupervisorReply, Option<OwnedFd>)> {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.last += 1;
        let request = NumberedRequest { number: end.last, ask: ask.clone() };
        let gone = |e| Error::failed("lost the supervisor").because(e);
        end.channel.send(&request, fd).map_err(gone)?;
        loop {
            match end.receive().map_err(gone)? {
                Some((NumberedReply { answer: SupervisorReply::Again, .. }, _)) => {
                    end.channel.send(&request, fd).map_err(gone)?;
                }
                Some((reply, fd)) if reply.number == request.number => {
                    return match reply.answer {
                        SupervisorReply::Refused(failure) => Err(failure.into_error()),
                        answer => Ok((answer, fd)),
                    };
                }
                Some(_) => {}
                None => return Err(gone(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Sends a request that is answered by `Done`.
    ///
    /// # Errors
    /// Same as [`request`](Self::request).
    pub fn request_done(&self, ask: &ServerRequest) -> Result<()> {
        match self.request(ask, None)?.0 {
            SupervisorReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// Returns the error of a reply that does not fit the request.
pub fn unexpected(answer: &SupervisorReply) -> Error {
    Error::failed(format!("unexpected reply from the supervisor: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_request_survives_a_takeover() {
        let (ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, None);
        let server = thread::spawn(move || {
            link.request_done(&ServerRequest::Serving).unwrap();
            link.request_done(&ServerRequest::Serving).unwrap();
        });
        let receive = || ours.receive::<NumberedRequest>().unwrap().unwrap().0.number;
        let send = |number, answer| ours.send(&NumberedReply { number, answer }, None).unwrap();
        assert_eq!(receive(), 1);
        send(0, SupervisorReply::Again);
        assert_eq!(receive(), 1, "the request is sent again");
        send(1, SupervisorReply::Done);
        send(1, SupervisorReply::Done);
        assert_eq!(receive(), 2, "the second reply to the first request is dropped");
        send(2, SupervisorReply::Done);
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_does_not_serve_yet_gives_up_waiting() {
        let (_ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, Some(Duration::from_millis(5)));
        assert!(
            link.request_done(&ServerRequest::Serving)
                .unwrap_err()
                .to_string()
                .contains("lost the supervisor")
        );
    }
}
