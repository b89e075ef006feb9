//! Notifications to the service manager, see sd_notify(3); nothing is sent without one. A manager that does not read
//! blocks nothing: messages are queued and sent later.

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
use stencilfs::control::FileKey;

use crate::backings::Backings;
use crate::kept::MountState;

/// Most queued messages; further ones are dropped, as the manager has stopped reading.
const MAX_QUEUED: usize = 8192;

/// The connection to the service manager.
#[derive(Debug)]
pub struct Notify {
    manager: Option<(OwnedFd, SocketAddrUnix)>,
    queue: VecDeque<(String, Option<OwnedFd>)>,
    /// Interval of the watchdog messages that the manager expects.
    interval: Option<Duration>,
    last: Instant,
    stored: Vec<u32>,
    ready: bool,
}

impl Notify {
    /// Connects to the service manager that the environment names.
    pub fn new() -> Notify {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let manager = name.and_then(|name| {
            reach(&name)
                .inspect_err(|e| log::warn!("cannot reach the service manager at {}: {e}", name.display()))
                .ok()
        });
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|&usec| ours && usec > 0);
        let interval = period.map(|usec| Duration::from_micros(usec) / 3);
        let (queue, stored, last) = (VecDeque::new(), Vec::new(), Instant::now());
        Notify { manager, queue, interval, last, stored, ready: false }
    }

    /// Reports that the mount serves. Stores duplicates of the descriptors in the service manager, with the program of
    /// the current servers.
    pub fn ready(&mut self, state: &MountState) {
        if !std::mem::replace(&mut self.ready, true) {
            self.store("fuse", state.fuse.as_fd());
            self.store("ledger", state.ledger.as_fd());
            self.store("counters", state.stats.page().fd().as_fd());
        }
        self.forget("program");
        self.store("program", state.program.file.as_fd());
        self.send_text("READY=1\nSTATUS=serving");
    }

    /// Stores new backings in the service manager.
    pub fn store_backings(&mut self, backings: &Backings) {
        for (id, file) in backings.ready() {
            if !self.stored.contains(&id) {
                self.store(&format!("backing-{id}"), file.as_fd());
                self.stored.push(id);
            }
        }
    }

    /// Removes backings that are about to be closed from the service manager.
    pub fn forget_backings(&mut self, backings: &Backings, keys: &[FileKey]) {
        for id in keys.iter().filter_map(|key| backings.id(key)) {
            self.forget(&format!("backing-{id}"));
            self.stored.retain(|other| *other != id);
        }
    }

    /// Reports that the supervisor is about to exit.
    pub fn stopping(&mut self) {
        self.send_text("STOPPING=1");
    }

    /// Sends a watchdog message if one is due, and the queued messages.
    pub fn ping(&mut self) {
        if self.queue.is_empty() && self.interval.is_some_and(|interval| self.last.elapsed() >= interval) {
            self.last = Instant::now();
            self.send_text("WATCHDOG=1");
        }
        self.send();
    }

    fn store(&mut self, name: &str, fd: BorrowedFd<'_>) {
        if self.manager.is_none() {
            return;
        }
        match fd.try_clone_to_owned() {
            Ok(fd) => self.add(format!("FDSTORE=1\nFDNAME={name}"), Some(fd)),
            Err(e) => log::warn!("cannot store descriptor {name} in the service manager: {e}"),
        }
    }

    /// Removes the descriptors with this name from the service manager.
    pub fn forget(&mut self, name: &str) {
        self.send_text(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn send_text(&mut self, text: &str) {
        self.add(text.to_owned(), None);
    }

    fn add(&mut self, text: String, fd: Option<OwnedFd>) {
        if self.manager.is_some() && self.queue.len() < MAX_QUEUED {
            self.queue.push_back((text, fd));
            self.send();
        }
    }

    fn send(&mut self) {
        let Some((socket, address)) = &self.manager else { return };
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
                Err(e) => log::warn!("cannot send {text:?} to the service manager: {e}"),
                Ok(_) => {}
            }
            self.queue.pop_front();
        }
    }
}

/// Creates a socket for the address in `NOTIFY_SOCKET`: a path, or with `@` the name of an abstract socket.
fn reach(name: &OsStr) -> rustix::io::Result<(OwnedFd, SocketAddrUnix)> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path => SocketAddrUnix::new(path)?,
    };
    Ok((socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?, address))
}
