//! Drives `actor.c`: a process, not started by Stencil, that maps files, copies pages and forks.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::support::mount::STENCIL;

/// Returns the path of the compiled program, static so that it runs in an empty chroot.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| compile("actor"))
}

/// Compiles `tests/support/NAME.c` and returns the path of the program.
pub fn compile(name: &str) -> PathBuf {
    // The program is compiled under a temporary name and renamed: another test run may compile the same program at the
    // same time.
    let out = Path::new(STENCIL).with_file_name(format!("stencil-test-{name}"));
    let fresh = out.with_extension(std::process::id().to_string());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/support/{name}.c"));
    let status = Command::new("cc").args(["-O1", "-static", "-o"]).arg(&fresh).arg(source).status();
    assert!(status.expect("cannot run cc").success(), "cannot compile {name}.c");
    std::fs::rename(&fresh, &out).unwrap();
    out
}

/// A running actor; killed on drop.
pub struct Actor {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// The actor's process, which is not the child if a wrapper such as `unshare --fork` started the actor.
    pid: u32,
}

impl Actor {
    /// Starts an actor as a direct child.
    pub fn start() -> Actor {
        Self::through(Command::new(program()))
    }

    /// Starts an actor by a command that executes it (setpriv, chroot, unshare).
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

    /// Returns the PID of the child's child if there is one: `unshare --fork` puts the actor one level below.
    fn find_self(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        let below = std::fs::read_to_string(children).unwrap_or_default();
        below.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(self.child.id())
    }

    /// The actor's PID in the host's PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Runs one command and returns its result; panics on an error.
    pub fn tell(&mut self, command: &str) -> u64 {
        self.ask(command).unwrap_or_else(|errno| panic!("actor: {command}: errno {errno}"))
    }

    /// Runs one command and returns its result or errno.
    pub fn ask(&mut self, command: &str) -> Result<u64, i32> {
        self.begin(command);
        self.answer()
    }

    /// Waits for the result of the command that [`Actor::begin`] has sent.
    pub fn answer(&mut self) -> Result<u64, i32> {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("cannot read the actor's reply");
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|n| n.parse::<u64>().ok())) {
            (Some("ok"), Some(value)) => Ok(value),
            (Some("error"), Some(errno)) => Err(errno as i32),
            _ => panic!("unexpected reply of the actor: {line:?}"),
        }
    }

    /// Runs one command. Returns false if the actor was killed before or meanwhile.
    pub fn survives(&mut self, command: &str) -> bool {
        let mut line = String::new();
        writeln!(self.input, "{command}").is_ok()
            && self.output.read_line(&mut line).is_ok()
            && line.starts_with("ok")
    }

    /// Sends one command without waiting for its result.
    pub fn begin(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("the actor has exited");
    }

    /// Kills the actor with SIGKILL and returns the time until it was reaped.
    pub fn kill(mut self) -> Duration {
        let begun = Instant::now();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        begun.elapsed()
    }

    /// Runs one command that must end the actor, and returns the signal that killed it.
    pub fn dies_of(&mut self, command: &str) -> Option<i32> {
        writeln!(self.input, "{command}").expect("the actor has exited");
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "", "actor: {command}: the actor is still alive");
        self.child.wait().unwrap().signal()
    }

    /// Writes one byte to each of these pages of a mapping.
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
        // The actor exits on `quit`; the kill is for an actor that is blocked in a command.
        let _ = writeln!(self.input, "quit");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
