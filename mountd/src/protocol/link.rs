//! The server's end of the socket to its supervisor.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use stencilfs::control::Channel;
use stencilfs::error::{Error, Result};
use stencilfs::sys::poll::poll_for;

use super::messages::{Numbered, ServerReply, ServerRequest};

/// A socket over which one request at a time is made.
#[derive(Debug)]
pub struct Link(Mutex<End>);

#[derive(Debug)]
struct End {
    channel: Channel,
    /// The connection to the kernel.
    kernel: Option<OwnedFd>,
    /// Number of the last request.
    last: u64,
    /// How long a reply is waited for; without end if none.
    timeout: Option<Duration>,
}

impl End {
    /// Waits for a reply of the supervisor, or of its successor; no longer than the connection to the kernel lives, for
    /// then there will be no successor.
    fn receive(&self) -> io::Result<Option<(Numbered<ServerReply>, Option<OwnedFd>)>> {
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
    /// Makes requests over that socket. A server that does not serve yet has a timeout: if its supervisor dies, no other
    /// supervisor finds it.
    pub fn new(socket: OwnedFd, kernel: Option<OwnedFd>, timeout: Option<Duration>) -> Link {
        Link(Mutex::new(End { channel: Channel::new(socket), kernel, last: 0, timeout }))
    }

    /// Waits for replies without a time limit from now on.
    pub fn wait_for_ever(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).timeout = None;
    }

    /// Makes a request and waits for its reply, also across the death of the supervisor.
    ///
    /// # Errors
    /// Returns the supervisor's refusal, or an error if the mount is over.
    pub fn request(
        &self,
        request: &ServerRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(ServerReply, Option<OwnedFd>)> {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.last += 1;
        let request = Numbered { number: end.last, body: request.clone() };
        let gone = |e| Error::failed("the supervisor is gone").because(e);
        end.channel.send(&request, fd).map_err(gone)?;
        loop {
            match end.receive().map_err(gone)? {
                Some((Numbered { body: ServerReply::AskAgain, .. }, _)) => {
                    end.channel.send(&request, fd).map_err(gone)?;
                }
                Some((reply, fd)) if reply.number == request.number => {
                    return match reply.body {
                        ServerReply::Refused(failure) => Err(failure.into_error()),
                        reply => Ok((reply, fd)),
                    };
                }
                Some(_) => {}
                None => return Err(gone(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Makes a request whose only reply is [`ServerReply::Done`].
    ///
    /// # Errors
    /// Same as [`request`](Self::request).
    pub fn request_done(&self, request: &ServerRequest) -> Result<()> {
        match self.request(request, None)?.0 {
            ServerReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// The error for a reply that does not fit its request.
pub fn unexpected(reply: &ServerReply) -> Error {
    Error::failed(format!("unexpected reply of the supervisor: {reply:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_request_survives_a_new_supervisor() {
        let (ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, None);
        let server = thread::spawn(move || {
            link.request_done(&ServerRequest::Serving).unwrap();
            link.request_done(&ServerRequest::Serving).unwrap();
        });
        let hear = || ours.receive::<Numbered<ServerRequest>>().unwrap().unwrap().0.number;
        let reply = |number, body| ours.send(&Numbered { number, body }, None).unwrap();
        assert_eq!(hear(), 1);
        reply(0, ServerReply::AskAgain);
        assert_eq!(hear(), 1, "the request is sent again");
        reply(1, ServerReply::Done);
        reply(1, ServerReply::Done);
        assert_eq!(hear(), 2, "the second reply to the first request is ignored");
        reply(2, ServerReply::Done);
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_no_supervisor_finds_does_not_wait_for_ever() {
        let (_ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, Some(Duration::from_millis(5)));
        let error = link.request_done(&ServerRequest::Serving).unwrap_err();
        assert!(error.to_string().contains("supervisor is gone"), "{error}");
    }

    #[test]
    fn refusals_and_unexpected_replies_are_errors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, None);
        let refusal = ServerReply::Refused((&Error::try_again("no room")).into());
        for (number, body) in [(1, refusal), (2, ServerReply::Created)] {
            ours.send(&Numbered { number, body }, None).unwrap();
        }
        assert_eq!(link.request_done(&ServerRequest::Serving).unwrap_err().to_string(), "no room");
        assert!(link.request_done(&ServerRequest::Serving).unwrap_err().to_string().contains("Created"));
        drop(ours);
        assert!(link.request_done(&ServerRequest::Serving).unwrap_err().to_string().contains("gone"));
    }
}
