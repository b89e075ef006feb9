//! Real Firecrackers, and the guest of `tests/support/firecracker-guest`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::clones::vmm_api::{Api, Server};

use crate::support::mount::{STENCIL, wait_for};
use crate::support::vm::guest::cache;

/// Memory of the guest in MiB.
pub const MEMORY_MIB: u64 = 128;

/// Pages that the command `w` writes.
pub const WRITTEN_PAGES: u64 = 64;

/// Time limit for one request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the path of a program in the directory of `make setup`: `firecracker` or `jailer`.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let path = cache().join(name);
    assert!(path.is_file(), "missing {}: run make setup", path.display());
    path
}

/// Compiles the guest and returns its path.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        // The guest is compiled under a temporary name and renamed: another test run may compile the guest at the same
        // time.
        let out = Path::new(STENCIL).with_file_name("stencil-test-firecracker-guest");
        let fresh = out.with_extension(std::process::id().to_string());
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/firecracker-guest");
        let status = Command::new("cc")
            .args(["-O1", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mno-red-zone"])
            .args(["-mgeneral-regs-only", "-static", "-nostdlib", "-Wl,--build-id=none"])
            .args(["-Wl,-z,max-page-size=4096", "-Wl,--no-warn-rwx-segments", "-T"])
            .arg(sources.join("link.ld"))
            .args([sources.join("start.S"), sources.join("guest.c")])
            .arg("-o")
            .arg(&fresh)
            .status();
        assert!(status.expect("cannot run cc").success(), "cannot compile the guest");
        fs::rename(&fresh, &out).unwrap();
        out
    })
}

/// The serial port of a guest.
pub struct Serial {
    input: File,
    output: PathBuf,
    /// Bytes of the output that belong to earlier answers.
    read: usize,
}

impl Serial {
    /// Opens the serial port of a clone of `stencil clone`.
    pub fn of_clone(dir: &Path) -> Serial {
        // The FIFO is opened for reading too: an open for writing alone would wait for a reader.
        let input = File::options().read(true).write(true).open(dir.join("serial.in")).unwrap();
        Serial { input, output: dir.join("serial.log"), read: 0 }
    }

    /// Sends a command without waiting for its answer.
    pub fn send(&mut self, command: char) {
        self.input.write_all(&[command as u8]).unwrap();
    }

    /// Waits for the next answer: a line.
    #[track_caller]
    pub fn answer(&mut self) -> String {
        let line = wait_for("an answer of the guest", || {
            let text = String::from_utf8_lossy(&fs::read(&self.output).unwrap()).into_owned();
            let (line, _) = text.get(self.read..)?.split_once('\n')?;
            Some(line.to_owned())
        });
        self.read += line.len() + 1;
        line
    }

    /// Sends a command and returns the answer.
    #[track_caller]
    pub fn ask(&mut self, command: char) -> String {
        self.send(command);
        self.answer()
    }
}

/// A Firecracker of one scenario; killed on drop.
pub struct Firecracker {
    child: Child,
    dir: PathBuf,
    /// The guest's serial port.
    pub serial: Serial,
}

impl Firecracker {
    /// Starts a Firecracker without a guest; its working directory is `dir`, which must exist.
    pub fn start(dir: &Path) -> Firecracker {
        Firecracker::start_by(dir, Command::new(program("firecracker")))
    }

    /// Same as [`start`](Self::start) with another command, to which the arguments of Firecracker are added. Its files
    /// are in `dir`.
    pub fn start_by(dir: &Path, mut command: Command) -> Firecracker {
        for name in ["log", "serial.log"] {
            File::create(dir.join(name)).unwrap();
        }
        let mut child = command
            .args(["--api-sock", "api.sock", "--log-path", "log", "--level", "Info"])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(File::options().append(true).open(dir.join("serial.log")).unwrap())
            .stderr(File::create(dir.join("errors")).unwrap())
            .spawn()
            .unwrap();
        let input = File::from(std::os::fd::OwnedFd::from(child.stdin.take().unwrap()));
        let serial = Serial { input, output: dir.join("serial.log"), read: 0 };
        let firecracker = Firecracker { child, dir: dir.to_owned(), serial };
        wait_for("the API socket", || Api::connect(Server::Firecracker, &firecracker.socket()).ok());
        firecracker
    }

    /// Boots the guest and waits until it executes commands. `more` are requests before the start: each a request line
    /// and its body.
    pub fn boot(dir: &Path, more: &[(&str, Value)]) -> Firecracker {
        let mut firecracker = Firecracker::start(dir);
        let machine = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "track_dirty_pages": true});
        firecracker.run("PUT /boot-source", json!({"kernel_image_path": guest(), "boot_args": ""}));
        firecracker.run("PUT /machine-config", machine);
        for (request, body) in more {
            firecracker.run(request, body.clone());
        }
        firecracker.run("PUT /actions", json!({"action_type": "InstanceStart"}));
        assert_eq!(firecracker.serial.answer(), "R");
        firecracker
    }

    /// Pauses the guest and writes a snapshot (`Full` or `Diff`) to the files `state` and `memory` in a directory.
    pub fn snapshot(&self, kind: &str, dir: &Path) {
        self.run("PATCH /vm", json!({"state": "Paused"}));
        let files = json!({"snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory")});
        let mut body = json!({"snapshot_type": kind});
        body.as_object_mut().unwrap().extend(files.as_object().unwrap().clone());
        self.run("PUT /snapshot/create", body);
    }

    /// Loads a snapshot: the body of `PUT /snapshot/load`.
    pub fn load(&self, body: &Value) {
        self.run("PUT /snapshot/load", body.clone());
    }

    /// Resumes a paused guest.
    pub fn resume(&self) {
        self.run("PATCH /vm", json!({"state": "Resumed"}));
    }

    /// Runs a request, which must succeed.
    #[track_caller]
    pub fn run(&self, request: &str, body: Value) {
        let mut api = Api::connect(Server::Firecracker, &self.socket()).unwrap();
        api.run(request, &body, Instant::now() + TIMEOUT).unwrap();
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The path of the API socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for name in ["log", "errors"] {
                eprintln!("{}", fs::read_to_string(self.dir.join(name)).unwrap_or_default());
            }
        }
    }
}
