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

/// Largest number of connected callers. Beyond that, the oldest caller without a pending request is disconnected.
const MAX_CALLERS: usize = 32;

/// Delay after a failed accept(2), as poll(2) would report the socket as ready again at once.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Creates the control socket in the directory of the record, which only the owner of the directory can search.
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
        // The umask determines the mode that bind(2) gives the socket.
        chmodat(record.folder(), CONTROL_SOCKET, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
        listen(&socket, i32::try_from(MAX_CALLERS).unwrap_or(i32::MAX))?;
        Ok(socket)
    };
    open().map_err(|e| Error::io("cannot listen on the control socket", &path, e))
}

/// Returns the response with the mount state. The state is in a memory file, because its size may exceed that of a
/// message.
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
    /// True while a request of the caller is pending.
    is_waiting: bool,
    /// True while the mount keeps templates condemned for this connection: the caller must not be disconnected.
    must_keep: bool,
}

impl Caller {
    fn may_be_dropped(&self) -> bool {
        !self.is_waiting && !self.must_keep
    }
}

/// Callers of the control socket, and the process that started the mount: it receives one report, when the mount is
/// served or startup has failed.
#[derive(Debug, Default)]
pub struct Callers {
    all: Vec<Caller>,
    last_id: u64,
    starter: Option<Starter>,
    retry_at: Option<Instant>,
}

/// The process that started the supervisor. Reads one line with the outcome of startup from the supervisor's standard
/// output.
#[derive(Debug)]
pub struct Starter {
    /// True if the supervisor runs in the foreground: an error is then written to standard error instead.
    pub foreground: bool,
}

impl Starter {
    /// Reports that the mount is served, or the error that startup failed with.
    pub fn report(self, error: Option<&Error>) {
        if self.foreground {
            if let Some(error) = error {
                stencilfs::print_line!("error: {error}");
                if let Some(hint) = error.hint_text() {
                    stencilfs::print_line!("hint: {hint}");
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
    /// Creates an empty list of callers. `starter` is the process that started the mount, if it still waits for the
    /// outcome.
    pub fn new(starter: Option<Starter>) -> Callers {
        Callers { starter, ..Callers::default() }
    }

    /// Adds a caller that made its request before the execve(2) of this program, and waits for the response.
    pub fn resume(&mut self, channel: Channel) -> CallerId {
        self.add(channel, true)
    }

    fn add(&mut self, channel: Channel, is_waiting: bool) -> CallerId {
        self.last_id += 1;
        let id = CallerId(self.last_id);
        self.all.push(Caller { id, channel, is_waiting, must_keep: false });
        id
    }

    /// Reports to the process that started the mount that the mount is served.
    pub fn report_serving(&mut self) {
        if let Some(starter) = self.starter.take() {
            starter.report(None);
        }
    }

    /// Removes and returns the process that started the mount, if it has not received its report yet.
    pub fn take_starter(&mut self) -> Option<Starter> {
        self.starter.take()
    }

    /// Returns true if another caller can be accepted.
    pub fn has_room(&self) -> bool {
        let ready = self.retry_at.is_none_or(|at| Instant::now() >= at);
        ready && (self.all.len() < MAX_CALLERS || self.all.iter().any(Caller::may_be_dropped))
    }

    /// Accepts a caller. Returns the caller that was disconnected to make space, if any.
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

    /// Sets whether a caller must stay connected while it has no pending request.
    pub fn keep(&mut self, id: CallerId, keep: bool) {
        self.all.iter_mut().filter(|c| c.id == id).for_each(|c| c.must_keep = keep);
    }

    /// Returns the sockets of all callers.
    pub fn channels(&self) -> impl Iterator<Item = (CallerId, BorrowedFd<'_>)> {
        self.all.iter().map(|c| (c.id, c.channel.as_fd()))
    }

    /// Returns the socket of a caller.
    pub fn channel(&self, id: CallerId) -> Option<BorrowedFd<'_>> {
        self.channels().find(|(other, _)| *other == id).map(|(_, fd)| fd)
    }

    /// Receives a request; the caller counts as waiting until [`respond`](Self::respond). Returns `None` for an unknown
    /// caller, or if the message is not a valid request.
    pub fn receive(&mut self, id: CallerId) -> Option<Received<Request>> {
        let caller = self.all.iter_mut().find(|c| c.id == id)?;
        let received = caller.channel.try_receive();
        let received =
            received.inspect_err(|e| log::warn!("cannot parse the request of a caller: {e}")).ok()?;
        caller.is_waiting |= matches!(received, Received::Message(..));
        Some(received)
    }

    /// Responds to a caller. Returns false if the caller has closed its connection.
    pub fn respond(&mut self, id: CallerId, response: Result<Response>, file: Option<OwnedFd>) -> bool {
        let Some(caller) = self.all.iter_mut().find(|c| c.id == id) else { return false };
        caller.is_waiting = false;
        let response = response.unwrap_or_else(|e| Response::Failed(Failure::from(&e)));
        if let Err(e) = caller.channel.try_send(&response, file.as_ref().map(AsFd::as_fd)) {
            log::warn!("cannot respond to a caller: {e}");
            self.drop_caller(id);
            return false;
        }
        true
    }

    /// Removes a caller and closes its socket.
    pub fn drop_caller(&mut self, id: CallerId) {
        self.all.retain(|c| c.id != id);
    }

    /// Responds to all waiting callers with the error that the mount has ended.
    pub fn fail_waiting(&mut self) {
        let waiting: Vec<CallerId> = self.all.iter().filter(|c| c.is_waiting).map(|c| c.id).collect();
        for id in waiting {
            self.respond(id, Err(Error::failed("the mount has ended")), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a listening socket at an abstract address, and a function that connects to the socket.
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

    fn newest(callers: &Callers) -> CallerId {
        callers.channels().last().expect("a caller").0
    }

    #[test]
    fn a_request_gets_its_response() {
        let (listener, connect) = listener("stencil-callers-a");
        let mut callers = Callers::new(None);
        let caller = connect();
        assert_eq!(callers.accept(&listener), None);
        let id = newest(&callers);
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
    fn a_new_caller_replaces_the_oldest_idle_caller() {
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
        assert_eq!(
            callers.accept(&listener),
            Some(ids[2]),
            "the first caller must be kept, the second has a pending request"
        );
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
    fn accept_is_retried_after_a_delay() {
        let (listener, _connect) = listener("stencil-callers-c");
        let mut callers = Callers::new(None);
        assert_eq!(callers.accept(&listener), None);
        assert!(!callers.has_room(), "accept(2) has failed: no caller is connected");
        while !callers.has_room() {
            std::thread::sleep(ACCEPT_RETRY_INTERVAL / 4);
        }
    }

    #[test]
    fn waiting_callers_get_an_error_when_the_mount_ends() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut callers = Callers::new(Some(Starter { foreground: true }));
        callers.resume(theirs);
        callers.fail_waiting();
        let (response, _) = ours.receive::<Response>().unwrap().unwrap();
        let Response::Failed(failure) = response else { panic!("{response:?}") };
        assert_eq!(failure.into_error().to_string(), "the mount has ended");
        assert!(callers.take_starter().is_some() && callers.take_starter().is_none());
        callers.report_serving();
    }
}
