//! Callers of the control socket, and the process that started the mount.

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
use stencilfs::sys::memory::memfd;
use stencilfs::units::Bytes;

use super::event::CallerId;

/// Most callers at a time; beyond that, the oldest that waits for nothing is dropped.
const MAX_CALLERS: usize = 32;

/// After a failed accept(2) the socket is left alone for this long: it would be ready again at once.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Creates the control socket in the directory of the record, which only its owner can enter.
///
/// # Errors
/// Returns an error if the socket cannot be created.
pub fn listen_at(record: &RecordDir) -> Result<OwnedFd> {
    let path = record.path().join(CONTROL_SOCKET);
    let open = || -> std::io::Result<OwnedFd> {
        record.remove_socket()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(socket_path(record.folder()))?)?;
        // bind(2) leaves the mode to the umask.
        chmodat(record.folder(), CONTROL_SOCKET, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
        listen(&socket, i32::try_from(MAX_CALLERS).unwrap_or(i32::MAX))?;
        Ok(socket)
    };
    open().map_err(|e| Error::io("cannot listen on the control socket", &path, e))
}

/// The mount state as a response: in a memory file, because it may exceed the length of a message.
///
/// # Errors
/// Returns an error if the memory file cannot be written.
pub fn state_response(snapshot: &Snapshot) -> Result<(Response, OwnedFd)> {
    let write = || -> std::io::Result<OwnedFd> {
        let mut file = File::from(memfd::create("stencil-snapshot", Bytes::ZERO)?);
        file.write_all(&serde_json::to_vec(snapshot)?)?;
        Ok(file.into())
    };
    let file = write().map_err(|e| Error::failed("cannot write a snapshot").because(e))?;
    Ok((Response::Snapshot, file))
}

#[derive(Debug)]
struct Caller {
    id: CallerId,
    channel: Channel,
    waits: bool,
    /// Not dropped for newer callers though it waits for nothing: the mount holds something while it is connected.
    keep: bool,
}

impl Caller {
    fn may_be_dropped(&self) -> bool {
        !self.waits && !self.keep
    }
}

/// Callers of the control socket; and the process that started the mount, which is told once that the mount serves.
#[derive(Debug, Default)]
pub struct Callers {
    all: Vec<Caller>,
    last_id: u64,
    starter: Option<Starter>,
    retry_at: Option<Instant>,
}

/// The process that started the supervisor, and reads one line about the outcome from its standard output.
#[derive(Debug)]
pub struct Starter {
    /// True for a supervisor that stays on its terminal: the outcome goes there.
    pub foreground: bool,
}

impl Starter {
    /// Reports that the mount serves, or why there is none.
    pub fn tell(self, error: Option<&Error>) {
        if self.foreground {
            if let Some(error) = error {
                stencilfs::say!("error: {error}");
                if let Some(hint) = error.hint_text() {
                    stencilfs::say!("hint: {hint}");
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
    /// No callers, and the process that started the mount, if it still waits.
    pub fn new(starter: Option<Starter>) -> Callers {
        Callers { starter, ..Callers::default() }
    }

    /// Adds a caller that waits for a response, from before this supervisor became another program.
    pub fn resume(&mut self, channel: Channel) -> CallerId {
        self.add(channel, true)
    }

    fn add(&mut self, channel: Channel, waits: bool) -> CallerId {
        self.last_id += 1;
        let id = CallerId(self.last_id);
        self.all.push(Caller { id, channel, waits, keep: false });
        id
    }

    /// The mount serves.
    pub fn served(&mut self) {
        if let Some(starter) = self.starter.take() {
            starter.tell(None);
        }
    }

    /// Takes out the process that started the mount, to be told that there is none.
    pub fn take_starter(&mut self) -> Option<Starter> {
        self.starter.take()
    }

    /// True if one more caller can be accepted.
    pub fn has_room(&self) -> bool {
        let ready = self.retry_at.is_none_or(|at| Instant::now() >= at);
        ready && (self.all.len() < MAX_CALLERS || self.all.iter().any(Caller::may_be_dropped))
    }

    /// Accepts a caller; returns the caller that was dropped for it.
    pub fn accept(&mut self, listener: &OwnedFd) -> Option<CallerId> {
        let mut dropped = None;
        if self.all.len() >= MAX_CALLERS {
            let at = self.all.iter().position(Caller::may_be_dropped)?;
            dropped = Some(self.all.remove(at).id);
        }
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => drop(self.add(Channel::new(socket), false)),
            Err(e) => {
                log::debug!("cannot accept on the control socket: {e}");
                self.retry_at = Some(Instant::now() + ACCEPT_RETRY_INTERVAL);
            }
        }
        dropped
    }

    /// Keeps a caller while it waits for nothing, or no longer.
    pub fn keep(&mut self, id: CallerId, keep: bool) {
        self.all.iter_mut().filter(|c| c.id == id).for_each(|c| c.keep = keep);
    }

    /// Sockets of all callers.
    pub fn channels(&self) -> impl Iterator<Item = (CallerId, BorrowedFd<'_>)> {
        self.all.iter().map(|c| (c.id, c.channel.as_fd()))
    }

    /// The socket of a caller.
    pub fn channel(&self, id: CallerId) -> Option<BorrowedFd<'_>> {
        self.channels().find(|(other, _)| *other == id).map(|(_, fd)| fd)
    }

    /// Receives a request; its caller waits for the response from now on. `None` if the socket carries what is no request.
    pub fn receive(&mut self, id: CallerId) -> Option<Received<Request>> {
        let caller = self.all.iter_mut().find(|c| c.id == id)?;
        let received = caller.channel.try_receive();
        let received =
            received.inspect_err(|e| log::warn!("cannot parse the request of a caller: {e}")).ok()?;
        caller.waits |= matches!(received, Received::Message(..));
        Some(received)
    }

    /// Responds to a caller. False if the caller is gone.
    pub fn respond(&mut self, id: CallerId, response: Result<Response>, file: Option<OwnedFd>) -> bool {
        let Some(caller) = self.all.iter_mut().find(|c| c.id == id) else { return false };
        caller.waits = false;
        let response = response.unwrap_or_else(|e| Response::Failed(Failure::from(&e)));
        if let Err(e) = caller.channel.try_send(&response, file.as_ref().map(AsFd::as_fd)) {
            log::warn!("cannot respond to a caller: {e}");
            self.drop_caller(id);
            return false;
        }
        true
    }

    /// Drops a caller that is gone.
    pub fn drop_caller(&mut self, id: CallerId) {
        self.all.retain(|c| c.id != id);
    }

    /// Responds to all that wait: the mount is over.
    pub fn end(&mut self) {
        let waiting: Vec<CallerId> = self.all.iter().filter(|c| c.waits).map(|c| c.id).collect();
        for id in waiting {
            self.respond(id, Err(Error::failed("the mount has ended")), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listening socket at an abstract address, and a way to connect to it.
    fn listener(name: &str) -> (OwnedFd, impl Fn() -> Channel) {
        let address =
            SocketAddrUnix::new_abstract_name(format!("{name}-{}", std::process::id()).as_bytes()).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&socket, &address).unwrap();
        listen(&socket, 64).unwrap();
        let connect = move || {
            let caller =
                socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            rustix::net::connect(&caller, &address).unwrap();
            Channel::new(caller)
        };
        (socket, connect)
    }

    fn only(callers: &Callers) -> CallerId {
        callers.channels().last().expect("a caller").0
    }

    #[test]
    fn a_request_gets_its_response() {
        let (listener, connect) = listener("stencil-callers-a");
        let mut callers = Callers::new(None);
        let caller = connect();
        assert_eq!(callers.accept(&listener), None);
        let id = only(&callers);
        assert!(matches!(callers.receive(id), Some(Received::Nothing)));
        caller.send(&Request::Refresh, None).unwrap();
        assert!(matches!(callers.receive(id), Some(Received::Message(Request::Refresh, None))));
        assert!(callers.respond(id, Ok(Response::Done), None));
        assert!(matches!(caller.receive::<Response>().unwrap(), Some((Response::Done, None))));
        caller.send(&"no request", None).unwrap();
        assert!(callers.receive(id).is_none());
        drop(caller);
        assert!(matches!(callers.receive(id), Some(Received::Closed)));
        assert!(!callers.respond(id, Ok(Response::Done), None), "the caller is gone");
        assert!(callers.channel(id).is_none());
        assert!(callers.receive(id).is_none());
    }

    #[test]
    fn the_oldest_caller_that_waits_for_nothing_makes_room() {
        let (listener, connect) = listener("stencil-callers-b");
        let mut callers = Callers::new(None);
        let all: Vec<Channel> = (0..MAX_CALLERS).map(|_| connect()).collect();
        all.iter().for_each(|_| assert_eq!(callers.accept(&listener), None));
        let ids: Vec<CallerId> = callers.channels().map(|(id, _)| id).collect();
        callers.keep(ids[0], true);
        all[1].send(&Request::Refresh, None).unwrap();
        callers.receive(ids[1]);
        let _newer = connect();
        assert!(callers.has_room());
        assert_eq!(callers.accept(&listener), Some(ids[2]), "the first is kept, the second waits");
        callers
            .channels()
            .map(|(id, _)| id)
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|id| callers.keep(id, true));
        assert!(!callers.has_room());
        let _one_more = connect();
        assert_eq!(callers.accept(&listener), None);
        assert_eq!(callers.channels().count(), MAX_CALLERS);
    }

    #[test]
    fn a_failed_accept_rests_for_a_moment() {
        let (listener, _connect) = listener("stencil-callers-c");
        let mut callers = Callers::new(None);
        assert_eq!(callers.accept(&listener), None);
        assert!(!callers.has_room(), "nobody has called");
        while !callers.has_room() {
            std::thread::sleep(ACCEPT_RETRY_INTERVAL / 4);
        }
    }

    #[test]
    fn who_waits_is_told_of_the_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut callers = Callers::new(Some(Starter { foreground: true }));
        callers.resume(theirs);
        callers.end();
        let (response, _) = ours.receive::<Response>().unwrap().unwrap();
        let Response::Failed(failure) = response else { panic!("{response:?}") };
        assert_eq!(failure.into_error().to_string(), "the mount has ended");
        assert!(callers.take_starter().is_some() && callers.take_starter().is_none());
        callers.served();
    }
}
