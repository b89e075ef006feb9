//! Unix sockets: connecting without waiting for ever, and who listens at a path.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{procfs, users};

/// How often a full queue is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The bit of a socket's flags in `/proc/net/unix` that listens.
const LISTENS: u32 = 1 << 16;

/// Connects. `connect(2)` waits for ever where the queue of a listener is full, which nobody empties while its process
/// stands still.
///
/// # Errors
/// The system's; `WouldBlock` when the queue is full for that long.
pub fn connect_within(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let until = Instant::now() + patience;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < until => std::thread::sleep(RETRY_INTERVAL),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Processes that have a socket which listens at this path, in this network namespace.
pub fn listeners(path: &Path) -> Vec<u32> {
    let text = procfs::read_text(Path::new("/proc/net/unix")).unwrap_or_default();
    let inode = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
        let inode = words.nth(2)?;
        (flags & LISTENS != 0 && line.ends_with(&format!(" {}", path.display())))
            .then(|| format!("socket:[{inode}]"))
    };
    let sockets: Vec<String> = text.lines().filter_map(inode).collect();
    if sockets.is_empty() {
        return vec![];
    }
    let has = move |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let is_it = |name: &Path| sockets.iter().any(|socket| name.as_os_str() == socket.as_str());
        fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|name| is_it(&name))).then_some(())
    };
    let looks = users::look_at_each(procfs::pids().unwrap_or_default(), users::PATIENCE, has);
    looks.seen.into_iter().map(|(pid, ())| pid).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_full_queue_ends_the_wait_and_its_owner_is_found() {
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
