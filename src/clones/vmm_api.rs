//! A client of the API of Firecracker and of Cloud Hypervisor: JSON over HTTP/1.1 on a Unix socket. Every wait has a
//! timeout.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::socket::peer::{Peer, expect_listener};
use crate::sys::socket::unix;

/// Maximum length of a reply in bytes.
const MAX_REPLY: usize = 64 << 10;

/// Timeout for connecting while the listen queue of the socket is full, and for sending a request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Timeout of requests that the VMM executes at once. A request waits for earlier ones of other clients.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// A VMM with such an API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

impl Server {
    /// Returns the name of the VMM.
    pub fn name(self) -> &'static str {
        match self {
            Server::Firecracker => "Firecracker",
            Server::CloudHypervisor => "Cloud Hypervisor",
        }
    }

    /// Returns the option of the VMM that sets the path of the socket.
    pub fn option(self) -> &'static str {
        match self {
            Server::Firecracker => "--api-sock",
            Server::CloudHypervisor => "--api-socket",
        }
    }
}

/// A connection to the API socket of one VMM.
#[derive(Debug)]
pub struct Api {
    server: Server,
    stream: UnixStream,
    path: PathBuf,
    /// True after a request without a complete reply: the next bytes would belong to that request.
    lost: bool,
}

impl Api {
    /// Connects to the socket.
    ///
    /// # Errors
    /// Returns an error if nothing listens on the socket.
    pub fn connect(server: Server, path: &Path) -> Result<Api> {
        let stream = unix::connect_within(path, CONNECT_TIMEOUT)
            .and_then(|stream| stream.set_write_timeout(Some(CONNECT_TIMEOUT)).map(|()| stream))
            .map_err(|e| {
                Error::io("cannot connect to the API socket", path, e).hint(format!(
                    "start {} with {} PATH and pass that PATH",
                    server.name(),
                    server.option()
                ))
            })?;
        Ok(Api { server, stream, path: path.to_owned(), lost: false })
    }

    /// Connects to the API socket of exactly this Firecracker.
    ///
    /// # Errors
    /// Returns an error if nothing or another process listens on the socket.
    pub fn of_process(path: &Path, vm: ProcessId) -> Result<Api> {
        let api = Api::connect(Server::Firecracker, path)?;
        expect_listener(path, vm, api.peer_pid()?)?;
        Ok(api)
    }

    /// Returns the process that listens on the socket.
    ///
    /// # Errors
    /// Returns an error if the process is not visible in this PID namespace.
    pub fn peer_pid(&self) -> Result<u32> {
        let failed = || Error::failed("cannot tell which process listens on the API socket").at(&self.path);
        let peer = Peer::of(&self.stream).map_err(|e| failed().because(e))?;
        peer.pid.ok_or_else(|| {
            failed().hint(format!("run the command in the PID namespace of {}", self.server.name()))
        })
    }

    /// Returns the state of Firecracker's VM in lower case: `not started`, `running` or `paused`.
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
    pub fn state(&mut self) -> Result<String> {
        Ok(self.get("/")?["state"].as_str().unwrap_or("unknown").to_lowercase())
    }

    /// Pauses or resumes Firecracker's VM: `Paused` or `Resumed`.
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
    pub fn set_state(&mut self, state: &str) -> Result<()> {
        self.run("PATCH /vm", &json!({"state": state}), Instant::now() + REPLY_TIMEOUT)
    }

    /// Reads a resource (`/vm/config`).
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
    pub fn get(&mut self, resource: &str) -> Result<Value> {
        self.get_until(resource, Instant::now() + REPLY_TIMEOUT)
    }

    fn get_until(&mut self, resource: &str, deadline: Instant) -> Result<Value> {
        let request = format!("GET {resource}");
        self.write(&request, &format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        self.wait(&request, deadline)
    }

    /// Sends a request (`PUT /snapshot/load`) and waits until the VMM has executed it.
    ///
    /// # Errors
    /// Returns an error with the VMM's text if the VMM refuses the request, and
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) if the VMM does not reply before the deadline.
    pub fn run(&mut self, request: &str, body: &Value, deadline: Instant) -> Result<()> {
        self.send(request, Some(body))?;
        self.wait(request, deadline).map(drop)
    }

    /// Sends a request. [`wait`](Self::wait) waits until the VMM has executed it. Cloud Hypervisor refuses a body of a
    /// request that needs none.
    ///
    /// # Errors
    /// Returns an error if the connection is lost.
    pub fn send(&mut self, request: &str, body: Option<&Value>) -> Result<()> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let text = format!(
            "{request} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.write(request, &text)
    }

    fn write(&mut self, request: &str, text: &str) -> Result<()> {
        if self.lost {
            return Err(self.lost(request, io::ErrorKind::NotConnected.into()));
        }
        // A complete reply resets the flag.
        self.lost = true;
        self.stream.write_all(text.as_bytes()).map_err(|e| self.lost(request, e))
    }

    /// Waits until the VMM has executed the request that was sent. Returns the body of the reply, or `null` if the
    /// reply has none.
    ///
    /// # Errors
    /// Same as [`run`](Self::run).
    pub fn wait(&mut self, request: &str, deadline: Instant) -> Result<Value> {
        let reply = self.reply(request, deadline)?;
        let body = serde_json::from_slice::<Value>(&reply.body).unwrap_or_default();
        if reply.status / 100 == 2 {
            return Ok(body);
        }
        Err(Error::failed(format!("{} refused {request}: {}", self.server.name(), reason(&body)))
            .at(&self.path))
    }

    fn reply(&mut self, request: &str, deadline: Instant) -> Result<Reply> {
        let (mut bytes, mut buffer) = (vec![], [0; 4096]);
        loop {
            match Reply::parse(&bytes) {
                Ok(Some(reply)) => {
                    self.lost = false;
                    return Ok(reply);
                }
                Ok(None) if bytes.len() <= MAX_REPLY => {}
                Ok(None) | Err(()) => {
                    return Err(Error::failed(format!("invalid reply to {request}")).at(&self.path).hint(
                        format!(
                            "pass the socket of {}'s option {}",
                            self.server.name(),
                            self.server.option()
                        ),
                    ));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timeout(request));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|e| self.lost(request, e))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(self.lost(request, io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => bytes.extend_from_slice(buffer.get(..got).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(self.timeout(request)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(request, e)),
            }
        }
    }

    fn timeout(&self, request: &str) -> Error {
        let vmm = self.server.name();
        Error::try_again(format!("timed out waiting for the reply of {vmm} to {request}"))
            .at(&self.path)
            .hint(format!("check whether {vmm} is stopped, and that the mount answers: stencil status"))
    }

    fn lost(&self, request: &str, e: io::Error) -> Error {
        let vmm = self.server.name();
        Error::io(format!("the connection to {vmm} was lost during {request}"), &self.path, e)
            .hint(format!("check whether {vmm} still runs, and see its log"))
    }
}

/// Returns the reason in the body of a refusal: Firecracker's `fault_message`, or Cloud Hypervisor's list of errors,
/// from the effect to the cause.
fn reason(body: &Value) -> String {
    match (body["fault_message"].as_str(), body.as_array()) {
        (Some(text), _) => text.to_owned(),
        (None, Some(errors)) => errors.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(": "),
        (None, None) => "no reason given".to_owned(),
    }
}

/// A reply of the API.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    body: Vec<u8>,
}

impl Reply {
    /// Parses a reply. Returns `None` if the reply is incomplete.
    fn parse(bytes: &[u8]) -> Result<Option<Reply>, ()> {
        let Some(end) = bytes.windows(4).position(|part| part == b"\r\n\r\n") else { return Ok(None) };
        let (head, body) = (bytes.get(..end).unwrap_or_default(), bytes.get(end + 4..).unwrap_or_default());
        let mut lines = std::str::from_utf8(head).map_err(drop)?.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).ok_or(())?;
        let status = status.get(..3).and_then(|code| code.parse().ok()).ok_or(())?;
        let length = lines.filter_map(|line| line.split_once(':'));
        let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length")).last();
        let length = length.map_or(Ok(0), |(_, value)| value.trim().parse::<usize>().map_err(drop))?;
        Ok(body.get(..length).map(|body| Reply { status, body: body.to_vec() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_replies_byte_by_byte() {
        let done = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        let refused =
            b"HTTP/1.1 400 \r\nContent-Type: application/json\r\ncontent-length: 21\r\n\r\n{\"fault_message\":\"x\"}";
        for (text, status, body) in
            [(&done[..], 204, &b""[..]), (refused, 400, &refused[refused.len() - 21..])]
        {
            for end in 0..text.len() {
                assert_eq!(Reply::parse(&text[..end]), Ok(None), "{end}");
            }
            assert_eq!(Reply::parse(text), Ok(Some(Reply { status, body: body.to_vec() })));
        }
    }

    #[test]
    fn a_refusal_gives_the_reason_of_either_vmm() {
        assert_eq!(reason(&json!({"fault_message": "no such file"})), "no such file");
        assert_eq!(reason(&json!(["cannot restore", "no such file"])), "cannot restore: no such file");
        assert_eq!(reason(&Value::Null), "no reason given");
    }

    #[test]
    fn a_late_reply_is_not_taken_for_the_next_one() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut api = Api::connect(Server::Firecracker, &path).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(api.get_until("/", Instant::now()).unwrap_err().code(), crate::error::Code::TryAgain);
        server.write_all(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}").unwrap();
        assert!(api.get("/").is_err());
    }

    #[test]
    fn rejects_other_protocols() {
        for text in
            ["{\"QMP\": {}}\r\n\r\n", "HTTP/1.1 \r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"]
        {
            assert_eq!(Reply::parse(text.as_bytes()), Err(()), "{text}");
        }
    }
}
