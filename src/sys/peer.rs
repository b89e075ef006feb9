//! Who is at the other end of a unix socket (`SO_PEERCRED`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The process that connected, or that called `listen`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its number; `None` where it has none in this PID namespace.
    pub pid: Option<u32>,
    /// Its user at that time.
    pub uid: u32,
}

impl Peer {
    /// The peer of a connected socket.
    ///
    /// # Errors
    /// The system's.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        // Not by rustix, whose answer has no room for the pid 0 of another namespace.
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to a `ucred` that lives through the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut length,
            )
        };
        match result {
            0 => Ok(Peer { pid: u32::try_from(peer.pid).ok().filter(|&pid| pid != 0), uid: peer.uid }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_its_own_peer() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(Peer::of(&a).unwrap(), Peer { pid: Some(std::process::id()), uid });
    }
}
