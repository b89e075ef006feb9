//! Drives `holder.c`: a process that uses a file in one way.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::actor;

/// A process that uses a file; killed on drop.
pub struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    way: String,
}

impl Holder {
    /// Starts a process that uses this file in this way. `directory` is an empty directory for the process.
    #[track_caller]
    pub fn start(way: &str, file: &Path, directory: &Path) -> Holder {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| actor::compile("holder"));
        let mut command = Command::new(program);
        command.arg(way).arg(file).arg(directory).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut holder = Holder { child, input, output, way: way.to_owned() };
        let said = holder.line();
        assert!(said.starts_with("ready "), "{way}: unexpected reply {said:?} (a number is an errno)");
        holder
    }

    /// The PID of the started process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes the process read the whole file and waits until it exits. Returns the hash, or `None` if the read failed.
    pub fn hash(mut self) -> Option<u64> {
        // The process may be stopped.
        let _ = kill_process(Pid::from_child(&self.child), Signal::CONT);
        let _ = self.input.write_all(b"\n");
        let hash = self.line().trim().strip_prefix("hash ").and_then(|number| number.parse().ok());
        let ended = self.child.wait().unwrap();
        if hash.is_none() {
            eprintln!("{}: {ended}", self.way);
        }
        hash
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The hash that a holder prints for these bytes.
pub fn hash_of(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    words.fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3)) >> 1
}
