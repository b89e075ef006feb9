//! The installed QEMU as the reference for memory objects: its verdict on an object, how it maps the object, and the
//! effect of reads and writes of the guest's memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";

/// Longer than any of these runs takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The verdict of a program on a memory object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// The error, and the hint on the line below if there is one.
    Refused {
        words: String,
        hint: Option<String>,
    },
    /// Killed by a signal.
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

/// A child that is killed on drop.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts QEMU with the object, lets it quit at once, and returns its verdict.
pub fn verdict(object: &str, uid: Option<u32>) -> Verdict {
    let mut command = qemu("none", object, uid);
    command.args(["-qmp", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Guarded(command.spawn().expect("cannot run QEMU: run make setup"));
    // A QEMU that rejects its command line closes the pipe before it reads.
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

/// Finds the error in QEMU's output: the first line with the program's name that is not a warning, and the hint below
/// it. Lines before it may be warnings, their advice, and `perror` lines, which do not begin with the program's name.
fn refusal(said: &str, object: &str) -> Verdict {
    let prefix = format!("{QEMU}: ");
    let place = format!("-object {object}: ");
    let error = |line: &str| {
        let words = line.strip_prefix(&prefix)?;
        let words = words.strip_prefix(&place).unwrap_or(words);
        (!words.starts_with("warning: ")).then(|| words.to_owned())
    };
    let mut lines = said.lines();
    let words = lines.find_map(error).unwrap_or_else(|| panic!("QEMU failed without an error: {said}"));
    Verdict::Refused { words, hint: lines.next().map(str::to_owned) }
}

/// A running QEMU with a stopped CPU, whose guest memory is the object.
pub struct Guest {
    child: Guarded,
    qtest: Option<BufReader<UnixStream>>,
}

impl Guest {
    /// Starts QEMU with the object as the memory of a machine, which can be read and written.
    pub fn with_memory(object: &str, folder: &Path) -> Guest {
        let socket = folder.join("qtest");
        let mut command = qemu("microvm,memory-backend=m", object, None);
        command.arg("-qtest").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(["-qtest-log", "none"]).stderr(Stdio::null());
        let child = Guarded(command.spawn().expect("cannot run QEMU: run make setup"));
        let mut guest = Guest { child, qtest: None };
        let stream = guest.connect(&socket);
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        guest.qtest = Some(BufReader::new(stream));
        guest
    }

    /// Starts QEMU with the object alone, without a machine.
    pub fn without_machine(object: &str, uid: Option<u32>) -> Guest {
        let mut command = qemu("none", object, uid);
        command.args(["-qmp", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Guarded(command.spawn().expect("cannot run QEMU: run make setup"));
        // QEMU sends its greeting after it has created all objects.
        let mut greeting = String::new();
        BufReader::new(child.0.stdout.as_mut().unwrap()).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "QEMU exited: {object}");
        Guest { child, qtest: None }
    }

    fn connect(&mut self, socket: &Path) -> UnixStream {
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                return stream;
            }
            assert!(self.child.0.try_wait().unwrap().is_none(), "QEMU exited before it listened");
            assert!(start.elapsed() < TIMEOUT, "timed out waiting for QEMU to listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    fn ask(&mut self, words: &str) -> String {
        let qtest = self.qtest.as_mut().expect("the guest has no memory");
        qtest.get_mut().write_all(format!("{words}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        qtest.read_line(&mut answer).unwrap();
        answer.trim_end().strip_prefix("OK").unwrap_or_else(|| panic!("{words}: {answer}")).trim().to_owned()
    }

    /// Reads one byte of the guest's memory.
    pub fn read(&mut self, address: u64) -> u8 {
        let answer = self.ask(&format!("readb {address:#x}"));
        u8::try_from(u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()).unwrap()
    }

    /// Writes one byte of the guest's memory, like a device or a CPU.
    pub fn write(&mut self, address: u64, value: u8) {
        self.ask(&format!("writeb {address:#x} {value:#x}"));
    }

    /// The contents of QEMU's `/proc/PID/smaps`.
    pub fn smaps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap()
    }
}
