//! Drives `actor.c`: a process of nobody's making that maps files, copies pages, forks.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::mount::STENCIL;

/// The compiled program, static so that it runs in an empty chroot.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| compile("actor"))
}

/// Compiles `tests/support/NAME.c` and says where the program is.
pub fn compile(name: &str) -> PathBuf {
    // Beside the other programs; another run may compile it at the same moment.
    let out = Path::new(STENCIL).with_file_name(format!("stencil-test-{name}"));
    let fresh = out.with_extension(std::process::id().to_string());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/support/{name}.c"));
    let status = Command::new("cc").args(["-O1", "-static", "-o"]).arg(&fresh).arg(source).status();
    assert!(status.expect("cc runs").success(), "{name}.c compiles");
    std::fs::rename(&fresh, &out).unwrap();
    out
}

/// One running actor; killed when dropped.
pub struct Actor {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// The actor's own process, where a wrapper stands in front of it.
    pid: u32,
}

impl Actor {
    /// As a plain child.
    pub fn start() -> Actor {
        Self::through(Command::new(program()))
    }

    /// Through a command that ends in executing the actor (setpriv, chroot, unshare).
    pub fn through(mut command: Command) -> Actor {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let pid = child.id();
        let mut actor = Actor { child, input, output, pid };
        actor.tell("anon 63 4096");
        actor.pid = actor.find_self();
        actor
    }

    /// `unshare --fork` puts the actor one process below the child.
    fn find_self(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        let below = std::fs::read_to_string(children).unwrap_or_default();
        below.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(self.child.id())
    }

    /// Its process id, as the host sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Runs one command and gives its answer; panics on an error.
    pub fn tell(&mut self, command: &str) -> u64 {
        self.ask(command).unwrap_or_else(|errno| panic!("actor: {command}: errno {errno}"))
    }

    /// Runs one command; an error is its number.
    pub fn ask(&mut self, command: &str) -> Result<u64, i32> {
        self.begin(command);
        self.answer()
    }

    /// The answer to the command that was begun last; an error is its number.
    pub fn answer(&mut self) -> Result<u64, i32> {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the actor answers");
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|n| n.parse::<u64>().ok())) {
            (Some("ok"), Some(value)) => Ok(value),
            (Some("error"), Some(errno)) => Err(errno as i32),
            _ => panic!("the actor answered {line:?}"),
        }
    }

    /// Begins with one command, and does not wait for its answer.
    pub fn begin(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("the actor lives");
    }

    /// Kills it with SIGKILL and says how long it took to be gone.
    pub fn kill(mut self) -> Duration {
        let begun = Instant::now();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        begun.elapsed()
    }

    /// Runs one command that it must not survive, and gives the signal that it dies of.
    pub fn dies_of(&mut self, command: &str) -> Option<i32> {
        writeln!(self.input, "{command}").expect("the actor lives");
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "", "actor: {command}: answered");
        self.child.wait().unwrap().signal()
    }

    /// Writes one byte into each of these pages of a mapping.
    pub fn write_pages(&mut self, map: u32, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.tell(&format!("write {map} {page}"));
        }
    }

    /// Reads each of these pages of a mapping.
    pub fn read_pages(&mut self, map: u32, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.tell(&format!("read {map} {page}"));
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Ends by itself with its input; the kill is for one that is stuck in a command.
        let _ = writeln!(self.input, "quit");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
