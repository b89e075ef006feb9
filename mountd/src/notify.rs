//! What a service manager is told: sd_notify(3). Without one, nothing. A manager that does not listen holds up nobody:
//! what it does not take at once is kept and sent again.

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
use crate::kept::Kept;

/// Messages that wait to be taken; beyond that a manager is not listening at all.
const MOST: usize = 8192;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notify {
    manager: Option<(OwnedFd, SocketAddrUnix)>,
    queue: VecDeque<(String, Option<OwnedFd>)>,
    /// How often it wants to hear that the supervisor lives.
    interval: Option<Duration>,
    last: Instant,
    stored: Vec<u32>,
    ready: bool,
}

impl Notify {
    /// As the environment says.
    pub fn new() -> Notify {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let manager = name.and_then(|name| {
            reach(&name)
                .inspect_err(|e| log::warn!("the service manager at {} is not told: {e}", name.display()))
                .ok()
        });
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|&usec| ours && usec > 0);
        let interval = period.map(|usec| Duration::from_micros(usec) / 3);
        let (queue, stored, last) = (VecDeque::new(), Vec::new(), Instant::now());
        Notify { manager, queue, interval, last, stored, ready: false }
    }

    /// The mount answers. The descriptors have a second home in the service manager from now on; the program is that
    /// of the present servers.
    pub fn ready(&mut self, kept: &Kept) {
        if !std::mem::replace(&mut self.ready, true) {
            self.store("fuse", kept.fuse.as_fd());
            self.store("ledger", kept.ledger.as_fd());
            self.store("counters", kept.stats.page().fd().as_fd());
        }
        self.forget("program");
        self.store("program", kept.program.file.as_fd());
        self.say("READY=1\nSTATUS=serving");
    }

    /// Backings that are new.
    pub fn store_backings(&mut self, backings: &Backings) {
        for (id, file) in backings.ready() {
            if !self.stored.contains(&id) {
                self.store(&format!("backing-{id}"), file.as_fd());
                self.stored.push(id);
            }
        }
    }

    /// Backings that are about to be closed.
    pub fn forget_backings(&mut self, backings: &Backings, keys: &[FileKey]) {
        for id in keys.iter().filter_map(|key| backings.id(key)) {
            self.forget(&format!("backing-{id}"));
            self.stored.retain(|other| *other != id);
        }
    }

    /// It is about to end.
    pub fn stopping(&mut self) {
        self.say("STOPPING=1");
    }

    /// The supervisor lives. Sends what was not taken before.
    pub fn ping(&mut self) {
        if self.queue.is_empty() && self.interval.is_some_and(|interval| self.last.elapsed() >= interval) {
            self.last = Instant::now();
            self.say("WATCHDOG=1");
        }
        self.send();
    }

    fn store(&mut self, name: &str, fd: BorrowedFd<'_>) {
        if self.manager.is_none() {
            return;
        }
        match fd.try_clone_to_owned() {
            Ok(fd) => self.add(format!("FDSTORE=1\nFDNAME={name}"), Some(fd)),
            Err(e) => log::warn!("the service manager does not keep {name}: {e}"),
        }
    }

    /// The manager is to give away what it keeps under that name.
    pub fn forget(&mut self, name: &str) {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn say(&mut self, text: &str) {
        self.add(text.to_owned(), None);
    }

    fn add(&mut self, text: String, fd: Option<OwnedFd>) {
        if self.manager.is_some() && self.queue.len() < MOST {
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
                Err(e) => log::warn!("the service manager does not hear {text:?}: {e}"),
                Ok(_) => {}
            }
            self.queue.pop_front();
        }
    }
}

/// A path, or with `@` the name of an abstract socket.
fn reach(name: &OsStr) -> rustix::io::Result<(OwnedFd, SocketAddrUnix)> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path => SocketAddrUnix::new(path)?,
    };
    Ok((socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?, address))
}
