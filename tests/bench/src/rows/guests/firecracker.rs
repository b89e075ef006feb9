//! Firecracker with the guest of `tests/support/firecracker-guest`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use stencilfs::clones::vmm_api::{Api, Server};
use stencilfs::error::{Error, Result};

use super::{Kind, Running, TIMEOUT, wait_for};
use crate::run::Context;
use crate::run::site::{Store, run};

/// Memory of the guest in MiB.
const MEMORY_MIB: u64 = 128;

/// A snapshot of a guest.
pub struct Firecracker {
    program: PathBuf,
    /// Device state of the snapshot.
    state: PathBuf,
    command: String,
}

impl Firecracker {
    /// Boots the guest, writes a snapshot to `raw` and imports it as `bench:guest`.
    pub fn snapshot(context: &Context, store: &Store, raw: &Path) -> Result<Firecracker> {
        let site = context.site;
        let program = context.guests.join("firecracker");
        let program =
            program.canonicalize().map_err(|e| Error::io("cannot find Firecracker", &program, e))?;
        let (dir, guest) = (site.create_dir("firecracker.source")?, site.path("firecracker.guest"));
        compile(&guest)?;
        let mut running = start(&program, &dir)?;
        let socket = dir.join("api.sock");
        request(&socket, "PUT /boot-source", &json!({"kernel_image_path": guest, "boot_args": ""}))?;
        let machine = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB});
        request(&socket, "PUT /machine-config", &machine)?;
        request(&socket, "PUT /actions", &json!({"action_type": "InstanceStart"}))?;
        expect(&mut running, b"R\n")?;
        request(&socket, "PATCH /vm", &json!({"state": "Paused"}))?;
        let (memory, state) = (raw.join("memory"), raw.join("state"));
        let files = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory});
        request(&socket, "PUT /snapshot/create", &files)?;
        drop(running);
        let mut import = site.stencil(&["--store"]);
        import.arg(&store.dir).arg("import").arg(&memory).args([
            "bench:guest",
            "--format",
            "firecracker",
            "--state",
        ]);
        run(import.arg(&state))?;
        let command =
            "firecracker --api-sock api.sock; PUT /snapshot/load: File {memory}; the guest checks 2 MiB";
        Ok(Firecracker { program, state, command: command.to_owned() })
    }
}

impl Kind for Firecracker {
    fn name(&self) -> &'static str {
        "Firecracker"
    }

    fn command(&self) -> &str {
        &self.command
    }

    fn resume(&self, memory: &Path, dir: &Path) -> Result<Running> {
        let mut running = start(&self.program, dir)?;
        let backend = json!({"backend_type": "File", "backend_path": memory});
        let load = json!({"snapshot_path": self.state, "mem_backend": backend, "resume_vm": true});
        request(&dir.join("api.sock"), "PUT /snapshot/load", &load)?;
        // The guest reads 512 pages and compares them with what it has written before the snapshot.
        let sent = running.0.stdin.as_mut().map(|input| input.write_all(b"r"));
        sent.transpose().map_err(|e| Error::failed("cannot write to the serial port").because(e))?;
        expect(&mut running, b"K\n")?;
        Ok(running)
    }
}

fn start(program: &Path, dir: &Path) -> Result<Running> {
    let failed = |e| Error::io("cannot run Firecracker in", dir, e);
    let log = File::create(dir.join("log")).map_err(failed)?;
    let mut command = Command::new(program);
    command.args(["--api-sock", "api.sock"]).current_dir(dir).stderr(log);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    Ok(Running(child))
}

/// Waits for this answer of the guest. Firecracker writes messages of its own before the guest runs.
fn expect(running: &mut Running, answer: &[u8]) -> Result<()> {
    let failed = || Error::failed("the guest has not answered as expected");
    let output = running.0.stdout.as_mut().ok_or_else(failed)?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    let end = Instant::now() + TIMEOUT;
    loop {
        wait_for("an answer of the guest", || {
            let mut polled = [PollFd::new(&*output, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))
                .ok()
                .filter(|count| *count > 0)
        })?;
        // At the end of the output, Firecracker has ended.
        output.read_exact(&mut byte).map_err(|e| failed().because(e))?;
        line.extend(byte);
        if line == answer {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(failed());
        }
        if byte == *b"\n" {
            line.clear();
        }
    }
}

fn request(socket: &Path, request: &str, body: &Value) -> Result<()> {
    let mut api =
        wait_for("the API socket of Firecracker", || Api::connect(Server::Firecracker, socket).ok())?;
    api.run(request, body, Instant::now() + TIMEOUT)
}

fn compile(guest: &Path) -> Result<()> {
    let sources = Path::new("tests/support/firecracker-guest");
    let mut cc = Command::new("cc");
    cc.args([
        "-O1",
        "-ffreestanding",
        "-fno-pic",
        "-fno-stack-protector",
        "-mno-red-zone",
        "-mgeneral-regs-only",
    ]);
    cc.args(["-static", "-nostdlib", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"]);
    cc.args(["-Wl,--no-warn-rwx-segments", "-T"]).arg(sources.join("link.ld"));
    cc.args([sources.join("start.S"), sources.join("guest.c")]).arg("-o").arg(guest);
    run(&mut cc).map(drop)
}
