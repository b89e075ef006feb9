//! Unix sockets: connecting with a time limit, and the processes that listen at a path.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::sys::process::{holders, procfs};

/// Interval between attempts to connect while the backlog of the listener is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// `__SO_ACCEPTCON`: the flag of a listening socket in `/proc/net/unix`.
const ACCEPTS_CONNECTIONS: u32 = 1 << 16;

/// Connects to a stream socket. A plain connect(2) blocks without limit while the backlog of the listener is full,
/// which lasts as long as a stopped process does not accept connections.
///
/// # Errors
/// Returns `WouldBlock` if the backlog is full for `timeout`, and an error if the system call fails.
pub fn connect_within(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let deadline = Instant::now() + timeout;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY_INTERVAL),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Returns the processes that have a socket listening at this path, in this network namespace.
pub fn listeners(path: &Path) -> Vec<u32> {
    let text = procfs::read_text(Path::new("/proc/net/unix")).unwrap_or_default();
    let inode = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
        let inode = words.nth(2)?;
        (flags & ACCEPTS_CONNECTIONS != 0 && line.ends_with(&format!(" {}", path.display())))
            .then(|| format!("socket:[{inode}]"))
    };
    let sockets: Vec<String> = text.lines().filter_map(inode).collect();
    if sockets.is_empty() {
        return vec![];
    }
    let has = move |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let matches = |name: &Path| sockets.iter().any(|socket| name.as_os_str() == socket.as_str());
        fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|name| matches(&name))).then_some(())
    };
    let looks = holders::look_at_each(procfs::pids().unwrap_or_default(), holders::SCAN_TIMEOUT, has);
    looks.seen.into_iter().map(|(pid, ())| pid).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use crate::sys::socket::unix::*;

    #[test]
    fn connect_times_out_and_listener_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(connect_within(&path, Duration::ZERO).is_ok());
        assert_eq!(listeners(&path), [std::process::id()]);
        assert_eq!(listeners(&dir.path().join("other")), [] as [u32; 0]);
        let mut held = vec![];
        let error = loop {
            match connect_within(&path, Duration::ZERO) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        let error = connect_within(&dir.path().join("other"), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
