//! A QMP client: one JSON object per line over a Unix socket. Every wait has a timeout.

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
use crate::sys::process::paused;
use crate::sys::socket::unix;

/// Maximum length of a message in bytes; enough for a list of some thousand block nodes.
const MAX_MESSAGE: usize = 4 << 20;

/// Events that a session records, each once; all other events are ignored.
pub const WATCHED: [&str; 2] = ["RESUME", "RESET"];

/// Timeout for connecting while the listen queue of the QMP socket is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout of the greeting and of each command; no command waits for a long operation.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// A QMP session.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    unread: Vec<u8>,
    seen: BTreeSet<&'static str>,
    lost: bool,
    /// Prefix of command ids: QEMU may send the reply to a command of the previous session in this one.
    session: String,
    next_id: u64,
}

impl Qmp {
    /// Connects and negotiates capabilities.
    ///
    /// # Errors
    /// Returns an error if nothing listens on the socket or the listener does not speak QMP, and [`Code::TryAgain`] if
    /// QEMU does not greet within 20 s, because it does not run or serves another client.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let mut qmp = Qmp::open(path)?;
        qmp.greet()?;
        Ok(qmp)
    }

    /// Connects without negotiation, which would have to wait for the end of another session.
    ///
    /// # Errors
    /// Returns an error if nothing listens on the socket, and [`Code::TryAgain`] if its listen queue is full.
    pub fn open(path: &Path) -> Result<Qmp> {
        let stream = unix::connect_within(path, CONNECT_TIMEOUT).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                let pids = unix::listeners(&std::path::absolute(path).unwrap_or_else(|_| path.into()));
                pids.into_iter()
                    .find_map(|pid| paused_error(pid, path))
                    .unwrap_or_else(|| timeout_error(path))
            }
            _ => Error::io("cannot connect to the QMP socket", path, e).hint(
                "start QEMU with -qmp unix:PATH,server=on,wait=off, or a Firecracker with --api-sock PATH, and pass that PATH",
            ),
        })?;
        let (path, session) = (path.to_owned(), random_name()?);
        Ok(Qmp { stream, path, unread: vec![], seen: BTreeSet::new(), lost: false, session, next_id: 1 })
    }

    /// Waits for the greeting and negotiates capabilities; to be called once.
    ///
    /// QEMU sends messages that the previous session did not receive to the next session, ahead of the greeting,
    /// beginning with the rest of a partly sent message. All of them are skipped.
    ///
    /// # Errors
    /// Returns an error if the listener does not speak QMP, and [`Code::TryAgain`] if QEMU does not greet within 20 s,
    /// because it does not run or serves another client.
    pub fn greet(&mut self) -> Result<()> {
        // The kernel accepts connections for a stopped process too.
        self.paused_error().map_or(Ok(()), Err)?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
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
                    return Err(Error::failed("missing QMP greeting on the socket")
                        .at(&self.path)
                        .hint("pass the socket of -qmp, not that of -monitor or of a guest's serial port"));
                }
            }
            is_first = false;
        }
        self.run("qmp_capabilities", json!({})).map(drop)
    }

    /// Runs a command and returns its result.
    ///
    /// # Errors
    /// Returns an error with QEMU's text if QEMU refuses the command, and [`Code::TryAgain`] if QEMU does not reply
    /// within 20 s.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.run_passing(command, arguments, None)
    }

    /// Same as [`run`](Self::run), but passes a file descriptor with the command (for `getfd`).
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
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
        let deadline = Instant::now() + REPLY_TIMEOUT;
        loop {
            let message = self.receive(deadline).map_err(|e| e.context(format!("QMP command {command}")))?;
            if let Some(event) = message.get("event") {
                self.seen.extend(WATCHED.iter().find(|name| event.as_str() == Some(**name)));
            } else if message.get("id").and_then(Value::as_str) == Some(&id) {
                if let Some(error) = message.get("error") {
                    let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(Error::failed(format!("QEMU refused {command}: {text}"))
                        .at(&self.path)
                        .hint("see QEMU's log, and the QMP reference manual for this error of QEMU"));
                }
                return Ok(message.get("return").cloned().unwrap_or(Value::Null));
            }
        }
    }

    /// Discards the recorded events.
    pub fn forget_events(&mut self) {
        self.seen.clear();
    }

    /// Returns true if an event of this name, one of [`WATCHED`], was recorded.
    pub fn has_seen(&self, name: &str) -> bool {
        self.seen.contains(name)
    }

    /// Returns true if the session is unusable: QEMU has closed it, or the connection failed or carried invalid QMP.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Returns the state of the VM: `running`, `paused`, `postmigrate`…
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
    pub fn status(&mut self) -> Result<String> {
        self.text_of("query-status", "status")
    }

    /// Returns the path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the process that listens on the socket (`SO_PEERCRED`).
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn peer_pid(&self) -> Result<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream)
            .map_err(|e| Error::io("cannot get the process of the QMP socket", &self.path, e.into()))?;
        Ok(peer.pid.as_raw_nonzero().get().cast_unsigned())
    }

    fn text_of(&mut self, command: &str, field: &str) -> Result<String> {
        let value = self.run(command, json!({}))?;
        value.get(field).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
            Error::failed(format!("invalid reply to {command}: missing '{field}': {value}"))
                .at(&self.path)
                .hint("use QEMU 8.2 or newer")
        })
    }

    fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let lost = |e: io::Error| lost(&self.path, e);
        self.stream.set_write_timeout(Some(REPLY_TIMEOUT)).map_err(lost)?;
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

    /// Receives the next message of any kind.
    fn receive(&mut self, deadline: Instant) -> Result<Value> {
        let line = self.next_line(deadline)?;
        // serde_json refuses more than 128 levels of nesting, so a hostile peer cannot overflow the stack.
        serde_json::from_slice(&line).map_err(|e| {
            self.lost = true;
            Error::failed(format!("invalid QMP message: {e}")).at(&self.path).hint("pass the socket of -qmp")
        })
    }

    fn next_line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        self.read_line(deadline).inspect_err(|error| self.lost |= error.code() != Code::TryAgain)
    }

    fn read_line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 64 << 10];
        // Number of bytes that were already searched for a newline.
        let mut searched = 0;
        loop {
            if let Some(end) = self.unread.iter().skip(searched).position(|b| *b == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=searched + end).collect();
                searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(line);
            }
            searched = self.unread.len();
            if searched > MAX_MESSAGE {
                return Err(Error::failed(format!("invalid QMP message: longer than {MAX_MESSAGE} bytes"))
                    .at(&self.path)
                    .hint("pass the socket of -qmp"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.paused_error().unwrap_or_else(|| timeout_error(&self.path)));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|e| lost(&self.path, e))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(Error::failed("QEMU closed the QMP session")
                        .at(&self.path)
                        .hint("check whether QEMU still runs, and see its log"));
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

    /// Returns an error if QEMU is stopped, traced or frozen.
    fn paused_error(&self) -> Option<Error> {
        paused_error(self.peer_pid().ok()?, &self.path)
    }
}

fn timeout_error(path: &Path) -> Error {
    Error::try_again("timed out waiting for QEMU on the QMP socket").at(path).hint(
        "end the other session, or start QEMU with a second -qmp: a QMP socket serves one client at a time",
    )
}

/// Returns an error if this QEMU process is stopped, traced or frozen.
fn paused_error(pid: u32, path: &Path) -> Option<Error> {
    let pause = paused::of(pid)?;
    Some(Error::try_again(format!("QEMU (process {pid}) {pause}")).at(path).hint(pause.remedy(pid)))
}

fn lost(path: &Path, e: io::Error) -> Error {
    Error::io("cannot exchange messages with QEMU", path, e)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::sync::LazyLock;

    use super::*;
    use crate::error::Code;

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\r\n";

    /// Starts a fake QEMU that greets, then sends one of these lines for each command; `ID` is replaced by the
    /// command's id.
    fn fake_qemu(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        fake_qemu_with_greeting(GREETING, lines)
    }

    fn fake_qemu_with_greeting(
        greeting: &'static str,
        lines: &'static [&'static str],
    ) -> (tempfile::TempDir, PathBuf) {
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
    fn tells_replies_events_and_errors_apart() {
        let (_dir, path) = fake_qemu(&[
            "{\"event\": \"RESUME\"}\n{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": ID}\n",
            "{\"id\": ID, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n",
        ]);
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.status().unwrap(), "paused");
        let refusal = qmp.run("frob", json!({})).unwrap_err();
        assert!(refusal.to_string().contains("QEMU refused frob: no such thing"), "{refusal}");
        assert!(qmp.has_seen("RESUME") && !qmp.has_seen("RESET") && !qmp.is_lost());
        qmp.forget_events();
        assert!(!qmp.has_seen("RESUME"));
        // The fake QEMU has exited: the command fails and does not hang.
        assert!(qmp.status().is_err());
    }

    #[test]
    fn skips_messages_of_the_previous_session() {
        static LEFT: LazyLock<String> = LazyLock::new(|| {
            let left = "\"id\": \"a-7\"}\r\n{\"event\": \"STOP\"}\r\n{\"return\": {}, \"id\": \"a-8\"}\r\n";
            format!("{left}{GREETING}")
        });
        let (_dir, path) = fake_qemu_with_greeting(
            LEFT.as_str(),
            &[
                "{\"return\": {\"status\": \"paused\"}, \"id\": \"a-9\"}\n{\"return\": {\"status\": \"running\"}, \"id\": ID}\n",
            ],
        );
        assert_eq!(Qmp::connect(&path).unwrap().status().unwrap(), "running");
        for no_qmp in ["heartbeat 7\nheartbeat 8\n", "(qemu) \n", "{}\n", "}\n}\n"] {
            let (_dir, path) = fake_qemu_with_greeting(no_qmp, &[]);
            let error = Qmp::connect(&path).unwrap_err();
            assert!(error.to_string().contains("missing QMP greeting"), "{error}");
        }
    }

    #[test]
    fn rejects_deeply_nested_messages() {
        static DEEP: LazyLock<String> = LazyLock::new(|| "[".repeat(1 << 20) + "\n");
        static LINES: LazyLock<[&str; 1]> = LazyLock::new(|| [DEEP.as_str()]);
        let (_dir, path) = fake_qemu(LINES.as_slice());
        let mut qmp = Qmp::connect(&path).unwrap();
        let error = qmp.status().unwrap_err();
        assert!(error.to_string().contains("invalid QMP message"), "{error}");
        assert!(qmp.is_lost());
    }

    #[test]
    fn missing_socket_has_a_hint() {
        let error = Qmp::connect(Path::new("/nonexistent/qmp")).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.hint_text().unwrap().contains("-qmp unix:"));
    }
}
