//! Credentials of the peer of a unix socket (`SO_PEERCRED`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// The process that called connect(2) or listen(2) on the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Pid of the process; `None` if the process is not visible in this PID namespace.
    pub pid: Option<u32>,
    /// Effective user id of the process at that time.
    pub uid: u32,
}

impl Peer {
    /// Returns the peer of a connected socket.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        // The function of rustix is not used: its result type cannot represent the pid 0 that stands for another PID
        // namespace.
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        #[expect(clippy::cast_possible_truncation, reason = "12 bytes")]
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to a `ucred` that outlives the call.
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

/// Checks that the process `found`, which listens on a socket, is the VM's.
///
/// # Errors
/// Returns an error if another process listens on the socket, or if the process of the VM has exited.
pub fn expect_listener(socket: &Path, vm: ProcessId, found: u32) -> Result<()> {
    if !vm.is_alive() {
        let error = Error::failed(format!("the VM (process {}) has exited", vm.pid));
        return Err(error.at(socket).hint("start the VM again"));
    }
    if found != vm.pid {
        let text = format!("expected process {} on this socket, found process {found}", vm.pid);
        return Err(Error::failed(text).at(socket).hint("pass the current socket of the VM"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::sys::socket::peer::*;

    #[test]
    fn returns_this_process_for_a_socket_pair() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(Peer::of(&a).unwrap(), Peer { pid: Some(std::process::id()), uid });
    }
}
