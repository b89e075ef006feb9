//! Notifications for a service manager: sd_notify(3). Sending never blocks: messages that do not fit into the buffer of
//! the socket are queued and sent later.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};

use super::program::Program;
use super::resources::Resources;

/// Largest number of queued messages. Further messages are dropped, as the manager apparently does not read its socket.
const MAX_QUEUED: usize = 8192;

/// The socket to the service manager.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<(OwnedFd, SocketAddrUnix)>,
    queue: VecDeque<(String, Option<OwnedFd>)>,
    /// Interval between keep-alive messages, a third of the manager's watchdog timeout; `None` if the manager requires
    /// no such messages.
    interval: Option<Duration>,
    last_ping: Instant,
    /// Ids of backings in the manager's descriptor store.
    stored: Vec<u32>,
    is_ready: bool,
}

impl ServiceManager {
    /// Connects to the manager in the environment variable `NOTIFY_SOCKET`. Without the variable, notifications are
    /// dropped.
    pub fn from_environment() -> ServiceManager {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|&usec| ours && usec > 0);
        ServiceManager::new(name.as_deref(), period.map(|usec| Duration::from_micros(usec) / 3))
    }

    fn new(name: Option<&OsStr>, interval: Option<Duration>) -> ServiceManager {
        let socket = name.and_then(|name| {
            open_socket(name)
                .inspect_err(|e| log::warn!("cannot notify the service manager at {}: {e}", name.display()))
                .ok()
        });
        let (queue, stored, last_ping) = (VecDeque::new(), Vec::new(), Instant::now());
        ServiceManager { socket, queue, interval, last_ping, stored, is_ready: false }
    }

    /// Reports that the mount is served, and stores the descriptors of the mount and the program of the current server
    /// with the manager.
    pub fn ready(&mut self, resources: &Resources, program: &Program) {
        if !std::mem::replace(&mut self.is_ready, true) {
            self.store("fuse", resources.fuse.as_fd());
            self.store("ledger", resources.ledger.as_fd());
            self.store("counters", resources.stats.page().fd().as_fd());
        }
        self.forget("program");
        self.store("program", program.file.as_fd());
        self.send_text("READY=1\nSTATUS=serving");
    }

    /// Stores with the manager those of the given backings that are not stored yet.
    pub fn store_backings<'a>(&mut self, backings: impl Iterator<Item = (u32, &'a OwnedFd)>) {
        for (id, file) in backings {
            if !self.stored.contains(&id) {
                self.store(&format!("backing-{id}"), file.as_fd());
                self.stored.push(id);
            }
        }
    }

    /// Removes backings from the manager's descriptor store, before they are closed.
    pub fn forget_backings(&mut self, ids: &[u32]) {
        for id in ids {
            self.forget(&format!("backing-{id}"));
            self.stored.retain(|other| other != id);
        }
    }

    /// Reports that the mount is ending.
    pub fn stopping(&mut self) {
        self.send_text("STOPPING=1");
    }

    /// Sends a keep-alive message if one is due, and queued messages.
    pub fn ping(&mut self) {
        if self.queue.is_empty() && self.interval.is_some_and(|interval| self.last_ping.elapsed() >= interval)
        {
            self.last_ping = Instant::now();
            self.send_text("WATCHDOG=1");
        }
        self.send();
    }

    fn store(&mut self, name: &str, fd: BorrowedFd<'_>) {
        if self.socket.is_none() {
            return;
        }
        match fd.try_clone_to_owned() {
            Ok(fd) => self.add(format!("FDSTORE=1\nFDNAME={name}"), Some(fd)),
            Err(e) => log::warn!("cannot store {name} with the service manager: {e}"),
        }
    }

    /// Removes all descriptors with this name from the manager's descriptor store.
    pub fn forget(&mut self, name: &str) {
        self.send_text(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn send_text(&mut self, text: &str) {
        self.add(text.to_owned(), None);
    }

    fn add(&mut self, text: String, fd: Option<OwnedFd>) {
        if self.socket.is_some() && self.queue.len() < MAX_QUEUED {
            self.queue.push_back((text, fd));
            self.send();
        }
    }

    fn send(&mut self) {
        let Some((socket, address)) = &self.socket else { return };
        while let Some((text, fd)) = self.queue.front() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = fd.as_ref().map(|fd| [fd.as_fd()]);
            if let Some(fds) = &fds {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg_addr(socket, address, &[IoSlice::new(text.as_bytes())], &mut ancillary, flags) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(e) => log::warn!("cannot notify the service manager of {text:?}: {e}"),
                Ok(_) => {}
            }
            self.queue.pop_front();
        }
    }
}

/// Creates a socket, and parses the address of the manager: a path, or the name of an abstract socket after `@`.
fn open_socket(name: &OsStr) -> rustix::io::Result<(OwnedFd, SocketAddrUnix)> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path => SocketAddrUnix::new(path)?,
    };
    Ok((socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn receive(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 512];
        socket.set_nonblocking(true).unwrap();
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    #[test]
    fn backings_are_stored_once_and_can_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut manager = ServiceManager::new(Some(path.as_os_str()), None);
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        manager.store_backings([(3, &file)].into_iter());
        manager.store_backings([(3, &file)].into_iter());
        manager.forget_backings(&[3]);
        manager.store_backings([(3, &file)].into_iter());
        manager.stopping();
        let store = "FDSTORE=1\nFDNAME=backing-3";
        let expected = [store, "FDSTOREREMOVE=1\nFDNAME=backing-3", store, "STOPPING=1"];
        let received: Vec<String> = std::iter::from_fn(|| receive(&socket)).collect();
        assert_eq!(received, expected);
    }

    #[test]
    fn unread_messages_are_queued_up_to_a_limit_and_sent_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut manager = ServiceManager::new(Some(path.as_os_str()), None);
        for id in 0..2 * MAX_QUEUED as u32 {
            manager.forget_backings(&[id]);
        }
        assert_eq!(manager.queue.len(), MAX_QUEUED);
        let mut count = 0;
        while !manager.queue.is_empty() {
            count += std::iter::from_fn(|| receive(&socket)).count();
            manager.ping();
        }
        count += std::iter::from_fn(|| receive(&socket)).count();
        assert!(
            count > MAX_QUEUED,
            "{count} messages, expected those in the buffer of the socket and the queue"
        );
    }

    #[test]
    fn keep_alive_messages_are_sent_when_due() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut manager = ServiceManager::new(Some(path.as_os_str()), Some(Duration::ZERO));
        manager.ping();
        assert_eq!(receive(&socket).as_deref(), Some("WATCHDOG=1"));
        let mut without_interval = ServiceManager::new(Some(path.as_os_str()), None);
        without_interval.ping();
        assert_eq!(receive(&socket), None);
    }

    #[test]
    fn without_a_manager_nothing_is_queued() {
        for name in [None, Some(OsStr::new("/nonexistent/socket")), Some(OsStr::new("@stencil-test-unbound"))]
        {
            let mut manager = ServiceManager::new(name, None);
            manager.stopping();
            manager.ping();
            assert!(manager.queue.is_empty(), "{name:?}");
        }
    }
}
