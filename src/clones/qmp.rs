//! Talks QMP to a QEMU: one JSON object a line over a unix socket. Every wait has an end.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// No message of QEMU's is longer; more means that the other end is no QEMU.
const LONGEST_MESSAGE: usize = 16 << 20;

/// How long a command may take that only asks.
const PATIENCE: Duration = Duration::from_secs(20);

/// The capability by which device state comes without the RAM.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// A session with one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    unread: Vec<u8>,
    events: VecDeque<Value>,
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
        let stream = UnixStream::connect(path).map_err(|e| {
            Error::io("cannot connect to the QMP socket", path, e)
                .remedy("start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH here")
        })?;
        Ok(Qmp { stream, path: path.to_owned(), unread: vec![], events: VecDeque::new(), next_id: 1 })
    }

    /// Negotiates, once.
    ///
    /// # Errors
    /// When it is no QMP, or it does not greet within 20 seconds (another client has it).
    pub fn greet(&mut self) -> Result<()> {
        let greeting = self.receive(Instant::now() + PATIENCE).map_err(|e| {
            e.remedy(
                "a QMP socket serves one client at a time: end the other session, or give QEMU a second -qmp",
            )
        })?;
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
        self.send(&line, fd)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline).map_err(|e| e.context(format!("QMP command {command}")))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
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

    /// Waits for an event of that name; those of other names are dropped.
    ///
    /// # Errors
    /// When it does not come by the deadline, or QEMU has gone.
    pub fn wait_event(&mut self, name: &str, deadline: Instant) -> Result<Value> {
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .receive(deadline)
                    .map_err(|e| e.context(format!("waiting for QEMU's event {name}")))?,
            };
            if is_event(&message, name) {
                return Ok(message.get("data").cloned().unwrap_or(Value::Null));
            }
        }
    }

    /// Forgets the events that came before the last one of that name, and this one.
    pub fn forget_until(&mut self, name: &str) {
        if let Some(at) = self.events.iter().rposition(|event| is_event(event, name)) {
            self.events.drain(..=at);
        }
    }

    /// True when an event of that name has come and was not forgotten.
    pub fn has_seen(&self, name: &str) -> bool {
        self.events.iter().any(|event| is_event(event, name))
    }

    /// The state of the VM: `running`, `paused`, `postmigrate`…
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn status(&mut self) -> Result<String> {
        self.text_of("query-status", "status")
    }

    /// Whether a migration leaves out RAM that lies in a shared file. Gives what was set before.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn ignore_shared(&mut self, on: bool) -> Result<bool> {
        let before = self.ignores_shared()?;
        if before != on {
            let wanted = json!({"capabilities": [{"capability": IGNORE_SHARED, "state": on}]});
            self.run("migrate-set-capabilities", wanted)?;
        }
        Ok(before)
    }

    /// Whether a migration leaves out RAM that lies in a shared file.
    ///
    /// # Errors
    /// As [`run`](Self::run), or when this QEMU knows no such thing.
    pub fn ignores_shared(&mut self) -> Result<bool> {
        let known = self.run("query-migrate-capabilities", json!({}))?;
        let is_it = |c: &&Value| c.get("capability").and_then(Value::as_str) == Some(IGNORE_SHARED);
        let state = known.as_array().and_then(|all| all.iter().find(is_it));
        state.and_then(|c| c.get("state")).and_then(Value::as_bool).ok_or_else(|| {
            Error::failed(format!("this QEMU does not know the migration capability {IGNORE_SHARED}"))
                .at(&self.path)
                .remedy("use QEMU 8.2 or newer")
        })
    }

    /// Waits until the migration that was started has come to its end.
    ///
    /// # Errors
    /// When it fails, in QEMU's words, or does not end by the deadline.
    pub fn wait_migrated(&mut self, deadline: Instant) -> Result<()> {
        let mut pause = Duration::from_millis(1);
        loop {
            let info = self.run("query-migrate", json!({}))?;
            match info.get("status").and_then(Value::as_str).unwrap_or("none") {
                "completed" => return Ok(()),
                status @ ("failed" | "cancelled") => {
                    let reason = info.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(Error::failed(format!(
                        "the migration of device state has {status}: {reason}"
                    ))
                    .at(&self.path)
                    .remedy("QEMU's log says which device; that one has to go, or be one that can migrate"));
                }
                _ if Instant::now() >= deadline => {
                    return Err(Error::try_again("the migration of device state does not come to an end")
                        .at(&self.path)
                        .remedy(
                            "see query-migrate on the same socket; a host that is less busy takes less long",
                        ));
                }
                _ => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
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
        let lost = |e: io::Error| Error::io("cannot talk to QEMU", &self.path, e);
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
        let lost = |path: &Path, e: io::Error| Error::io("cannot talk to QEMU", path, e);
        loop {
            if let Some(end) = self.unread.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|e| {
                    Error::failed(format!("this socket does not speak QMP: {e}"))
                        .at(&self.path)
                        .remedy("give the socket of -qmp")
                });
            }
            if self.unread.len() > LONGEST_MESSAGE {
                return Err(Error::failed("QEMU sends a message without an end")
                    .at(&self.path)
                    .remedy("give the socket of -qmp"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::try_again("QEMU does not answer")
                    .at(&self.path)
                    .remedy("another program may hold its QMP session: QEMU speaks with one at a time"));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|e| lost(&self.path, e))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(Error::failed("QEMU has closed the QMP session")
                        .at(&self.path)
                        .remedy("see whether that QEMU still runs, and its log"));
                }
                Ok(got) => self.unread.extend_from_slice(&buffer[..got]),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(lost(&self.path, e)),
            }
        }
    }
}

fn is_event(message: &Value, name: &str) -> bool {
    message.get("event").and_then(Value::as_str) == Some(name)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

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
            "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": 2}\n",
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
        ]);
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.status().unwrap(), "paused");
        let refusal = qmp.run("frob", json!({})).unwrap_err();
        assert!(refusal.to_string().contains("QEMU refuses frob: no such thing"), "{refusal}");
        qmp.wait_event("STOP", Instant::now() + Duration::from_secs(1)).unwrap();
        // The player has gone: an error, no hang.
        assert!(qmp.status().is_err());
    }

    #[test]
    fn waiting_has_an_end() {
        let (_dir, path) = played(&["", ""]);
        let mut qmp = Qmp::connect(&path).unwrap();
        let error = qmp.wait_event("STOP", Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.code(), Code::TryAgain, "{error}");
    }

    #[test]
    fn a_missing_socket_says_how_to_get_one() {
        let error = Qmp::connect(Path::new("/nonexistent/qmp")).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.remedy_text().unwrap().contains("-qmp unix:"));
    }
}
