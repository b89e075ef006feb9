//! The server's end of the socket between server and supervisor.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use stencilfs::control::Channel;
use stencilfs::error::{Error, Result};
use stencilfs::sys::poll::poll_for;

use super::messages::{Numbered, ServerReply, ServerRequest};

/// The socket to the supervisor. Carries one request at a time.
#[derive(Debug)]
pub struct Link(Mutex<End>);

#[derive(Debug)]
struct End {
    channel: Channel,
    /// The FUSE connection.
    kernel: Option<OwnedFd>,
    /// Number of the latest request.
    last_number: u64,
    /// Longest wait for a reply; `None` waits without a limit.
    timeout: Option<Duration>,
}

impl End {
    /// Waits for a reply of the supervisor or of a supervisor that takes over. Fails when the FUSE connection is
    /// closed: then no supervisor takes over.
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
    /// Creates a link over `socket`. A server that does not serve yet needs a `timeout`: if its supervisor dies,
    /// possibly no other supervisor finds the server.
    pub fn new(socket: OwnedFd, kernel: Option<OwnedFd>, timeout: Option<Duration>) -> Link {
        Link(Mutex::new(End { channel: Channel::new(socket), kernel, last_number: 0, timeout }))
    }

    /// Removes the timeout for replies.
    pub fn remove_timeout(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).timeout = None;
    }

    /// Sends a request and waits for its reply; if the supervisor dies, for the reply of a supervisor that takes over.
    ///
    /// # Errors
    /// Returns the supervisor's refusal, or an error if the FUSE connection is closed or the timeout has passed.
    pub fn request(
        &self,
        request: &ServerRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(ServerReply, Option<OwnedFd>)> {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.last_number += 1;
        let request = Numbered { number: end.last_number, body: request.clone() };
        let gone = |e| Error::failed("lost the connection to the supervisor").because(e);
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

    /// Sends a request whose only successful reply is [`ServerReply::Done`].
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

/// Returns the error for a reply that does not match its request.
pub fn unexpected(reply: &ServerReply) -> Error {
    log::debug!("unexpected reply of the supervisor: {reply:?}");
    Error::failed("the supervisor sent an unexpected reply")
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
        let receive_number = || ours.receive::<Numbered<ServerRequest>>().unwrap().unwrap().0.number;
        let reply = |number, body| ours.send(&Numbered { number, body }, None).unwrap();
        assert_eq!(receive_number(), 1);
        reply(0, ServerReply::AskAgain);
        assert_eq!(receive_number(), 1, "the request is sent again");
        reply(1, ServerReply::Done);
        reply(1, ServerReply::Done);
        assert_eq!(receive_number(), 2, "the second reply to the first request is ignored");
        reply(2, ServerReply::Done);
        server.join().unwrap();
    }

    #[test]
    fn a_request_without_a_reply_times_out() {
        let (_ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, Some(Duration::from_millis(5)));
        let error = link.request_done(&ServerRequest::Serving).unwrap_err();
        assert!(error.to_string().contains("lost the connection to the supervisor"), "{error}");
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
        assert_eq!(
            link.request_done(&ServerRequest::Serving).unwrap_err().to_string(),
            "the supervisor sent an unexpected reply"
        );
        drop(ours);
        assert!(
            link.request_done(&ServerRequest::Serving)
                .unwrap_err()
                .to_string()
                .contains("lost the connection")
        );
    }
}
