//! A running `stencil exporter`, its replies, and the programs of Prometheus.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::mount::TestMount;
use crate::support::vm;

/// The Accept header of Prometheus 2.42.
pub const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;\
                                q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// Returns the path of a program in the directory of `make setup`: `prometheus` or `promtool`.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    vm::firecracker::program(name)
}

/// Runs promtool, with text on its standard input. Returns its output.
#[track_caller]
pub fn promtool(args: &[&str], input: &str) -> String {
    let mut command = Command::new(program("promtool"));
    let mut child = command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "promtool {args:?}: {text}");
    text
}

/// Samples by their names with labels, as printed.
pub type Samples = BTreeMap<String, f64>;

/// Parses metrics in either form.
pub fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// A reply.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
    pub took: Duration,
}

impl Reply {
    /// Returns an error if the reply took longer, for [`measured`](crate::support::host::measured).
    pub fn within(&self, limit: Duration) -> Result<(), String> {
        if self.took < limit { Ok(()) } else { Err(format!("a reply after {:?}", self.took)) }
    }
}

/// Sends a request and reads the reply to its end.
pub fn ask(mut stream: impl Read + Write, request: &str) -> Reply {
    let start = Instant::now();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) =
        text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no reply to {request:?}: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head: head.to_owned(), body: body.to_owned(), took: start.elapsed() }
}

/// A running exporter. Drop ends it.
pub struct Exporter {
    child: Child,
    /// `HOST:PORT`, or the path of a socket.
    pub address: String,
    log: PathBuf,
}

impl Exporter {
    /// Starts an exporter at a free port of the loopback interface.
    pub fn start(world: &TestMount, options: &[&str]) -> Exporter {
        Self::at(world, "127.0.0.1:0", options)
    }

    /// Starts an exporter that listens at `address`.
    pub fn at(world: &TestMount, address: &str, options: &[&str]) -> Exporter {
        Self::run(world.command(), world, address, options)
    }

    /// Starts an exporter that names no store.
    pub fn of_all_stores(world: &TestMount, options: &[&str]) -> Exporter {
        let mut command = world.command();
        command.env_remove("STENCIL_STORE");
        Self::run(command, world, "127.0.0.1:0", options)
    }

    fn run(mut command: Command, world: &TestMount, address: &str, options: &[&str]) -> Exporter {
        let log = world.dir().join(format!("exporter-{}.log", options.len()));
        command.args(["exporter", "--log-format", "json", "--listen", address]).args(options);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        fs::write(&log, &line).unwrap();
        let first: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let (copy, mut rest) = (log.clone(), lines);
        std::thread::spawn(move || {
            let mut file = fs::OpenOptions::new().append(true).open(copy).unwrap();
            let _ = std::io::copy(&mut rest, &mut file);
        });
        let name = first["message"].as_str().and_then(|message| message.strip_prefix("listening on "));
        let name = name.unwrap_or_else(|| panic!("{line}"));
        let address = name.trim_start_matches("http://").trim_start_matches("unix:");
        Exporter { child, address: address.trim_end_matches("/metrics").to_owned(), log }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request over a new connection.
    pub fn ask(&self, request: &str) -> Reply {
        let reply = match Path::new(&self.address).is_absolute() {
            true => ask(UnixStream::connect(&self.address).unwrap(), request),
            false => ask(TcpStream::connect(&self.address).unwrap(), request),
        };
        let length = reply.head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        assert_eq!(length.unwrap().parse::<usize>().unwrap(), reply.body.len(), "{}", reply.head);
        reply
    }

    /// Returns the metrics, in the form that the Accept header selects.
    pub fn scrape(&self, accept: &str) -> Reply {
        let reply = self.ask(&format!("GET /metrics HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\n\r\n"));
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply
    }

    /// Returns the samples of a scrape.
    pub fn samples(&self) -> Samples {
        samples(&self.scrape("text/plain").body)
    }

    /// Returns the lines of the log.
    pub fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.log).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// Ends the exporter by a signal. Returns its exit code.
    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        let _ = kill_process(Pid::from_child(&self.child), signal);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.end(Signal::TERM);
    }
}
