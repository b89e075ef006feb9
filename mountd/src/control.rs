//! The control socket, seen from the supervisor: who called, and who still waits for an answer.

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

/// So many may call at a time; the one that has waited longest for nothing makes room.
const MOST: usize = 32;

/// Who cannot be taken in, for want of descriptors, waits so long: the door would be ready again at once.
const REST: Duration = Duration::from_millis(20);

/// Listens in the record's folder, which only its owner can enter.
///
/// # Errors
/// The system's.
pub fn open(record: &RecordDir) -> Result<OwnedFd> {
    let path = record.path().join(CONTROL_SOCKET);
    let open = || -> std::io::Result<OwnedFd> {
        record.remove_socket()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(socket_path(record.folder()))?)?;
        // Its mode is left to the umask.
        chmodat(record.folder(), CONTROL_SOCKET, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
        listen(&socket, MOST as i32)?;
        Ok(socket)
    };
    open().map_err(|e| Error::io("cannot listen on the control socket", &path, e))
}

/// A snapshot as an answer, in a memory file: it may be longer than a message.
///
/// # Errors
/// The system's.
pub fn answer_with(snapshot: &Snapshot) -> Result<(Response, Option<OwnedFd>)> {
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
    /// It keeps its place though it waits for nothing: something holds for as long as it is connected.
    keeps: bool,
}

impl Caller {
    fn may_go(&self) -> bool {
        !self.waits && !self.keeps
    }
}

/// Who called; and who started the mount, which is told once that it answers.
#[derive(Debug, Default)]
pub struct Callers {
    all: Vec<Caller>,
    next: u64,
    starter: Option<Starter>,
    closed_until: Option<Instant>,
}

/// Who started the supervisor, and reads one line about how it went from standard output.
#[derive(Debug)]
pub struct Starter {
    /// It talks to its terminal instead.
    pub foreground: bool,
}

impl Starter {
    /// Says that the mount answers, or why there is none.
    pub fn tell(self, error: Option<&Error>) {
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
    /// Nobody but who started the mount.
    pub fn new(starter: Option<Starter>) -> Callers {
        Callers { starter, ..Callers::default() }
    }

    /// Goes on with a caller that waits for its answer, and gives its number.
    pub fn resume(&mut self, channel: Channel) -> u64 {
        self.next += 1;
        self.all.push(Caller { id: self.next, channel, waits: true, keeps: false });
        self.next
    }

    /// True while the mount has never answered.
    pub fn nobody_served_yet(&self) -> bool {
        self.starter.is_some()
    }

    /// The mount answers.
    pub fn served(&mut self) {
        if let Some(starter) = self.starter.take() {
            starter.tell(None);
        }
    }

    /// Takes out who started the mount, to be told that there is none.
    pub fn starter(&mut self) -> Option<Starter> {
        self.starter.take()
    }

    /// True when one more can be taken in.
    pub fn has_room(&self) -> bool {
        let open = self.closed_until.is_none_or(|until| Instant::now() >= until);
        open && (self.all.len() < MOST || self.all.iter().any(Caller::may_go))
    }

    /// Takes in who waits at the door.
    pub fn accept(&mut self, listener: &OwnedFd) {
        if self.all.len() >= MOST {
            let Some(at) = self.all.iter().position(Caller::may_go) else { return };
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
                log::debug!("the control socket: {e}");
                self.closed_until = Some(Instant::now() + REST);
            }
        }
    }

    /// Whether a caller keeps its place also while it waits for nothing.
    pub fn keep(&mut self, id: u64, keeps: bool) {
        self.all.iter_mut().filter(|c| c.id == id).for_each(|c| c.keeps = keeps);
    }

    /// Their ends, to be listened to.
    pub fn channels(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.all.iter().map(|c| (c.id, c.channel.as_fd()))
    }

    /// The end of one.
    pub fn channel(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.channels().find(|(other, _)| *other == id).map(|(_, fd)| fd)
    }

    /// What a caller asks; it waits for the answer from now on.
    pub fn receive(&mut self, id: u64) -> Option<Received<Request>> {
        let caller = self.all.iter_mut().find(|c| c.id == id)?;
        let received =
            caller.channel.try_receive().inspect_err(|e| log::warn!("a caller is not understood: {e}"));
        let received = received.ok()?;
        caller.waits |= matches!(received, Received::Message(..));
        Some(received)
    }

    /// Answers a caller that may have gone.
    pub fn say(&mut self, id: u64, answer: Result<(Response, Option<OwnedFd>)>) {
        let Some(caller) = self.all.iter_mut().find(|c| c.id == id) else { return };
        caller.waits = false;
        let (response, fd) = answer.unwrap_or_else(|e| (Response::Failed(Failure::from(&e)), None));
        if let Err(e) = caller.channel.try_send(&response, fd.as_ref().map(AsFd::as_fd)) {
            log::warn!("a caller was lost: {e}");
            self.drop_caller(id);
        }
    }

    /// Tells a caller that it is done, or why not.
    pub fn answer(&mut self, id: Option<u64>, answer: Result<()>) {
        if let Some(id) = id {
            self.say(id, answer.map(|()| (Response::Done, None)));
        }
    }

    /// One has gone.
    pub fn drop_caller(&mut self, id: u64) {
        self.all.retain(|c| c.id != id);
    }

    /// The mount is over: that is an answer too.
    pub fn end(&mut self) {
        let waiting: Vec<u64> = self.all.iter().filter(|c| c.waits).map(|c| c.id).collect();
        for id in waiting {
            self.answer(Some(id), Err(Error::failed("the mount is over")));
        }
    }
}
