//! QEMU's guest agent: the program in a guest that answers on the channel `org.qemu.guest_agent.0`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::qmp::Qmp;
use super::recipe::{Props, options};
use crate::error::{Error, Result};

/// The name of its channel.
const CHANNEL: &str = "org.qemu.guest_agent.0";

/// How long an agent may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Its answers are short.
const MAX_ANSWER: usize = 64 << 10;

/// Begins an answer after which nothing is left of an earlier one.
const DELIMITER: u8 = 0xff;

/// What became of a clone's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clock {
    /// Its agent has set it.
    Set,
    /// The VM has no channel of an agent.
    NoChannel,
    /// It has one, and nothing in the guest has it open.
    NoAgent,
    /// The agent has not done it.
    Refused(String),
}

/// The channel of a VM with this command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Channel {
    chardev: String,
    socket: PathBuf,
}

impl Channel {
    /// Finds it; `None` where there is none, or it is no socket.
    pub fn of(argv: &[String]) -> Option<Channel> {
        let all = options(argv);
        let of = |option: &'static str, implied: &'static str| {
            let with_value = all.iter().filter(move |(name, _)| *name == option);
            with_value.filter_map(move |(_, value)| Props::parse((*value)?, implied))
        };
        let port = of("device", "driver").find(|p| p.get("name") == Some(CHANNEL))?;
        let chardev = port.get("chardev")?.to_owned();
        let own = of("chardev", "backend").find(|p| p.get("id") == Some(&chardev))?;
        Some(Channel { socket: own.get("path")?.into(), chardev })
    }

    /// Asks the agent to set the guest's clock to that of this host.
    pub fn set_clock(&self, qmp: &mut Qmp) -> Clock {
        let open = qmp.run("query-chardev", json!({})).map(|all| {
            let is_it = |c: &&Value| c.get("label").and_then(Value::as_str) == Some(&self.chardev);
            let own = all.as_array().into_iter().flatten().find(is_it).cloned();
            own.and_then(|c| c.get("frontend-open").and_then(Value::as_bool)).unwrap_or(false)
        });
        match open {
            Ok(false) => Clock::NoAgent,
            Ok(true) => set_time(&self.socket, PATIENCE)
                .map_or_else(|e| Clock::Refused(e.to_string()), |()| Clock::Set),
            Err(error) => Clock::Refused(error.to_string()),
        }
    }
}

/// Tells the agent behind a socket what time it is.
///
/// # Errors
/// When it does not answer in time, or refuses.
pub fn set_time(socket: &Path, patience: Duration) -> Result<()> {
    let failed = |e| Error::io("cannot talk to the guest agent", socket, e);
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_write_timeout(Some(patience)).map_err(failed)?;
    let until = Instant::now() + patience;
    // What an earlier session has left in the channel, in either direction, ends here.
    let id = u64::from(std::process::id());
    let mut line = vec![DELIMITER];
    line.extend(json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string().into_bytes());
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let answer = receive(&mut stream, socket, until, true)?;
    if answer.get("return").and_then(Value::as_u64) != Some(id) {
        return Err(Error::failed(format!("the guest agent answers something else: {answer}")).at(socket));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let command = json!({"execute": "guest-set-time", "arguments": {"time": now.as_nanos() as u64}});
    stream.write_all(format!("{command}\n").as_bytes()).map_err(failed)?;
    let answer = receive(&mut stream, socket, until, false)?;
    match answer.pointer("/error/desc").and_then(Value::as_str) {
        None => Ok(()),
        Some(why) => Err(Error::failed(format!("the guest agent does not set the clock: {why}")).at(socket)),
    }
}

/// One answer; what comes before the delimiter is passed over where one is expected.
fn receive(stream: &mut UnixStream, socket: &Path, until: Instant, delimited: bool) -> Result<Value> {
    let failed = |e| Error::io("cannot talk to the guest agent", socket, e);
    let mut got: Vec<u8> = vec![];
    let mut buffer = [0; 4096];
    loop {
        let begin =
            if delimited { got.iter().rposition(|b| *b == DELIMITER).map(|at| at + 1) } else { Some(0) };
        let rest = begin.and_then(|at| got.get(at..)).unwrap_or_default();
        if let Some(end) = rest.iter().position(|b| *b == b'\n') {
            return serde_json::from_slice(rest.get(..end).unwrap_or_default()).map_err(|e| {
                Error::failed(format!("the guest agent's answer cannot be parsed: {e}")).at(socket)
            });
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || got.len() > MAX_ANSWER {
            return Err(Error::try_again("the guest agent does not answer").at(socket));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Error::failed("the guest agent's channel was closed").at(socket)),
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

    /// An agent that says these lines, each after it has got one; the first has the number of the question.
    fn played(lines: &'static [&'static [u8]]) -> (tempfile::TempDir, PathBuf) {
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
    fn an_agent_is_asked_after_what_is_left_of_others() {
        let (_dir, path) = played(&[b"{\"return\": 7}\n{\"old\xff{\"return\": ID}\n", b"{\"return\": {}}\n"]);
        set_time(&path, Duration::from_secs(5)).unwrap();
        let (_dir, path) = played(&[b"\xff{\"return\": ID}\n", b"{\"error\": {\"desc\": \"no RTC\"}}\n"]);
        let error = set_time(&path, Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("no RTC"), "{error}");
        let (_dir, path) = played(&[b"{\"return\": ID}\n"]);
        assert!(set_time(&path, Duration::from_millis(100)).is_err(), "no delimiter");
    }

    #[test]
    fn the_channel_is_found_by_its_name() {
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
