//! Messages between the processes of a mount: one packet each (`SOCK_SEQPACKET`) with JSON and at most one descriptor.
//!
//! A packet arrives completely or not at all: a peer cannot block the reader in the middle of a message.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest message, in bytes. Longer data is sent as a memory file whose descriptor comes with the message.
pub const MAX_MESSAGE: usize = 64 << 10;

/// One end of a socket that carries messages.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// Result of a receive that does not block.
#[derive(Debug)]
pub enum Received<T> {
    /// A message.
    Message(T, Option<OwnedFd>),
    /// No message is available.
    Nothing,
    /// The other end is closed.
    Closed,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.0
    }
}

impl Channel {
    /// Wraps a connected packet socket.
    pub fn new(socket: OwnedFd) -> Channel {
        Channel(socket)
    }

    /// Creates a connected pair of channels.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel(a), Channel(b)))
    }

    /// Sets the longest time that a receive or send blocks before it fails with `EAGAIN`.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        set_socket_timeout(&self.0, Timeout::Recv, Some(timeout))?;
        Ok(set_socket_timeout(&self.0, Timeout::Send, Some(timeout))?)
    }

    /// Sends one message, with a descriptor if `fd` is given.
    ///
    /// # Errors
    /// Returns the error of the socket: `EPIPE` if the other end is closed.
    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send_with(message, fd, SendFlags::empty())
    }

    /// Same as [`send`](Self::send), but fails with `EAGAIN` instead of blocking.
    ///
    /// # Errors
    /// Returns the error of the socket.
    pub fn try_send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send_with(message, fd, SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        message: &impl Serialize,
        fd: Option<BorrowedFd<'_>>,
        flags: SendFlags,
    ) -> io::Result<()> {
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_MESSAGE {
            return Err(io::Error::other(format!("message of {} bytes exceeds {MAX_MESSAGE}", body.len())));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let part = [IoSlice::new(&body)];
        retry(|| sendmsg(&self.0, &part, &mut ancillary, flags | SendFlags::NOSIGNAL)).map(drop)
    }

    /// Waits for one message; returns `None` if the other end is closed.
    ///
    /// # Errors
    /// Returns `TimedOut` if no message arrives in time, `InvalidData` if the packet cannot be parsed, and otherwise
    /// the error of the socket.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        match self.receive_with(RecvFlags::empty())? {
            Received::Message(message, fd) => Ok(Some((message, fd))),
            Received::Nothing => Err(io::ErrorKind::TimedOut.into()),
            Received::Closed => Ok(None),
        }
    }

    /// Receives one message if one is available.
    ///
    /// # Errors
    /// Same as [`receive`](Self::receive), but never `TimedOut`.
    pub fn try_receive<T: DeserializeOwned>(&self) -> io::Result<Received<T>> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with<T: DeserializeOwned>(&self, flags: RecvFlags) -> io::Result<Received<T>> {
        let mut body = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = {
            let mut part = [IoSliceMut::new(&mut body)];
            retry(|| recvmsg(&self.0, &mut part, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC))
        };
        let received = match received {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Received::Closed),
            other => other?,
        };
        let mut fd = None;
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                fd = fds.into_iter().next().or(fd);
            }
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            let why = format!("message exceeds {MAX_MESSAGE} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        match received.bytes {
            0 => Ok(Received::Closed),
            n => Ok(Received::Message(serde_json::from_slice(&body[..n])?, fd)),
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::control::protocol::wire::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(b.try_receive::<String>().unwrap(), Received::Nothing));
        a.send(&"first", None).unwrap();
        a.try_send(&"second", Some(file.as_fd())).unwrap();
        let (text, fd) = b.receive::<String>().unwrap().unwrap();
        assert_eq!((text.as_str(), fd.is_some()), ("first", false));
        let (text, fd) = b.receive::<String>().unwrap().unwrap();
        assert_eq!(text, "second");
        let flags = rustix::io::fcntl_getfd(fd.unwrap()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        b.set_timeout(Duration::from_millis(5)).unwrap();
        assert_eq!(b.receive::<String>().unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(a);
        assert!(b.receive::<String>().unwrap().is_none());
    }

    #[test]
    fn try_send_does_not_block_on_a_full_socket() {
        let (a, _b) = Channel::pair().unwrap();
        let text = "x".repeat(MAX_MESSAGE - 2);
        let error = (0..1000).find_map(|_| a.try_send(&text, None).err()).expect("the socket fills up");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(a.try_send(&"x".repeat(MAX_MESSAGE), None).is_err());
    }

    #[test]
    fn rejects_malformed_packets() {
        for bytes in [&b"{"[..], b"\xff\xff\xff\xff", &[b'"'; MAX_MESSAGE + 1]] {
            let (a, b) = Channel::pair().unwrap();
            rustix::io::write(&a, bytes).unwrap();
            assert!(b.receive::<String>().is_err(), "{} bytes", bytes.len());
        }
    }
}
