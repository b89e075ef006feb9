//! Drives `holder.c`: a process that holds a file in one way.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};

use super::actor;

/// A process that holds a file; killed when dropped.
pub struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    way: String,
}

impl Holder {
    /// Has a process hold this file in this way. `folder` is an empty folder for it.
    #[track_caller]
    pub fn start(way: &str, file: &Path, folder: &Path) -> Holder {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| actor::compile("holder"));
        let mut command = Command::new(program);
        command.arg(way).arg(file).arg(folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut holder = Holder { child, input, output, way: way.to_owned() };
        let said = holder.line();
        assert!(said.starts_with("ready "), "{way}: {said:?}; see errno(1)");
        holder
    }

    /// The number of the process that was started.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it read the whole file, and waits for its end. Nothing: it could not.
    pub fn hash(mut self) -> Option<u64> {
        // One that has stopped goes on.
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

/// The number that a holder prints for these bytes.
pub fn hash_of(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    words.fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3)) >> 1
}
