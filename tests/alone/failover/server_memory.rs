//! Servers that are killed by a memory limit: restarts back off, and `stencil status` shows the cause.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stencilfs::sys::process::ProcessId;
use stencilfs::units::PAGE_SIZE;

use crate::support::host;
use crate::support::memory_group::MemoryGroup;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::random;

/// Sets the limit to the memory that cannot be reclaimed, to the page.
fn limit(group: &MemoryGroup) {
    let mut minimum = group.usage();
    // Version 2 reclaims memory on request. Version 1 rejects a limit below the memory that cannot be reclaimed.
    if group.is_v2() {
        let _ = fs::write(group.dir().join("memory.reclaim"), minimum.to_string());
        minimum = group.usage();
    } else {
        let mut step = 1 << 20;
        while step >= PAGE_SIZE {
            match group.set_limit(&minimum.saturating_sub(step).to_string()) {
                Ok(()) => minimum = minimum.saturating_sub(step),
                Err(_) => step /= 2,
            }
        }
    }
    group.set_limit(&(minimum + PAGE_SIZE).to_string()).unwrap();
}

#[test]
fn out_of_memory_restarts_back_off_and_status_shows_the_cause() {
    let _host = host::alone();
    let group = MemoryGroup::new();
    let world = TestMount::unmounted();
    let content = random(9, 32 << 20);
    let digest = world.import_bytes(&content, "web:1");
    let mut mount = world.command();
    mount.args(["mount", "--serve", "decode", "--watchdog", "0"]).arg(world.mountpoint());
    let mount = group.command(&mount).status().unwrap();
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
fn limited_reader(group: &MemoryGroup, opened: &File, file: &Path) -> JoinHandle<io::Result<Vec<u8>>> {
    rustix::fs::fadvise(opened, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    limit(group);
    let file = file.to_owned();
    std::thread::spawn(move || fs::read(file))
}
