//! A client of the QEMU guest agent, a program in the guest that serves the channel `org.qemu.guest_agent.0`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::qmp::Qmp;
use super::recipe::{Props, options};
use crate::error::{Error, Result};

/// Name of the agent's channel.
const CHANNEL: &str = "org.qemu.guest_agent.0";

/// Timeout for setting the clock through the agent.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum length of the bytes that are read for one reply; replies of the agent are short.
const MAX_REPLY: usize = 64 << 10;

/// Precedes the reply to `guest-sync-delimited`; bytes before the delimiter belong to an earlier session.
const DELIMITER: u8 = 0xff;

/// The outcome of setting a clone's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clock {
    /// The agent has set the clock.
    Set,
    /// The VM has no agent channel.
    NoChannel,
    /// No process in the guest has the agent channel open.
    NoAgent,
    /// The agent has not set the clock, for this reason.
    Refused(String),
}

/// The agent channel of a VM.
#[derive(Debug, PartialEq, Eq)]
pub struct Channel {
    chardev: String,
    socket: PathBuf,
}

impl Channel {
    /// Finds the channel in a command line; returns `None` if there is no channel or its backend is not a socket.
    pub fn of(argv: &[String]) -> Option<Channel> {
        let all = options(argv);
        let of = |option: &'static str, implied: &'static str| {
            let with_value = all.iter().filter(move |(name, _)| *name == option);
            with_value.filter_map(move |(_, value)| Props::parse((*value)?, implied))
        };
        let port = of("device", "driver").find(|p| p.get("name") == Some(CHANNEL))?;
        let chardev = port.get("chardev")?.to_owned();
        let backend = of("chardev", "backend").find(|p| p.get("id") == Some(&chardev))?;
        Some(Channel { socket: backend.get("path")?.into(), chardev })
    }

    /// Sets the guest's clock to the host's, through the agent.
    pub fn set_clock(&self, qmp: &mut Qmp) -> Clock {
        let open = qmp.run("query-chardev", json!({})).map(|all| {
            let is_it = |c: &&Value| c.get("label").and_then(Value::as_str) == Some(&self.chardev);
            let chardev = all.as_array().into_iter().flatten().find(is_it).cloned();
            chardev.and_then(|c| c.get("frontend-open").and_then(Value::as_bool)).unwrap_or(false)
        });
        match open {
            Ok(false) => Clock::NoAgent,
            Ok(true) => set_time(&self.socket, AGENT_TIMEOUT)
                .map_or_else(|e| Clock::Refused(e.to_string()), |()| Clock::Set),
            Err(error) => Clock::Refused(error.to_string()),
        }
    }
}

/// Sends the host's time to the agent behind a socket.
///
/// # Errors
/// Returns an error if the agent refuses, and [`Code::TryAgain`](crate::error::Code::TryAgain) if it does not reply
/// within `timeout`.
pub fn set_time(socket: &Path, timeout: Duration) -> Result<()> {
    let failed = |e| Error::io("cannot exchange messages with the guest agent", socket, e);
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    let until = Instant::now() + timeout;
    // The delimiter ends a partial command of an earlier session; the delimiter in the reply ends its pending replies.
    let id = u64::from(std::process::id());
    let mut line = vec![DELIMITER];
    line.extend(json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string().into_bytes());
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let reply = receive(&mut stream, socket, until, true)?;
    if reply.get("return").and_then(Value::as_u64) != Some(id) {
        return Err(Error::failed(format!(
            "invalid reply of the guest agent to guest-sync-delimited: {reply}"
        ))
        .at(socket));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let command = json!({"execute": "guest-set-time", "arguments": {"time": now}});
    stream.write_all(format!("{command}\n").as_bytes()).map_err(failed)?;
    let reply = receive(&mut stream, socket, until, false)?;
    match reply.pointer("/error/desc").and_then(Value::as_str) {
        None => Ok(()),
        Some(why) => Err(Error::failed(format!("the guest agent cannot set the clock: {why}")).at(socket)),
    }
}

/// Receives one reply; if `delimited`, skips everything up to the delimiter.
fn receive(stream: &mut UnixStream, socket: &Path, until: Instant, delimited: bool) -> Result<Value> {
    let failed = |e| Error::io("cannot exchange messages with the guest agent", socket, e);
    let mut got: Vec<u8> = vec![];
    let mut buffer = [0; 4096];
    loop {
        let begin =
            if delimited { got.iter().rposition(|b| *b == DELIMITER).map(|at| at + 1) } else { Some(0) };
        let rest = begin.and_then(|at| got.get(at..)).unwrap_or_default();
        if let Some(end) = rest.iter().position(|b| *b == b'\n') {
            return serde_json::from_slice(rest.get(..end).unwrap_or_default()).map_err(|e| {
                Error::failed(format!("cannot parse the reply of the guest agent: {e}")).at(socket)
            });
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || got.len() > MAX_REPLY {
            return Err(Error::try_again("timed out waiting for the guest agent").at(socket));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Error::failed("QEMU closed the channel of the guest agent").at(socket)),
            Ok(more) => got.extend_from_slice(buffer.get(..more).unwrap_or_default()),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(failed(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Starts a fake agent that sends one of these lines for each command; `ID` is replaced by the process id.
    fn fake_agent(lines: &'static [&'static [u8]]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for line in lines {
                let mut got = vec![];
                reader.read_until(b'\n', &mut got).unwrap();
                let id = std::process::id().to_string();
                let text: Vec<u8> = line.to_vec();
                let at = text.windows(2).position(|w| w == b"ID");
                match at {
                    Some(at) => {
                        stream.write_all(&[&text[..at], id.as_bytes(), &text[at + 2..]].concat()).unwrap()
                    }
                    None => stream.write_all(&text).unwrap(),
                }
            }
            let _ = reader.read_until(b'\n', &mut vec![]);
        });
        (dir, path)
    }

    #[test]
    fn skips_replies_of_earlier_sessions() {
        let (_dir, path) =
            fake_agent(&[b"{\"return\": 7}\n{\"old\xff{\"return\": ID}\n", b"{\"return\": {}}\n"]);
        set_time(&path, Duration::from_secs(5)).unwrap();
        let (_dir, path) = fake_agent(&[b"\xff{\"return\": ID}\n", b"{\"error\": {\"desc\": \"no RTC\"}}\n"]);
        let error = set_time(&path, Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("no RTC"), "{error}");
        let (_dir, path) = fake_agent(&[b"{\"return\": ID}\n"]);
        assert!(set_time(&path, Duration::from_millis(100)).is_err(), "no delimiter");
    }

    #[test]
    fn finds_the_channel_by_name() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let argv = words(
            "-device virtio-serial-pci -chardev socket,id=a,path=/c/a.sock,server=on -device \
             virtserialport,chardev=a,name=org.qemu.guest_agent.0",
        );
        let channel = Channel::of(&argv).unwrap();
        assert_eq!((channel.chardev.as_str(), channel.socket), ("a", PathBuf::from("/c/a.sock")));
        assert_eq!(Channel::of(&argv[..4]), None);
        assert_eq!(Channel::of(&words("-device virtserialport,chardev=a,name=other")), None);
    }
}
