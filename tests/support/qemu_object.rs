//! The installed QEMU as the judge of memory objects: what it says of an object, how it maps it, what a
//! read and a write of the guest's memory do.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";

/// Longer than any of these runs takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a program says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// The error, and the hint below it where there is one.
    Refused {
        words: String,
        hint: Option<String>,
    },
    /// Ended by a signal.
    Died(i32),
}

impl Verdict {
    pub fn refused(words: &str) -> Verdict {
        Verdict::Refused { words: words.to_owned(), hint: None }
    }

    pub fn without_hint(self) -> Verdict {
        match self {
            Verdict::Refused { words, .. } => Verdict::Refused { words, hint: None },
            other => other,
        }
    }
}

fn qemu(machine: &str, object: &str, uid: Option<u32>) -> Command {
    let mut command = Command::new(QEMU);
    command.args([
        "-M",
        machine,
        "-accel",
        "tcg",
        "-display",
        "none",
        "-nodefaults",
        "-S",
        "-object",
        object,
    ]);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command
}

/// A child that is killed when the test ends early.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts QEMU with the object, tells it to quit at once, and reads what it said.
pub fn verdict(object: &str, uid: Option<u32>) -> Verdict {
    let mut command = qemu("none", object, uid);
    command.args(["-qmp", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Guarded(command.spawn().expect("QEMU is installed by make setup"));
    // A QEMU that refuses its command line closes the pipe before it reads.
    let _ = child.0.stdin.take().unwrap().write_all(br#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#);
    let mut said = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let status = child.0.wait().unwrap();
    if status.success() {
        return Verdict::Accepted;
    }
    if let Some(signal) = status.signal() {
        return Verdict::Died(signal);
    }
    refusal(&said, object)
}

/// The error among what QEMU printed: its first line that is no warning, and the hint below it. Above it
/// stand warnings with their advice and `perror` lines, which do not begin with the program's name.
fn refusal(said: &str, object: &str) -> Verdict {
    let prefix = format!("{QEMU}: ");
    let place = format!("-object {object}: ");
    let error = |line: &str| {
        let words = line.strip_prefix(&prefix)?;
        let words = words.strip_prefix(&place).unwrap_or(words);
        (!words.starts_with("warning: ")).then(|| words.to_owned())
    };
    let mut lines = said.lines();
    let words = lines.find_map(error).unwrap_or_else(|| panic!("QEMU refuses without an error: {said}"));
    Verdict::Refused { words, hint: lines.next().map(str::to_owned) }
}

/// A QEMU that runs, its CPU stopped, with the object as its guest's whole memory.
pub struct Guest {
    child: Guarded,
    qtest: Option<BufReader<UnixStream>>,
}

impl Guest {
    /// The object backs the memory of a machine: it can be read and written.
    pub fn with_memory(object: &str, folder: &Path) -> Guest {
        let socket = folder.join("qtest");
        let mut command = qemu("microvm,memory-backend=m", object, None);
        command.arg("-qtest").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(["-qtest-log", "none"]).stderr(Stdio::null());
        let child = Guarded(command.spawn().expect("QEMU is installed by make setup"));
        let mut guest = Guest { child, qtest: None };
        let stream = guest.connect(&socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.qtest = Some(BufReader::new(stream));
        guest
    }

    /// The object alone, without a machine.
    pub fn without_machine(object: &str, uid: Option<u32>) -> Guest {
        let mut command = qemu("none", object, uid);
        command.args(["-qmp", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Guarded(command.spawn().expect("QEMU is installed by make setup"));
        // The greeting comes when all objects have been made.
        let mut greeting = String::new();
        BufReader::new(child.0.stdout.as_mut().unwrap()).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "QEMU ended: {object}");
        Guest { child, qtest: None }
    }

    fn connect(&mut self, socket: &Path) -> UnixStream {
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                return stream;
            }
            assert!(self.child.0.try_wait().unwrap().is_none(), "QEMU ended before it listened");
            assert!(start.elapsed() < PATIENCE, "QEMU does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    fn ask(&mut self, words: &str) -> String {
        let qtest = self.qtest.as_mut().expect("a guest with memory");
        qtest.get_mut().write_all(format!("{words}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        qtest.read_line(&mut answer).unwrap();
        answer.trim_end().strip_prefix("OK").unwrap_or_else(|| panic!("{words}: {answer}")).trim().to_owned()
    }

    /// One byte of the guest's memory.
    pub fn read(&mut self, address: u64) -> u8 {
        let answer = self.ask(&format!("readb {address:#x}"));
        u8::try_from(u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()).unwrap()
    }

    /// Writes one byte of the guest's memory, as a device or a CPU would.
    pub fn write(&mut self, address: u64, value: u8) {
        self.ask(&format!("writeb {address:#x} {value:#x}"));
    }

    /// Its memory mappings with all that the kernel says of them.
    pub fn smaps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap()
    }
}
