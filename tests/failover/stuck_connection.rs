//! `stencil doctor` finds FUSE connections whose requests are not answered, and aborts one after confirmation.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use serde_json::Value;
use stencilfs::sys::files::mount;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::daemon::drill;
use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, wait_for};
use crate::support::store::random;

const SIZE: u64 = 8 << 20;

/// A stopped server, and a clone that waits for a page. Drop continues the server.
struct Wedged {
    world: TestMount,
    server: ProcessId,
    device: u64,
    clone: Option<Actor>,
}

impl Wedged {
    fn new() -> Wedged {
        // No watchdog, so that the server stays stopped.
        let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
        let digest = world.import_bytes(&random(3, SIZE as usize), "web:1");
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {SIZE} rw", world.file(&digest, "memory").display()));
        let server = ProcessId::of(world.server()).unwrap().unwrap();
        let device = world.status()["device"].as_u64().unwrap();
        drill::stop(server);
        Wedged { world, server, device, clone: Some(clone) }
    }

    /// Makes the clone read a page, which blocks.
    fn block_clone(&mut self) {
        self.clone.as_mut().unwrap().begin("read 0 77");
        wait_for("the connection to be stuck", || self.stuck().is_some().then_some(()));
    }

    fn number(&self) -> String {
        rustix::fs::minor(self.device).to_string()
    }

    fn pid(&self) -> u32 {
        self.clone.as_ref().unwrap().pid()
    }

    /// Returns the entry of this connection in the output of `doctor`.
    fn stuck(&self) -> Option<Value> {
        stuck(&self.world, &self.number())
    }

    /// Runs `stencil` at a terminal and types a line at its prompt.
    fn at_a_terminal(&self, words: &str, typed: &str) -> (i32, String) {
        let mut command = Command::new("script");
        command.args(["-qec", &format!("{STENCIL} {words}"), "/dev/null"]);
        for (key, value) in self.world.command().get_envs() {
            if let Some(value) = value {
                command.env(key, value);
            }
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = Vec::new();
        let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        // Wait for the prompt: input that is typed before the program reads may be discarded.
        let mut piece = [0; 512];
        while !String::from_utf8_lossy(&said).contains("[y/N]") {
            match output.read(&mut piece).unwrap() {
                0 => break,
                count => said.extend_from_slice(&piece[..count]),
            }
        }
        let _ = writeln!(input, "{typed}");
        output.read_to_end(&mut said).unwrap();
        let code = child.wait().unwrap().code().unwrap_or(-1);
        (code, String::from_utf8_lossy(&said).into_owned())
    }

    /// Waits until the clone has died, and panics unless the whole mount is gone.
    fn assert_gone(mut self) {
        let clone = self.clone.take().unwrap();
        let pid = clone.pid();
        wait_for("the exit of the clone", || {
            let stat = stencilfs::sys::process::procfs::stat(pid).unwrap();
            stat.is_none_or(|stat| !stat.is_alive()).then_some(())
        });
        drop(clone);
        self.server.signal(Signal::CONT).unwrap();
        wait_for("the exit of the mount's processes", || self.world.processes().is_empty().then_some(()));
        if mounted(&self.world) {
            // A connection that was aborted by another process leaves a dead mount, which can be unmounted.
            self.world.stencil(&["umount", self.world.mountpoint().to_str().unwrap()]).ok();
        }
        assert!(!mounted(&self.world));
    }
}

impl Drop for Wedged {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = mount::abort_fuse_connection(self.device);
        }
        let _ = self.server.signal(Signal::CONT);
    }
}

fn stuck(world: &TestMount, number: &str) -> Option<Value> {
    let run = world.stencil(&["--json", "doctor"]);
    let found: Value = serde_json::from_str(&run.out).unwrap_or_else(|e| panic!("{e}: {}", run.out));
    let all = found["stuck"].as_array().unwrap();
    let number: u64 = number.parse().unwrap();
    all.iter().find(|one| one["connection"] == number).cloned()
}

fn mounted(world: &TestMount) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.contains(world.mountpoint().to_str().unwrap())
}

#[test]
fn doctor_lists_a_stuck_connection_and_aborts_it_on_yes() {
    let _host = host::shared();
    let mut wedged = Wedged::new();
    let (pid, number) = (wedged.pid(), wedged.number());
    assert!(wedged.stuck().is_none(), "no request is pending yet");
    wedged.world.stencil(&["doctor", "--fix-stuck", &number, "--yes"]).exits(2).says("is not stuck");
    wedged.block_clone();
    let found = wedged.stuck().expect("no stuck connection although a request is pending");
    assert_eq!(found["mountpoint"], wedged.world.mountpoint().to_str().unwrap());
    assert_eq!(found["users"][0]["pid"], pid);
    assert!(found["waiting"].as_u64().unwrap() >= 1);

    let doctor = |words: &[&str]| wedged.world.stencil(&[&["doctor", "--fix-stuck"], words].concat());
    let refused = doctor(&[&number]).exits(2);
    assert!(
        refused.err.contains("standard input is not a terminal") && refused.err.contains("--yes"),
        "{}",
        refused.err
    );
    doctor(&["999999", "--yes"]).exits(4).says("there is no FUSE connection 999999");
    let words = format!("doctor --fix-stuck {number}");
    let (code, said) = wedged.at_a_terminal(&words, "n");
    assert!(code == 1 && said.contains("nothing was changed: the answer was not y"), "{code}: {said}");
    assert!(mounted(&wedged.world), "the mount is gone after the answer no");
    let (code, said) = wedged.at_a_terminal(&words, "y");
    assert!(code == 0 && said.contains(&format!("{pid} (")) && said.contains("is aborted"), "{code}: {said}");
    wedged.assert_gone();
}

#[test]
fn doctor_with_yes_needs_no_terminal_and_names_the_users() {
    let _host = host::shared();
    let mut wedged = Wedged::new();
    wedged.block_clone();
    let run = wedged.world.stencil(&["doctor", "--fix-stuck", &wedged.number(), "--yes"]).ok();
    let words = format!("{} (stencil-test-ac)", wedged.pid());
    assert!(run.err.contains(&words) && run.out.contains(&words), "{}{}", run.err, run.out);
    wedged.assert_gone();
}

#[test]
fn umount_force_aborts_a_stuck_mount_and_names_its_users() {
    let _host = host::shared();
    let mut wedged = Wedged::new();
    wedged.block_clone();
    let pid = wedged.pid();
    let mut command = wedged.world.command();
    command.args(["umount", "--force"]).arg(wedged.world.mountpoint());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The clone ends before the server, which is still stopped.
    wedged.assert_gone();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && err.contains(&format!("{pid} (stencil-test-ac)")), "{err}");
}

#[test]
fn doctor_does_not_list_a_busy_connection() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&random(4, SIZE as usize), "web:1");
    let number = rustix::fs::minor(world.status()["device"].as_u64().unwrap()).to_string();
    let path = world.file(&digest, "memory");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                // O_DIRECT bypasses the page cache: each read is a request, and twelve are pending at any time.
                let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
                let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(&path).unwrap();
                let mut buffer = vec![0_u8; (1 << 20) + 4096];
                let start = buffer.as_ptr().align_offset(4096);
                for round in 0_u64.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    let buffer = &mut buffer[start..start + (1 << 20)];
                    file.read_exact_at(buffer, (round % (SIZE >> 20)) << 20).unwrap();
                }
            });
        }
        let ends = SetOnDrop(&over);
        let found: Vec<Value> = (0..3).filter_map(|_| stuck(&world, &number)).collect();
        drop(ends);
        assert!(found.is_empty(), "{found:?}");
    });
}
