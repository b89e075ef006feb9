//! The three ways to end a mount, and that nothing is left behind.

use std::fs::{self, File};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::mount::{TestMount, wait_for};
use crate::support::{drill, host};

const PAGE: u64 = 4096;
const PAGES: u64 = 2048;

fn image() -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn map(world: &TestMount, digest: &str) -> Actor {
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {} rw", world.file(digest, "memory").display(), PAGES * PAGE));
    actor
}

/// What the log says once the first signal is acted upon.
const DRAINS: &str = "served until its last use ends";

/// Every page has its bytes.
fn assert_reads(clone: &mut Actor) {
    let bytes = image();
    for number in 0..PAGES {
        assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
    }
}

/// No mount, no process, no record.
fn assert_nothing_is_left(world: &TestMount, processes: &[ProcessId]) {
    wait_for("the processes' end", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let records: Vec<_> =
        fs::read_dir(world.runtime_dir().join("mounts")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(records.is_empty(), "{records:?}");
    assert_eq!(fs::read_dir(world.mountpoint()).unwrap().count(), 0);
    assert!(world.json(&["status"])["mounts"].as_array().unwrap().is_empty());
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(world.mountpoint().to_str().unwrap()));
}

#[test]
fn a_mount_that_nobody_uses_ends_at_once_and_leaves_nothing() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&image(), "web:1");
        assert!(fs::read(world.file(&digest, "memory")).unwrap() == image());
        let processes = world.processes();
        assert_eq!(processes.len(), 2);
        world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
        assert_nothing_is_left(&world, &processes);
        world.mount(&["--serve", serve]).ok();
        assert!(fs::read(world.file(&digest, "memory")).unwrap() == image(), "and can be mounted again");
    }
}

#[test]
fn umount_with_clones_is_refused_with_their_list() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&image(), "web:1");
        let mnt = world.mountpoint().to_str().unwrap();
        let mut clones = [map(&world, &digest), map(&world, &digest)];
        let refused = world.stencil(&["umount", mnt]).exits(5).says("2 processes map templates of the mount");
        for clone in &clones {
            assert!(refused.err.contains(&clone.pid().to_string()), "{}", refused.err);
        }
        assert_eq!(clones[0].tell("read 0 5") as u8, image()[5 * PAGE as usize], "they are unharmed");
        drop(clones);
        // An open file without a mapping holds it too.
        let open = File::open(world.file(&digest, "memory")).unwrap();
        let refused = world.stencil(&["umount", mnt]).exits(5);
        assert!(refused.err.contains(&format!("{} (", std::process::id())), "{}", refused.err);
        drop(open);
        world.stencil(&["umount", mnt]).ok();
    }
}

#[test]
fn a_lazy_unmount_serves_until_the_last_mapping_is_gone() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let bytes = image();
        let digest = world.import_bytes(&bytes, "web:1");
        let mut clone = map(&world, &digest);
        clone.tell("write 0 3 77");
        let processes = world.processes();
        let mnt = world.mountpoint().to_str().unwrap();
        let run = world.stencil(&["umount", "-l", mnt]).ok();
        assert!(run.out.contains(&clone.pid().to_string()), "{}", run.out);
        assert_eq!(fs::read_dir(world.mountpoint()).unwrap().count(), 0, "no path leads to it");
        let status = world.status();
        assert_eq!((&status["detached"], &status["templates"][0]["clones"]), (&true.into(), &1.into()));
        // Pages that nobody has touched, before and after a server was killed.
        for number in (0..PAGES / 2).filter(|n| *n != 3) {
            assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
        }
        world.kill_server();
        for number in PAGES / 2..PAGES {
            assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
        }
        // The place is free for another one meanwhile.
        world.mount(&["--serve", serve]).ok();
        assert_eq!(world.json(&["status"])["mounts"].as_array().unwrap().len(), 2);
        world.stencil(&["umount", mnt]).ok();
        assert!(processes[0].is_alive(), "the supervisor serves on");
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

#[test]
fn a_forced_unmount_names_who_will_die_and_ends() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let bytes = image();
        let digest = world.import_bytes(&bytes, "web:1");
        let mut clone = map(&world, &digest);
        let processes = world.processes();
        let run = world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]).ok();
        assert!(run.err.contains(&clone.pid().to_string()), "{}", run.err);
        if serve == "passthrough" {
            // Such a mapping needs no server, nor a mount.
            assert_eq!(clone.tell("read 0 100") as u8, bytes[100 * PAGE as usize]);
        } else {
            assert_eq!(clone.dies_of("read 0 100"), Some(libc::SIGBUS));
        }
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

#[test]
fn a_mount_that_is_taken_away_by_others_ends_too() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let processes = world.processes();
    crate::support::mount::run("umount", &[world.mountpoint()]);
    assert_nothing_is_left(&world, &processes);

    world.mount(&[]).ok();
    let processes = world.processes();
    // As a service manager ends it.
    processes[0].signal(Signal::TERM).unwrap();
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn sigterm_with_clones_serves_on_until_they_end() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    let mut clone = map(&world, &digest);
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the detaching", || (fs::read_dir(world.mountpoint()).unwrap().count() == 0).then_some(()));
    assert_reads(&mut clone);
    drop(clone);
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn a_second_sigterm_names_who_will_die_and_ends() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let digest = world.import_bytes(&image(), "web:1");
    let mut child = world
        .command()
        .args(["mount", "-f", "--serve", "decode", world.mountpoint().to_str().unwrap()])
        .stderr(File::create(world.dir().join("terminal")).unwrap())
        .spawn()
        .unwrap();
    wait_for("the mount", || fs::metadata(world.file(&digest, "memory")).ok());
    let mut clone = map(&world, &digest);
    clone.tell("read 0 3");
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    let said = || fs::read_to_string(world.dir().join("terminal")).unwrap();
    wait_for("the detaching", || said().contains(DRAINS).then_some(()));
    assert_eq!(clone.tell("read 0 4") as u8, image()[4 * PAGE as usize], "one SIGTERM hurts nobody");
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the end", || (!processes[0].is_alive()).then_some(()));
    child.wait().unwrap();
    assert_eq!(clone.dies_of(&format!("read 0 {}", PAGES - 1)), Some(libc::SIGBUS));
    assert!(said().contains(&format!("{}", clone.pid())), "{}", said());
    assert_nothing_is_left(&world, &processes);
}

/// What comes before the supervisor has acted upon the first one is no second one.
#[test]
fn signals_that_come_together_are_one() {
    let _host = host::shared();
    for all in [[Signal::TERM, Signal::HUP], [Signal::INT, Signal::TERM]] {
        let world = TestMount::new("decode");
        let digest = world.import_bytes(&image(), "web:1");
        let mut clone = map(&world, &digest);
        let processes = world.processes();
        drill::stop(processes[0]);
        for signal in all.into_iter().chain([Signal::CONT]) {
            processes[0].signal(signal).unwrap();
        }
        wait_for("the detaching", || world.log().contains(DRAINS).then_some(()));
        assert_reads(&mut clone);
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

/// A shell sends SIGHUP to its jobs, then the kernel to the terminal's group; a session's end is SIGTERM and SIGHUP.
#[test]
fn a_terminal_that_ends_cuts_nobody_off() {
    let _host = host::shared();
    for first in [Signal::HUP, Signal::TERM] {
        let world = TestMount::new("decode");
        let digest = world.import_bytes(&image(), "web:1");
        let mut clone = map(&world, &digest);
        let processes = world.processes();
        processes[0].signal(first).unwrap();
        wait_for("the detaching", || world.log().contains(DRAINS).then_some(()));
        processes[0].signal(Signal::HUP).unwrap();
        wait_for("the second", || world.log().contains("termination signal ignored").then_some(()));
        assert_reads(&mut clone);
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

/// The supervisor becomes another program in between, and still knows that it was asked once.
#[test]
fn a_second_sigterm_after_a_restart_is_the_second() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&image(), "web:1");
    let mut clone = map(&world, &digest);
    clone.tell("read 0 3");
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the detaching", || (fs::read_dir(world.mountpoint()).unwrap().count() == 0).then_some(()));
    world.stencil(&["restart", "--all"]).ok();
    assert_eq!(world.processes()[0], processes[0], "exec keeps the process");
    assert_eq!(clone.tell("read 0 4") as u8, image()[4 * PAGE as usize], "nobody is hurt yet");
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the end", || (!processes[0].is_alive()).then_some(()));
    assert_eq!(clone.dies_of(&format!("read 0 {}", PAGES - 1)), Some(libc::SIGBUS));
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn a_mount_in_the_foreground_talks_to_its_terminal_and_ends_with_it() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let digest = world.import_bytes(&image(), "web:1");
    let mut child = world
        .command()
        .args(["mount", "-f", world.mountpoint().to_str().unwrap()])
        .stderr(File::create(world.dir().join("terminal")).unwrap())
        .spawn()
        .unwrap();
    wait_for("the mount", || fs::metadata(world.file(&digest, "memory")).ok());
    let processes = world.processes();
    assert_eq!(processes[0].pid, child.id());
    processes[0].signal(Signal::INT).unwrap();
    assert!(child.wait().unwrap().success());
    assert_nothing_is_left(&world, &processes);
    let said = fs::read_to_string(world.dir().join("terminal")).unwrap();
    assert!(said.contains("serving with") && said.contains("the mount has ended"), "{said}");
}
