//! Frames over a stream socket: four bytes of length (little-endian), then JSON, and at most one file descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// No frame is longer, in bytes.
pub const MAX_FRAME: usize = 64 << 20;

/// One end of a stream socket that carries frames.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Speaks frames over a connected stream socket.
    pub fn new(socket: OwnedFd) -> Channel {
        Channel(socket)
    }

    /// Sends one message, and the descriptor with it.
    ///
    /// # Errors
    /// The socket's; the other end's death is `EPIPE`.
    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_FRAME {
            return Err(io::Error::other(format!("a message of {} bytes exceeds {MAX_FRAME}", body.len())));
        }
        let length = (body.len() as u32).to_le_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let mut sent = 0;
        while sent < 4 {
            let part = [IoSlice::new(&length[sent..])];
            sent += retry(|| sendmsg(&self.0, &part, &mut ancillary, SendFlags::NOSIGNAL))?;
            ancillary.clear();
        }
        let mut rest = &body[..];
        while !rest.is_empty() {
            let n = retry(|| rustix::net::send(&self.0, rest, SendFlags::NOSIGNAL))?;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// Waits for one message; none when the other end has closed.
    ///
    /// # Errors
    /// The socket's, or `InvalidData` for what is no frame.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let mut length = [0; 4];
        let mut got = 0;
        let mut fd = None;
        while got < 4 {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(&mut length[got..])];
            let message = retry(|| recvmsg(&self.0, &mut part, &mut ancillary, RecvFlags::CMSG_CLOEXEC))?;
            for item in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = item {
                    fd = fds.into_iter().next().or(fd);
                }
            }
            match message.bytes {
                0 if got == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => got += n,
            }
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes")));
        }
        let mut body = Vec::new();
        let mut part = vec![0; length.min(1 << 20)];
        while body.len() < length {
            let want = part.len().min(length - body.len());
            match retry(|| rustix::io::read(&self.0, &mut part[..want]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => body.extend_from_slice(&part[..n]),
            }
        }
        let value = serde_json::from_slice(&body)?;
        Ok(Some((value, fd)))
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
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn frames_and_descriptors_arrive_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Channel::new(a.into()), Channel::new(b.into()));
        let file = tempfile::tempfile().unwrap();
        a.send(&"first", None).unwrap();
        a.send(&"second", Some(file.as_fd())).unwrap();
        let (text, fd) = b.receive::<String>().unwrap().unwrap();
        assert_eq!((text.as_str(), fd.is_some()), ("first", false));
        let (text, fd) = b.receive::<String>().unwrap().unwrap();
        assert_eq!(text, "second");
        let flags = rustix::io::fcntl_getfd(fd.unwrap()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        drop(a);
        assert!(b.receive::<String>().unwrap().is_none());
    }

    #[test]
    fn rubbish_is_an_error() {
        use std::io::Write;
        for bytes in [&b"\x01\x00\x00\x00{"[..], b"\xff\xff\xff\xff", b"\x05\x00\x00\x00ab", b"\x01"] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(bytes).unwrap();
            drop(a);
            assert!(Channel::new(b.into()).receive::<String>().is_err(), "{bytes:?}");
        }
    }
}
