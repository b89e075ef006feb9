//! A mount that is detached while clones map its files, clones that are killed during a read, and a mount whose
//! supervisor and server are both killed.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::daemon::drill::{Drill, Times, drop_caches, is_read, quantile, stop};
use crate::support::daemon::inflight::table_of;
use crate::support::daemon::readers::{Image, PAGE, Readers};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

const IMAGE: Image = Image { salt: 3, pages: 8 << 10 };

fn map(path: &Path) -> Actor {
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
    clone
}

fn assert_page(clone: &mut Actor, page: u64) {
    assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page), "page {page}");
}

#[test]
fn a_detached_mount_serves_clones_until_the_last_one_exits() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut clones: Vec<Actor> = (0..8).map(|_| map(&path)).collect();
    let processes = world.processes();
    assert_eq!(processes.len(), 2);

    // `stencil umount` first looks for the mount and its processes, as `stencil status` does: that time does not count.
    let start = Instant::now();
    world.status();
    let status_time = start.elapsed();
    let start = Instant::now();
    let mut umount = world.command().args(["umount", "-l"]).arg(world.mountpoint()).spawn().unwrap();
    while fs::symlink_metadata(&path).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(5), "the path still exists");
        std::thread::sleep(Duration::from_micros(200));
    }
    let path_gone_after = start.elapsed();
    assert!(umount.wait().unwrap().success());

    // Each clone reads its own eighth of the pages, none of which has been read before.
    let duration = Duration::from_secs(host::rounds(2, 20));
    let part = IMAGE.pages / clones.len() as u64;
    for turn in 0..part {
        for (i, clone) in clones.iter_mut().enumerate() {
            assert_page(clone, i as u64 * part + turn);
        }
        let due = start + duration.mul_f64(turn as f64 / part as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }

    let last = clones.pop().unwrap();
    drop(clones);
    assert!(processes.iter().all(ProcessId::is_alive), "a daemon exited while one clone was left");
    let start = Instant::now();
    last.kill();
    wait_for("the exit of supervisor and server", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let exited_after = start.elapsed();
    println!(
        "lazy umount: path gone after {path_gone_after:.1?}; {} pages compared in {duration:?}; daemons exited after \
         {exited_after:.1?}",
        IMAGE.pages
    );
    assert!(
        path_gone_after <= Duration::from_millis(200) + 3 * status_time,
        "the path was gone after {path_gone_after:?}; `stencil status` takes {status_time:?}"
    );
    assert!(exited_after <= Duration::from_secs(5), "{exited_after:?}");
}

/// Page faults with and without readahead, buffered and direct reads: each waits for a reply in another kernel
/// function.
const WAYS: [&str; 4] = ["map", "readahead", "pread", "direct1m"];

#[test]
fn a_clone_killed_in_a_read_is_reaped_within_a_second() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut reaped = Vec::new();
    let mut in_read = 0;
    let table = table_of(world.server());
    // Each clone reads its own part of the file: the offset of a READ identifies the clone.
    let part = IMAGE.pages / WAYS.len() as u64 * PAGE;
    for _ in 0..host::rounds(10, 50) {
        let mut clones = Readers::new(world.dir(), Duration::ZERO);
        clones.apart(&WAYS, IMAGE, &path);
        clones.wait_progress(10);
        for clone in 0..WAYS.len() {
            let has_read = || table.requests().any(|r| is_read(&r) && r.offset / part == clone as u64);
            let deadline = Instant::now() + Duration::from_secs(1);
            while !has_read() && Instant::now() < deadline {
                std::hint::spin_loop();
            }
            in_read += usize::from(has_read());
            reaped.push(clones.kill(clone));
        }
    }
    reaped.sort();
    println!("clones killed, {in_read} of them in a READ; reaped after {}", Times(&reaped));
    assert!(in_read * 4 >= reaped.len(), "only {in_read} of {} clones were killed in a READ", reaped.len());
    assert!(quantile(&reaped, 1.0) <= Duration::from_secs(1), "{reaped:?}");
}

/// Without a running server, some killed clones cannot exit: they exit after the restart of the server.
#[test]
fn clones_killed_under_a_stopped_server_exit_after_its_restart() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clones = Readers::new(world.dir(), Duration::ZERO);
    clones.apart(&WAYS, IMAGE, &world.file(&digest, "memory"));
    clones.wait_progress(10);
    let mut drill = Drill::new(&world);
    stop(drill.server());
    let pids: Vec<u32> = (0..WAYS.len()).map(|clone| clones.pid(clone)).collect();
    wait_for("a pending request of every clone", || {
        let before = clones.progress();
        std::thread::sleep(Duration::from_millis(100));
        (clones.progress() == before && drill.unanswered() >= WAYS.len() as u64).then_some(())
    });
    let processes: Vec<_> = pids.iter().map(|&pid| ProcessId::of(pid).unwrap().unwrap()).collect();
    for process in &processes {
        process.signal(Signal::KILL).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    let stuck: Vec<&str> = (0..WAYS.len()).filter(|&i| processes[i].is_alive()).map(|i| WAYS[i]).collect();
    assert!(!stuck.is_empty(), "no clone waited for a reply");
    drill.kill();
    let reaped: Vec<Duration> = (0..WAYS.len()).map(|clone| clones.kill(clone)).collect();
    println!(
        "under a stopped server {stuck:?} could not exit; after its restart the clones were reaped within {reaped:.1?}"
    );
    assert!(reaped.iter().all(|after| *after <= Duration::from_secs(1)), "{reaped:?}");
}

#[test]
fn killing_supervisor_and_server_has_the_documented_effects() {
    let _host = host::alone();
    for serve in ["decode", "passthrough", "kernel"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
        world.wait_until_verified(&digest);
        let path = world.file(&digest, "memory");
        let mut clone = map(&path);
        assert_page(&mut clone, 5);
        // The supervisor is killed first: it would start another server.
        for process in world.processes() {
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_for_exit(Duration::from_secs(1)).unwrap());
        }
        let error = fs::File::open(&path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{serve}: {error}");
        assert_page(&mut clone, 5);
        if serve != "decode" {
            drop_caches();
            (0..IMAGE.pages).for_each(|page| assert_page(&mut clone, page));
        } else {
            assert_eq!(clone.dies_of(&format!("read 0 {}", IMAGE.pages - 1)), Some(libc::SIGBUS));
        }
    }
}
