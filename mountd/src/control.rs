//! The control socket on the supervisor's side: connections, and which of them wait for a reply.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, chmodat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use stencilfs::control::{
    CONTROL_SOCKET, Channel, Failure, Received, RecordDir, Request, Response, Snapshot, socket_path,
};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memfd;
use stencilfs::units::Bytes;

/// Most connections; a new one displaces the oldest that waits for nothing.
const MAX_CALLERS: usize = 32;

/// Pause after a failed accept(2), for example without free descriptors: the listener would be readable again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Listens in the directory of the record, which only its owner can enter.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn open(record: &RecordDir) -> Result<OwnedFd> {
    let path = record.path().join(CONTROL_SOCKET);
    let open = || -> std::io::Result<OwnedFd> {
        record.remove_socket()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(socket_path(record.folder()))?)?;
        // bind(2) applies the umask to the mode of the socket.
        chmodat(record.folder(), CONTROL_SOCKET, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
        listen(&socket, MAX_CALLERS as i32)?;
        Ok(socket)
    };
    open().map_err(|e| Error::io("cannot listen on the control socket", &path, e))
}

/// Returns a reply with the snapshot in a memory file, as the snapshot may exceed the size of a message.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn snapshot_reply(snapshot: &Snapshot) -> Result<(Response, Option<OwnedFd>)> {
    let write = || -> std::io::Result<OwnedFd> {
        let mut file = File::from(memfd::create("stencil-snapshot", Bytes::ZERO)?);
        file.write_all(&serde_json::to_vec(snapshot)?)?;
        Ok(file.into())
    };
    let file = write().map_err(|e| Error::failed("cannot write a snapshot").because(e))?;
    Ok((Response::Snapshot, Some(file)))
}

#[derive(Debug)]
struct Caller {
    id: u64,
    channel: Channel,
    waits: bool,
    /// The caller is not displaced though it waits for nothing: its connection keeps templates condemned.
    keeps: bool,
}

impl Caller {
    fn is_displaceable(&self) -> bool {
        !self.waits && !self.keeps
    }
}

/// The connections, and the process that started the mount, which is told once that the mount serves.
#[derive(Debug, Default)]
pub struct Callers {
    all: Vec<Caller>,
    next: u64,
    starter: Option<Starter>,
    closed_until: Option<Instant>,
}

/// The process that started the supervisor, and reads one line with the outcome from the supervisor's standard output.
#[derive(Debug)]
pub struct Starter {
    /// True if the supervisor runs in the foreground and reports to the terminal instead.
    pub foreground: bool,
}

impl Starter {
    /// Reports that the mount serves, or why there is none.
    pub fn report(self, error: Option<&Error>) {
        if self.foreground {
            if let Some(error) = error {
                stencilfs::say!("stencil-mountd: {error}");
                if let Some(remedy) = error.remedy_text() {
                    stencilfs::say!("stencil-mountd: {remedy}");
                }
            }
            return;
        }
        let line = serde_json::to_string(&error.map(Failure::from)).unwrap_or_default();
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        if let Ok(null) = File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}

impl Callers {
    /// Creates the list, with no connection yet.
    pub fn new(starter: Option<Starter>) -> Callers {
        Callers { starter, ..Callers::default() }
    }

    /// Adds a connection that waits for a reply and was inherited over exec(2). Returns its number.
    pub fn resume(&mut self, channel: Channel) -> u64 {
        self.next += 1;
        self.all.push(Caller { id: self.next, channel, waits: true, keeps: false });
        self.next
    }

    /// Returns true until a server serves the mount for the first time.
    pub fn nobody_served_yet(&self) -> bool {
        self.starter.is_some()
    }

    /// Reports to the starter that the mount serves.
    pub fn served(&mut self) {
        if let Some(starter) = self.starter.take() {
            starter.report(None);
        }
    }

    /// Removes and returns the starter, to report a failure to it.
    pub fn starter(&mut self) -> Option<Starter> {
        self.starter.take()
    }

    /// Returns true if another connection can be accepted.
    pub fn has_room(&self) -> bool {
        let open = self.closed_until.is_none_or(|until| Instant::now() >= until);
        open && (self.all.len() < MAX_CALLERS || self.all.iter().any(Caller::is_displaceable))
    }

    /// Accepts one connection.
    pub fn accept(&mut self, listener: &OwnedFd) {
        if self.all.len() >= MAX_CALLERS {
            let Some(at) = self.all.iter().position(Caller::is_displaceable) else { return };
            self.all.remove(at);
        }
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => {
                self.next += 1;
                self.all.push(Caller {
                    id: self.next,
                    channel: Channel::new(socket),
                    waits: false,
                    keeps: false,
                });
            }
            Err(e) => {
                log::debug!("cannot accept a connection on the control socket: {e}");
                self.closed_until = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    /// Sets whether a caller keeps its connection while it waits for nothing.
    pub fn keep(&mut self, id: u64, keeps: bool) {
        self.all.iter_mut().filter(|c| c.id == id).for_each(|c| c.keeps = keeps);
    }

    /// Iterates over the connections.
    pub fn channels(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.all.iter().map(|c| (c.id, c.channel.as_fd()))
    }

    /// Returns the connection of a caller.
    pub fn channel(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.channels().find(|(other, _)| *other == id).map(|(_, fd)| fd)
    }

    /// Receives a caller's request; the caller waits for the reply from then on.
    pub fn receive(&mut self, id: u64) -> Option<Received<Request>> {
        let caller = self.all.iter_mut().find(|c| c.id == id)?;
        let received = caller
            .channel
            .try_receive()
            .inspect_err(|e| log::warn!("invalid request on the control socket: {e}"));
        let received = received.ok()?;
        caller.waits |= matches!(received, Received::Message(..));
        Some(received)
    }

    /// Replies to a caller, if it is still connected.
    pub fn reply(&mut self, id: u64, answer: Result<(Response, Option<OwnedFd>)>) {
        let Some(caller) = self.all.iter_mut().find(|c| c.id == id) else { return };
        caller.waits = false;
        let (response, fd) = answer.unwrap_or_else(|e| (Response::Failed(Failure::from(&e)), None));
        if let Err(e) = caller.channel.try_send(&response, fd.as_ref().map(AsFd::as_fd)) {
            log::warn!("cannot reply on the control socket: {e}");
            self.drop_caller(id);
        }
    }

    /// Replies to a caller with success or an error.
    pub fn reply_done(&mut self, id: Option<u64>, answer: Result<()>) {
        if let Some(id) = id {
            self.reply(id, answer.map(|()| (Response::Done, None)));
        }
    }

    /// Removes a connection.
    pub fn drop_caller(&mut self, id: u64) {
        self.all.retain(|c| c.id != id);
    }

    /// Replies to all waiting callers that the mount has ended.
    pub fn end(&mut self) {
        let waiting: Vec<u64> = self.all.iter().filter(|c| c.waits).map(|c| c.id).collect();
        for id in waiting {
            self.reply_done(Some(id), Err(Error::failed("the mount has ended")));
        }
    }
}
