//! Servers that are killed by a memory limit: restarts back off, and `stencil status` shows the cause.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stencilfs::sys::process::ProcessId;
use stencilfs::units::PAGE_SIZE;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, wait_for};
use crate::support::store::random;

/// A control group with a memory limit. Removed on drop, when its processes must have exited.
struct Group {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Group {
    fn new() -> Group {
        let name = format!("stencil-test-{}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let group = if v1.join("memory.limit_in_bytes").exists() {
            Group { dir: v1.join(name), limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes" }
        } else {
            Group {
                dir: Path::new("/sys/fs/cgroup").join(name),
                limit: "memory.max",
                usage: "memory.current",
            }
        };
        fs::create_dir(&group.dir).unwrap_or_else(|e| panic!("{}: {e}", group.dir.display()));
        group
    }

    fn usage(&self) -> u64 {
        fs::read_to_string(self.dir.join(self.usage)).unwrap().trim().parse().unwrap()
    }

    /// Sets the limit to the memory that cannot be reclaimed, to the page.
    fn limit(&self) {
        let mut minimum = self.usage();
        // Version 2 reclaims memory on request. Version 1 rejects a limit below the memory that cannot be reclaimed.
        if self.limit == "memory.max" {
            let _ = fs::write(self.dir.join("memory.reclaim"), minimum.to_string());
            minimum = self.usage();
        } else {
            let mut step = 1 << 20;
            while step >= PAGE_SIZE {
                match fs::write(self.dir.join(self.limit), minimum.saturating_sub(step).to_string()) {
                    Ok(()) => minimum = minimum.saturating_sub(step),
                    Err(_) => step /= 2,
                }
            }
        }
        fs::write(self.dir.join(self.limit), (minimum + PAGE_SIZE).to_string()).unwrap();
    }

    fn unlimit(&self) {
        let unlimited = if self.limit == "memory.max" { "max" } else { "-1" };
        fs::write(self.dir.join(self.limit), unlimited).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn out_of_memory_restarts_back_off_and_status_shows_the_cause() {
    let _host = host::alone();
    let group = Group::new();
    let world = TestMount::unmounted();
    let content = random(9, 32 << 20);
    let digest = world.import_bytes(&content, "web:1");
    let script = format!(
        "echo $$ >{}/cgroup.procs && exec {STENCIL} mount --serve decode --watchdog 0 \"$0\"",
        group.dir.display()
    );
    let mount = world.command_in("sh").args(["-c", &script]).arg(world.mountpoint()).status().unwrap();
    assert!(mount.success());
    let quiet = world.status();
    assert_eq!(
        (&quiet["last_end"], &quiet["next_start"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    // Enough memory for a server to start, and too little to decode blocks. If a server has decoded all data
    // nevertheless, the limit is set again, and the server gets the same reads.
    let file = world.file(&digest, "memory");
    let opened = File::open(&file).unwrap();
    let mut reader = limited_reader(&group, &opened, &file);
    let paused = wait_for("a delayed restart", || {
        let status = world.status();
        if reader.is_finished() && status["server_pid"].is_u64() {
            reader = limited_reader(&group, &opened, &file);
        }
        status["next_start"].is_f64().then_some(status)
    });
    let last_end = &paused["last_end"];
    assert_eq!(
        (last_end["how"].as_str(), last_end["out_of_memory"].as_bool()),
        (Some("killed by SIGKILL"), Some(true)),
        "{last_end}"
    );
    let text = world.stencil(&["status"]).ok().out;
    assert!(text.contains("likely out of memory"), "{text}");
    let (start, before) = (Instant::now(), world.status()["restarts"].as_u64().unwrap());
    std::thread::sleep(Duration::from_millis(1500));
    let after = world.status()["restarts"].as_u64().unwrap();
    assert!(after - before <= 4, "{} restarts in {:?}", after - before, start.elapsed());
    assert!(after < 20, "{after} restarts");
    // Without the limit the next server serves, and the reader gets all data.
    group.unlimit();
    assert!(reader.join().unwrap().unwrap() == content);
    wait_for("a server that stays", || {
        let status = world.status();
        (status["next_start"].is_null() && status["server_pid"].is_u64()).then_some(())
    });
    // A SIGKILL from another process does not count as out of memory.
    let server = world.server();
    kill_process(Pid::from_raw(server as i32).unwrap(), Signal::KILL).unwrap();
    let next = wait_for("a successor", || Some(world.server()).filter(|next| *next != server));
    assert!(ProcessId::of(next).unwrap().is_some());
    let last_end = &world.status()["last_end"];
    assert_eq!(
        (last_end["pid"].as_u64(), last_end["out_of_memory"].as_bool()),
        (Some(u64::from(server)), Some(false)),
        "{last_end}"
    );
    drop(world);
}

/// Limits the group, then reads all of the file from the server in a thread.
fn limited_reader(group: &Group, opened: &File, file: &Path) -> JoinHandle<io::Result<Vec<u8>>> {
    rustix::fs::fadvise(opened, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    group.limit();
    let file = file.to_owned();
    std::thread::spawn(move || fs::read(file))
}
