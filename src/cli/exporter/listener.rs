//! The socket of the exporter, over TCP or at a path.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::process::{geteuid, umask};

use super::http::{self, Page, Response};
use crate::error::{Error, Result};
use crate::sys::socket::unix;

/// Longest time from the accept of a connection to the end of the request head, and from the reply to the end of the
/// client's output.
const HEAD_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest time from the accept of a connection to the last byte of the reply.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of bytes after the request head that are read, and ignored, before a connection is closed.
const MAX_REST: u64 = 64 << 10;

/// Pause after a failure of accept(2), for example while no descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Length of the backlog of a socket at a path.
const BACKLOG: i32 = 64;

/// Access rights of a socket at a path: its owner and its group.
const SOCKET_MODE: u32 = 0o660;

/// Longest wait for the reply of another listener at the same path.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// Where the exporter listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Address and port.
    Tcp(SocketAddr),
    /// Path of a socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let invalid = || {
            Error::usage(format!("invalid address '{text}'"))
                .hint("use an IP address and a port such as 127.0.0.1:9470 or [::1]:9470, or unix:/PATH")
        };
        match text.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() => Ok(Address::Unix(path.into())),
            Some(_) => Err(invalid()),
            None => text.parse().map(Address::Tcp).map_err(|_| invalid()),
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// With the path, and `st_dev` and `st_ino` of the socket file.
    Unix(UnixListener, PathBuf, (u64, u64)),
}

/// A socket that accepts connections.
#[derive(Debug)]
pub struct Listener(Socket);

/// A connection.
trait Connection: Read + Write {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()>;
    fn end_output(&self) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end_output(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Connection for UnixStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end_output(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// A connection whose reads and writes all end at a deadline.
struct Limited {
    connection: Box<dyn Connection>,
    until: Instant,
}

impl Limited {
    fn limit(&self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.connection.set_timeout(left)
    }
}

impl Read for Limited {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.limit()?;
        self.connection.read(bytes)
    }
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limit()?;
        self.connection.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.connection.flush()
    }
}

impl Listener {
    /// Listens at the address. A socket file that no process listens on is replaced.
    ///
    /// # Errors
    /// Returns an error if the address is in use or cannot be used.
    pub fn bind(address: &Address) -> Result<Listener> {
        match address {
            Address::Tcp(address) => {
                TcpListener::bind(address).map(|l| Listener(Socket::Tcp(l))).map_err(|e| {
                    let what = format!("cannot listen on {address}");
                    match e.kind() {
                        io::ErrorKind::AddrInUse => Error::in_use(what)
                            .because(e)
                            .hint("stop the other process, or choose another port with --listen"),
                        _ => Error::failed(what)
                            .because(e)
                            .hint("choose an address of this host with --listen"),
                    }
                })
            }
            Address::Unix(path) => {
                let fail = |e: io::Error| Error::io("cannot listen on the socket", path, e);
                remove_dead(path)?;
                let socket = listen_at(path).map_err(|e| fail(e.into()))?;
                let found = fs::symlink_metadata(path).map_err(fail)?;
                Ok(Listener(Socket::Unix(socket, path.clone(), (found.dev(), found.ino()))))
            }
        }
    }

    /// Returns the address for messages.
    pub fn name(&self) -> String {
        match &self.0 {
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}/metrics"),
                Err(error) => error.to_string(),
            },
            Socket::Unix(_, path, _) => format!("unix:{}", path.display()),
        }
    }

    /// Accepts one connection after another, and answers one request of each. Several threads may call this.
    pub fn serve(&self, answer: impl Fn(Page) -> Response) {
        loop {
            let accepted: io::Result<Box<dyn Connection>> = match &self.0 {
                Socket::Tcp(listener) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
                Socket::Unix(listener, ..) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
            };
            match accepted {
                Ok(connection) => {
                    if let Err(error) = converse(connection, &answer) {
                        log::debug!("a connection failed: {error}");
                    }
                }
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Removes the socket file, unless another process has replaced it.
    pub fn remove(&self) {
        if let Socket::Unix(_, path, identity) = &self.0
            && fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == *identity)
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Answers one request, and reads what the client sends after it: close(2) with unread input resets the connection, and
/// the client loses the reply.
fn converse(connection: Box<dyn Connection>, answer: &impl Fn(Page) -> Response) -> io::Result<()> {
    let start = Instant::now();
    let mut connection = Limited { connection, until: start + HEAD_TIMEOUT };
    let request = http::read(&mut connection)?;
    connection.until = start + CONNECTION_TIMEOUT;
    request.map_or_else(|refusal| refusal, answer).write(&mut connection)?;
    connection.connection.end_output()?;
    connection.until = Instant::now() + HEAD_TIMEOUT;
    io::copy(&mut connection.take(MAX_REST), &mut io::sink()).map(drop)
}

/// Removes a socket file of this user that no process listens on.
fn remove_dead(path: &Path) -> Result<()> {
    let fail = |e: io::Error| Error::io("cannot listen on the socket", path, e);
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Ok(());
    }
    if found.uid() != geteuid().as_raw() {
        return Err(Error::in_use("the socket belongs to another user")
            .at(path)
            .hint("remove the file, or choose another path with --listen"));
    }
    match unix::connect_within(path, PROBE_TIMEOUT) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(fail),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(fail(e)),
        // A full backlog shows a listener too.
        _ => Err(Error::in_use("another process listens on the socket")
            .at(path)
            .hint("stop that process, or choose another path with --listen")),
    }
}

/// Creates a socket whose file has [`SOCKET_MODE`] from its first moment: bind(2) creates the file with the mode of the
/// socket, less the umask. No other thread creates files at this time.
fn listen_at(path: &Path) -> std::result::Result<UnixListener, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    let address = SocketAddrUnix::new(path)?;
    let mask = umask(Mode::empty());
    let bound = bind(&socket, &address);
    umask(mask);
    bound?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed() {
        assert_eq!("unix:/run/x".parse::<Address>().unwrap(), Address::Unix("/run/x".into()));
        assert!(matches!("[::1]:80".parse::<Address>().unwrap(), Address::Tcp(a) if a.port() == 80));
        for text in ["", "9470", "localhost:9470", "unix:", "unix:run/x", "127.0.0.1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced_and_another_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(error.to_string().contains("another process listens"), "{error}");
        drop(first);
        let second = Listener::bind(&address).unwrap();
        let mode = fs::metadata(&path).unwrap().mode() & 0o7777;
        assert_eq!(mode, SOCKET_MODE, "{mode:o}");
        second.remove();
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        second.remove();
        assert!(path.exists() && Listener::bind(&address).is_err());
    }

    #[test]
    fn a_socket_that_may_be_alive_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let _busy = listen_at(&path).unwrap();
        let mut held = vec![];
        while let Ok(stream) = unix::connect_within(&path, Duration::ZERO) {
            held.push(stream);
        }
        let error = Listener::bind(&Address::Unix(path.clone())).unwrap_err();
        assert_eq!(error.code(), crate::error::Code::InUse, "{error}");
        let datagrams = dir.path().join("datagrams");
        let _datagrams = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
        assert!(Listener::bind(&Address::Unix(datagrams.clone())).is_err());
        assert!(path.exists() && datagrams.exists());
    }

    #[test]
    fn a_connection_that_sends_nothing_ends() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"GET").unwrap();
        let start = Instant::now();
        assert!(converse(Box::new(ours), &|_| Response::text("")).is_err());
        assert!(start.elapsed() >= HEAD_TIMEOUT / 2);
    }

    #[test]
    fn a_client_that_sends_more_than_a_request_gets_the_reply() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(format!("POST / HTTP/1.1\r\n\r\n{}", "x".repeat(40 << 10)).as_bytes()).unwrap();
        let served = thread::spawn(move || converse(Box::new(ours), &|_| Response::text("")));
        let mut reply = String::new();
        theirs.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 405 "), "{reply}");
        drop(theirs);
        served.join().unwrap().unwrap();
    }
}
