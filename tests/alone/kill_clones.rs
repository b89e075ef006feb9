//! The way out of a mount: detached under its clones, a clone killed in a read, supervisor and server both killed.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::drill::{Drill, Times, is_read, quantile, stop};
use crate::support::host;
use crate::support::inflight::table_of;
use crate::support::mount::{TestMount, wait_for};
use crate::support::readers::{Image, PAGE, Readers};

const IMAGE: Image = Image { salt: 3, pages: 8 << 10 };

fn map(path: &Path) -> Actor {
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
    clone
}

fn page_is_right(clone: &mut Actor, page: u64) {
    assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page), "page {page}");
}

#[test]
fn a_detached_mount_serves_eight_decode_clones_until_the_last_is_killed() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut clones: Vec<Actor> = (0..8).map(|_| map(&path)).collect();
    let processes = world.processes();
    assert_eq!(processes.len(), 2);

    // What the command takes to look for the mount and its users is not the mount's.
    let begun = Instant::now();
    world.status();
    let usual = begun.elapsed();
    let begun = Instant::now();
    let mut umount = world.command().args(["umount", "-l"]).arg(world.mountpoint()).spawn().unwrap();
    while fs::symlink_metadata(&path).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the path stays");
        std::thread::sleep(Duration::from_micros(200));
    }
    let gone = begun.elapsed();
    assert!(umount.wait().unwrap().success());

    // Each clone has an eighth of the pages to itself: none was touched by anybody.
    let long = Duration::from_secs(host::rounds(2, 60));
    let part = IMAGE.pages / clones.len() as u64;
    for turn in 0..part {
        for (i, clone) in clones.iter_mut().enumerate() {
            page_is_right(clone, i as u64 * part + turn);
        }
        let due = begun + long.mul_f64(turn as f64 / part as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }

    let last = clones.pop().unwrap();
    drop(clones);
    assert!(processes.iter().all(ProcessId::is_alive), "one clone is left");
    let begun = Instant::now();
    last.kill();
    wait_for("the processes' end", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let ended = begun.elapsed();
    println!(
        "lazy umount: path gone after {gone:.1?}; {} pages right within {long:?}; ended {ended:.1?} after",
        IMAGE.pages
    );
    assert!(gone <= Duration::from_millis(200) + 3 * usual, "{gone:?}, status took {usual:?}");
    assert!(ended <= Duration::from_secs(5), "{ended:?}");
}

/// Faults with and without readahead, buffered and direct reads: they wait for the answer in different ways.
const WAYS: [&str; 4] = ["map", "readahead", "pread", "direct1m"];

#[test]
fn a_clone_killed_in_a_read_is_reaped() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut reaped = Vec::new();
    let mut inside = 0;
    let table = table_of(world.server());
    // Each clone has a part of the file to itself: the READ says whose it is.
    let part = IMAGE.pages / WAYS.len() as u64 * PAGE;
    for _ in 0..host::rounds(10, 50) {
        let mut clones = Readers::new(world.dir(), Duration::ZERO);
        clones.apart(&WAYS, IMAGE, &path);
        clones.wait_progress(10);
        for clone in 0..WAYS.len() {
            let waits = || table.requests().any(|r| is_read(&r) && r.offset / part == clone as u64);
            let until = Instant::now() + Duration::from_secs(1);
            while !waits() && Instant::now() < until {
                std::hint::spin_loop();
            }
            inside += usize::from(waits());
            reaped.push(clones.kill(clone));
        }
    }
    reaped.sort();
    println!("clones killed, {inside} of them in a READ: reaped after {}", Times(&reaped));
    assert!(inside * 4 >= reaped.len(), "few clones were inside a READ");
    assert!(quantile(&reaped, 1.0) <= Duration::from_secs(1), "{reaped:?}");
}

/// While nobody answers, some cannot end: they end with the next server.
#[test]
fn a_clone_killed_while_the_server_is_stopped_ends_with_the_next_server() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clones = Readers::new(world.dir(), Duration::ZERO);
    clones.apart(&WAYS, IMAGE, &world.file(&digest, "memory"));
    clones.wait_progress(10);
    let mut drill = Drill::new(&world);
    stop(drill.server());
    let pids: Vec<u32> = (0..WAYS.len()).map(|clone| clones.pid(clone)).collect();
    wait_for("all to wait", || {
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
    assert!(!stuck.is_empty(), "nobody waited for an answer");
    drill.kill();
    let reaped: Vec<Duration> = (0..WAYS.len()).map(|clone| clones.kill(clone)).collect();
    println!(
        "under a stopped server {stuck:?} could not end; after its end they were reaped within {reaped:.1?}"
    );
    assert!(reaped.iter().all(|after| *after <= Duration::from_secs(1)), "{reaped:?}");
}

#[test]
fn supervisor_and_server_both_killed_hurt_as_documented() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut clone = map(&path);
        page_is_right(&mut clone, 5);
        // The supervisor first: it would start another server.
        for process in world.processes() {
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_gone(Duration::from_secs(1)).unwrap());
        }
        let error = fs::File::open(&path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{serve}: {error}");
        page_is_right(&mut clone, 5);
        if serve == "passthrough" {
            (0..IMAGE.pages).for_each(|page| page_is_right(&mut clone, page));
        } else {
            assert_eq!(clone.dies_of(&format!("read 0 {}", IMAGE.pages - 1)), Some(libc::SIGBUS));
        }
    }
}
