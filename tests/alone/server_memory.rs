//! Servers that a memory limit kills: they are not restarted without a pause, and `status` says why they end.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, wait_for};
use crate::support::store::random;

/// A control group with a memory limit. Dropped, it is removed; its processes must have ended.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Group {
    fn new() -> Group {
        let name = format!("stencil-test-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/memory");
        let group = if first.join("memory.limit_in_bytes").exists() {
            Group { folder: first.join(name), limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes" }
        } else {
            Group {
                folder: Path::new("/sys/fs/cgroup").join(name),
                limit: "memory.max",
                usage: "memory.current",
            }
        };
        fs::create_dir(&group.folder).unwrap_or_else(|e| panic!("{}: {e}", group.folder.display()));
        group
    }

    fn usage(&self) -> u64 {
        fs::read_to_string(self.folder.join(self.usage)).unwrap().trim().parse().unwrap()
    }

    /// So many bytes more than what is used and cannot be given back.
    fn limit(&self, room: u64) {
        const STEP: u64 = 128 << 10;
        let mut least = self.usage();
        // Version 1 refuses a limit that cannot be met; version 2 says what can be given back.
        if self.limit == "memory.max" {
            let _ = fs::write(self.folder.join("memory.reclaim"), least.to_string());
            least = self.usage();
        } else {
            while fs::write(self.folder.join(self.limit), least.to_string()).is_ok() {
                least -= STEP;
            }
        }
        fs::write(self.folder.join(self.limit), (least + STEP + room).to_string()).unwrap();
    }

    fn unlimit(&self) {
        let word = if self.limit == "memory.max" { "max" } else { "-1" };
        fs::write(self.folder.join(self.limit), word).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.folder).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn servers_below_the_memory_that_they_need_are_restarted_with_growing_pauses() {
    let _host = host::alone();
    let group = Group::new();
    let world = TestMount::unmounted();
    let content = random(9, 32 << 20);
    let digest = world.import_bytes(&content, "web:1");
    let script = format!(
        "echo $$ >{}/cgroup.procs && exec {STENCIL} mount --serve decode --watchdog 0 \"$0\"",
        group.folder.display()
    );
    let mount = world.command_in("sh").args(["-c", &script]).arg(world.mountpoint()).status().unwrap();
    assert!(mount.success());
    let quiet = world.status();
    assert_eq!(
        (&quiet["last_end"], &quiet["next_start"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    // So much that a server begins and serves, and less than it needs for its work.
    group.limit(ROOM);
    let file = world.file(&digest, "memory");
    let reader = std::thread::spawn(move || fs::read(file));
    let paused = wait_for("a pause", || {
        let status = world.status();
        status["next_start"].is_f64().then_some(status)
    });
    let end = &paused["last_end"];
    assert_eq!(
        (end["how"].as_str(), end["out_of_memory"].as_bool()),
        (Some("killed by SIGKILL"), Some(true)),
        "{end}"
    );
    let text = world.stencil(&["status"]).ok().out;
    assert!(text.contains("likely out of memory"), "{text}");
    let (begun, before) = (Instant::now(), world.status()["restarts"].as_u64().unwrap());
    std::thread::sleep(Duration::from_millis(1500));
    let after = world.status()["restarts"].as_u64().unwrap();
    assert!(after - before <= 4, "{} restarts in {:?}", after - before, begun.elapsed());
    assert!(after < 20, "{after} restarts");
    // With memory again the next one serves, and the reader has lost nothing.
    group.unlimit();
    assert!(reader.join().unwrap().unwrap() == content);
    let healed = world.status();
    assert!(healed["next_start"].is_null() && healed["server_pid"].is_u64(), "{healed}");
    // A kill from outside is none of these.
    let server = world.server();
    kill_process(Pid::from_raw(server as i32).unwrap(), Signal::KILL).unwrap();
    let next = wait_for("a successor", || Some(world.server()).filter(|next| *next != server));
    assert!(ProcessId::of(next).unwrap().is_some());
    let end = &world.status()["last_end"];
    assert_eq!(
        (end["pid"].as_u64(), end["out_of_memory"].as_bool()),
        (Some(u64::from(server)), Some(false)),
        "{end}"
    );
    drop(world);
}

/// Below what one decoded block for each thread takes.
const ROOM: u64 = 0;
