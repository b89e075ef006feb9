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
use crate::store::random_name;
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
    /// Begins the id of each command: QEMU may answer a command of the session before in this one.
    session: String,
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
        let (path, session) = (path.to_owned(), random_name()?);
        Ok(Qmp { stream, path, unread: vec![], seen: BTreeSet::new(), lost: false, session, next_id: 1 })
    }

    /// Negotiates, once.
    ///
    /// QEMU sends what the session before has not received to the next one, ahead of the greeting: messages, and at the
    /// beginning the rest of one that was cut. All that is skipped.
    ///
    /// # Errors
    /// When it is no QMP, or it does not greet within 20 seconds (another client has it).
    pub fn greet(&mut self) -> Result<()> {
        // One that stands still takes connections all the same.
        self.standstill().map_or(Ok(()), Err)?;
        let deadline = Instant::now() + PATIENCE;
        let mut is_first = true;
        loop {
            let line = self.next_line(deadline)?;
            match serde_json::from_slice::<Value>(&line) {
                Ok(message) if message.get("QMP").is_some() => break,
                Ok(message)
                    if ["event", "return", "error"].iter().any(|word| message.get(word).is_some()) => {}
                Err(_) if is_first && line.trim_ascii_end().ends_with(b"}") => {}
                Ok(_) | Err(_) => {
                    self.lost = true;
                    return Err(Error::failed("this socket does not greet as QMP").at(&self.path).remedy(
                        "give the socket of -qmp, not the one of -monitor or a guest's serial port",
                    ));
                }
            }
            is_first = false;
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
        let id = format!("{}-{}", self.session, self.next_id);
        self.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string().into_bytes();
        line.push(b'\n');
        self.send(&line, fd).inspect_err(|_| self.lost = true)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline).map_err(|e| e.context(format!("QMP command {command}")))?;
            if let Some(event) = message.get("event") {
                self.seen.extend(WATCHED.iter().find(|name| event.as_str() == Some(**name)));
            } else if message.get("id").and_then(Value::as_str) == Some(&id) {
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
        let line = self.next_line(deadline)?;
        // The parser refuses more than 128 levels, long before its stack ends.
        serde_json::from_slice(&line).map_err(|e| {
            self.lost = true;
            Error::failed(format!("this socket does not speak QMP: {e}"))
                .at(&self.path)
                .remedy("give the socket of -qmp")
        })
    }

    fn next_line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        self.read_line(deadline).inspect_err(|error| self.lost |= error.code() != Code::TryAgain)
    }

    fn read_line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
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
                return Ok(line);
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

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\r\n";

    /// A QEMU that greets and then plays these lines, each after it has got one. `ID` becomes the id of what it has got.
    fn played(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        played_after(GREETING, lines)
    }

    fn played_after(greeting: &'static str, lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for line in ["{\"return\": {}, \"id\": ID}\r\n"].iter().chain(lines) {
                let mut got = String::new();
                reader.read_line(&mut got).unwrap();
                let got: Value = serde_json::from_str(&got).unwrap_or_default();
                stream.write_all(line.replace("ID", &got["id"].to_string()).as_bytes()).unwrap();
            }
        });
        (dir, path)
    }

    #[test]
    fn answers_events_and_refusals_are_told_apart() {
        let (_dir, path) = played(&[
            "{\"event\": \"RESUME\"}\n{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": ID}\n",
            "{\"id\": ID, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
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
    fn what_the_session_before_has_left_is_skipped() {
        static LEFT: LazyLock<String> = LazyLock::new(|| {
            let left = "\"id\": \"a-7\"}\r\n{\"event\": \"STOP\"}\r\n{\"return\": {}, \"id\": \"a-8\"}\r\n";
            format!("{left}{GREETING}")
        });
        let (_dir, path) = played_after(
            LEFT.as_str(),
            &[
                "{\"return\": {\"status\": \"paused\"}, \"id\": \"a-9\"}\n{\"return\": {\"status\": \"running\"}, \"id\": ID}\n",
            ],
        );
        assert_eq!(Qmp::connect(&path).unwrap().status().unwrap(), "running");
        for no_qmp in ["heartbeat 7\nheartbeat 8\n", "(qemu) \n", "{}\n", "}\n}\n"] {
            let (_dir, path) = played_after(no_qmp, &[]);
            let error = Qmp::connect(&path).unwrap_err();
            assert!(error.to_string().contains("does not greet as QMP"), "{error}");
        }
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
