//! Talks QMP to a QEMU: one JSON object a line over a unix socket. Every wait has an end.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use crate::error::{Code, Error, Result};
use crate::sys::pause;
use crate::sys::unix_socket;

/// The longest message that is read: a list of some thousand block nodes.
const MAX_MESSAGE: usize = 4 << 20;

/// Events that are remembered, each once; all others are dropped as they come.
pub const WATCHED: [&str; 2] = ["RESUME", "RESET"];

/// How long the queue of a QMP socket may be full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a command may take that only asks.
const PATIENCE: Duration = Duration::from_secs(20);

/// A session with one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    unread: Vec<u8>,
    seen: BTreeSet<&'static str>,
    lost: bool,
    next_id: u64,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nothing listens there, it is no QMP, or it does not greet within 20 seconds (another client has it).
    pub fn connect(path: &Path) -> Result<Qmp> {
        let mut qmp = Qmp::open(path)?;
        qmp.greet()?;
        Ok(qmp)
    }

    /// Connects without a word: QEMU may be busy with another session.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn open(path: &Path) -> Result<Qmp> {
        let stream = unix_socket::connect_within(path, CONNECT_TIMEOUT).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                let pids = unix_socket::listeners(&std::path::absolute(path).unwrap_or_else(|_| path.into()));
                pids.into_iter().find_map(|pid| standstill(pid, path)).unwrap_or_else(|| no_answer(path))
            }
            _ => Error::io("cannot connect to the QMP socket", path, e)
                .remedy("start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH here"),
        })?;
        let path = path.to_owned();
        Ok(Qmp { stream, path, unread: vec![], seen: BTreeSet::new(), lost: false, next_id: 1 })
    }

    /// Negotiates, once.
    ///
    /// # Errors
    /// When it is no QMP, or it does not greet within 20 seconds (another client has it).
    pub fn greet(&mut self) -> Result<()> {
        // One that stands still takes connections all the same.
        self.standstill().map_or(Ok(()), Err)?;
        let greeting = self.receive(Instant::now() + PATIENCE)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::failed("this socket does not greet as QMP")
                .at(&self.path)
                .remedy("give the socket of -qmp, not the one of -monitor or a guest's serial port"));
        }
        self.run("qmp_capabilities", json!({})).map(drop)
    }

    /// Runs one command and gives what it returns.
    ///
    /// # Errors
    /// QEMU's own words when it refuses, or no answer within 20 seconds.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.run_passing(command, arguments, None)
    }

    /// The same, and hands a descriptor over with it (for `getfd`).
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_passing(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string().into_bytes();
        line.push(b'\n');
        self.send(&line, fd).inspect_err(|_| self.lost = true)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline).map_err(|e| e.context(format!("QMP command {command}")))?;
            if let Some(event) = message.get("event") {
                self.seen.extend(WATCHED.iter().find(|name| event.as_str() == Some(**name)));
            } else if message.get("id").and_then(Value::as_u64) == Some(id) {
                if let Some(error) = message.get("error") {
                    let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(Error::failed(format!("QEMU refuses {command}: {text}"))
                        .at(&self.path)
                        .remedy("the words are QEMU's: its manual page on QMP and its log say more"));
                }
                return Ok(message.get("return").cloned().unwrap_or(Value::Null));
            }
        }
    }

    /// Forgets the events that have come so far.
    pub fn forget_events(&mut self) {
        self.seen.clear();
    }

    /// True when an event of that name, one of [`WATCHED`], has come and was not forgotten.
    pub fn has_seen(&self, name: &str) -> bool {
        self.seen.contains(name)
    }

    /// True when this session cannot be used any more: QEMU has closed it, or what came was no QMP.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// The state of the VM: `running`, `paused`, `postmigrate`…
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn status(&mut self) -> Result<String> {
        self.text_of("query-status", "status")
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process at the other end, as the kernel knows it.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn peer_pid(&self) -> Result<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream)
            .map_err(|e| Error::io("cannot ask who owns the QMP socket", &self.path, e.into()))?;
        Ok(peer.pid.as_raw_nonzero().get() as u32)
    }

    fn text_of(&mut self, command: &str, field: &str) -> Result<String> {
        let value = self.run(command, json!({}))?;
        value.get(field).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
            Error::failed(format!("QEMU's answer to {command} has no '{field}': {value}"))
                .at(&self.path)
                .remedy("use QEMU 8.2 or newer")
        })
    }

    fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let lost = |e: io::Error| lost(&self.path, e);
        self.stream.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
        let mut rest = line;
        if let Some(fd) = fd {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let sent = rustix::net::sendmsg(
                self.stream.as_fd(),
                &[IoSlice::new(line)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
            .map_err(|e| lost(e.into()))?;
            rest = line.get(sent..).unwrap_or_default();
        }
        (&self.stream).write_all(rest).map_err(lost)
    }

    /// The next message, whatever it is.
    fn receive(&mut self, deadline: Instant) -> Result<Value> {
        self.next_message(deadline).inspect_err(|error| self.lost |= error.code() != Code::TryAgain)
    }

    fn next_message(&mut self, deadline: Instant) -> Result<Value> {
        let mut buffer = vec![0; 64 << 10];
        // What was looked through for the end of a line.
        let mut seen = 0;
        loop {
            if let Some(end) = self.unread.iter().skip(seen).position(|b| *b == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=seen + end).collect();
                seen = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                // The parser refuses more than 128 levels, long before its stack ends.
                return serde_json::from_slice(&line).map_err(|e| {
                    Error::failed(format!("this socket does not speak QMP: {e}"))
                        .at(&self.path)
                        .remedy("give the socket of -qmp")
                });
            }
            seen = self.unread.len();
            if seen > MAX_MESSAGE {
                return Err(Error::failed(format!("a message of QEMU is longer than {MAX_MESSAGE} bytes"))
                    .at(&self.path)
                    .remedy("give the socket of -qmp"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.standstill().unwrap_or_else(|| no_answer(&self.path)));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|e| lost(&self.path, e))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(Error::failed("QEMU has closed the QMP session")
                        .at(&self.path)
                        .remedy("see whether that QEMU still runs, and its log"));
                }
                Ok(got) => self.unread.extend_from_slice(buffer.get(..got).unwrap_or_default()),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(lost(&self.path, e)),
            }
        }
    }

    /// What keeps the process at the other end from running.
    fn standstill(&self) -> Option<Error> {
        standstill(self.peer_pid().ok()?, &self.path)
    }
}

fn no_answer(path: &Path) -> Error {
    Error::try_again("QEMU does not answer")
        .at(path)
        .remedy("a QMP socket serves one client at a time: end the other session, or give QEMU a second -qmp")
}

/// What keeps this QEMU from running.
fn standstill(pid: u32, path: &Path) -> Option<Error> {
    let pause = pause::of(pid)?;
    Some(Error::try_again(format!("QEMU (process {pid}) {pause}")).at(path).remedy(pause.remedy(pid)))
}

fn lost(path: &Path, e: io::Error) -> Error {
    Error::io("cannot talk to QEMU", path, e)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::sync::LazyLock;

    use super::*;
    use crate::error::Code;

    /// A QEMU that greets and then plays these lines, each after it has got one.
    fn played(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for line in ["{\"return\": {}, \"id\": 1}\r\n"].iter().chain(lines) {
                let mut got = String::new();
                reader.read_line(&mut got).unwrap();
                stream.write_all(line.as_bytes()).unwrap();
            }
        });
        (dir, path)
    }

    #[test]
    fn answers_events_and_refusals_are_told_apart() {
        let (_dir, path) = played(&[
            "{\"event\": \"RESUME\"}\n{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": 2}\n",
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
        ]);
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.status().unwrap(), "paused");
        let refusal = qmp.run("frob", json!({})).unwrap_err();
        assert!(refusal.to_string().contains("QEMU refuses frob: no such thing"), "{refusal}");
        assert!(qmp.has_seen("RESUME") && !qmp.has_seen("RESET") && !qmp.is_lost());
        qmp.forget_events();
        assert!(!qmp.has_seen("RESUME"));
        // The player has gone: an error, no hang.
        assert!(qmp.status().is_err());
    }

    #[test]
    fn what_is_too_deep_is_no_qmp() {
        static DEEP: LazyLock<String> = LazyLock::new(|| "[".repeat(1 << 20) + "\n");
        static LINES: LazyLock<[&str; 1]> = LazyLock::new(|| [DEEP.as_str()]);
        let (_dir, path) = played(LINES.as_slice());
        let mut qmp = Qmp::connect(&path).unwrap();
        let error = qmp.status().unwrap_err();
        assert!(error.to_string().contains("does not speak QMP"), "{error}");
        assert!(qmp.is_lost());
    }

    #[test]
    fn a_missing_socket_says_how_to_get_one() {
        let error = Qmp::connect(Path::new("/nonexistent/qmp")).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.remedy_text().unwrap().contains("-qmp unix:"));
    }
}
