//! The socket of the exporter, over TCP or at a path.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use super::http::{self, Page, Response};
use crate::error::{Error, Result};
use crate::sys::socket::unix;

/// Longest time from the accept of a connection to the last byte of the reply.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

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
}

impl Connection for TcpStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

impl Connection for UnixStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
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
                    let in_use = e.kind() == io::ErrorKind::AddrInUse;
                    let error = Error::failed(format!("cannot listen on {address}")).because(e);
                    match in_use {
                        true => error.hint("stop the other process, or choose another port with --listen"),
                        false => error.hint("choose an address of this host with --listen"),
                    }
                })
            }
            Address::Unix(path) => {
                let fail = |e: io::Error| Error::io("cannot listen on the socket", path, e);
                if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                    if unix::connect_within(path, PROBE_TIMEOUT).is_ok() {
                        return Err(Error::in_use("another process listens on the socket")
                            .at(path)
                            .hint("stop that process, or choose another path with --listen"));
                    }
                    fs::remove_file(path).map_err(fail)?;
                }
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
                    let mut connection = Limited { connection, until: Instant::now() + CONNECTION_TIMEOUT };
                    if let Err(error) = http::converse(&mut connection, &answer) {
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

/// Creates a socket whose file has [`SOCKET_MODE`] from its first moment: bind(2) creates it with the mode of the socket.
fn listen_at(path: &Path) -> std::result::Result<UnixListener, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
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
        assert_eq!(mode & !SOCKET_MODE, 0, "{mode:o}");
        second.remove();
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        second.remove();
        assert!(path.exists() && Listener::bind(&address).is_err());
    }

    #[test]
    fn a_connection_that_sends_nothing_ends() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let until = Instant::now() + Duration::from_millis(30);
        let mut connection = Limited { connection: Box::new(ours), until };
        theirs.write_all(b"GET").unwrap();
        let start = Instant::now();
        assert!(http::converse(&mut connection, |_| Response::text("")).is_err());
        assert!(start.elapsed() >= Duration::from_millis(20));
    }
}
