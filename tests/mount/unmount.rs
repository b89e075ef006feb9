//! The end of a mount: umount, lazy and forced umount, and signals. Each leaves no mount, process or record behind.

use std::fs::{self, File};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::mount::{TestMount, wait_for};
use crate::support::{daemon::drill, host};

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

/// Log message of a supervisor that drains after a first signal.
const DRAINS: &str = "the mount is in use: detached, and served until the last process that uses it exits";

/// Asserts that every page has the imported bytes.
fn assert_reads(clone: &mut Actor) {
    let bytes = image();
    for number in 0..PAGES {
        assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
    }
}

/// Asserts that there is no mount, process or record.
fn assert_nothing_is_left(world: &TestMount, processes: &[ProcessId]) {
    wait_for("all processes to exit", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let records: Vec<_> =
        fs::read_dir(world.runtime_dir().join("mounts")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(records.is_empty(), "{records:?}");
    assert_eq!(fs::read_dir(world.mountpoint()).unwrap().count(), 0);
    assert!(world.json(&["status"])["mounts"].as_array().unwrap().is_empty());
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(world.mountpoint().to_str().unwrap()));
}

#[test]
fn umount_of_an_unused_mount_leaves_nothing_behind() {
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
        assert!(
            fs::read(world.file(&digest, "memory")).unwrap() == image(),
            "the store can be mounted again"
        );
    }
}

#[test]
fn umount_refuses_a_mount_in_use_and_lists_its_users() {
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
        assert_eq!(
            clones[0].tell("read 0 5") as u8,
            image()[5 * PAGE as usize],
            "the clones must be unaffected"
        );
        drop(clones);
        // An open file without a mapping is a use too.
        let open = File::open(world.file(&digest, "memory")).unwrap();
        let refused = world.stencil(&["umount", mnt]).exits(5);
        assert!(refused.err.contains(&format!("{} (", std::process::id())), "{}", refused.err);
        drop(open);
        world.stencil(&["umount", mnt]).ok();
    }
}

#[test]
fn a_lazy_umount_serves_until_the_last_mapping_ends() {
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
        assert_eq!(fs::read_dir(world.mountpoint()).unwrap().count(), 0, "the mount must be detached");
        let status = world.status();
        assert_eq!((&status["detached"], &status["templates"][0]["clones"]), (&true.into(), &1.into()));
        // Pages that were not accessed yet, before and after the server was killed.
        for number in (0..PAGES / 2).filter(|n| *n != 3) {
            assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
        }
        world.kill_server();
        for number in PAGES / 2..PAGES {
            assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
        }
        // Meanwhile the mountpoint is free for another mount.
        world.mount(&["--serve", serve]).ok();
        assert_eq!(world.json(&["status"])["mounts"].as_array().unwrap().len(), 2);
        world.stencil(&["umount", mnt]).ok();
        assert!(processes[0].is_alive(), "the supervisor must keep serving");
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

#[test]
fn a_forced_umount_names_affected_processes_and_ends() {
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
            // A mapping of a backing needs neither the server nor the mount.
            assert_eq!(clone.tell("read 0 100") as u8, bytes[100 * PAGE as usize]);
        } else {
            assert_eq!(clone.dies_of("read 0 100"), Some(libc::SIGBUS));
        }
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

#[test]
fn the_daemon_exits_after_umount_8_and_sigterm() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let processes = world.processes();
    crate::support::mount::run("umount", &[world.mountpoint()]);
    assert_nothing_is_left(&world, &processes);

    world.mount(&[]).ok();
    let processes = world.processes();
    // A service manager stops a service with this signal.
    processes[0].signal(Signal::TERM).unwrap();
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn sigterm_drains_the_mount_until_its_clones_exit() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    let mut clone = map(&world, &digest);
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the mount to be detached", || {
        (fs::read_dir(world.mountpoint()).unwrap().count() == 0).then_some(())
    });
    assert_reads(&mut clone);
    drop(clone);
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn a_second_sigterm_names_affected_clones_and_aborts() {
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
    let log = || fs::read_to_string(world.dir().join("terminal")).unwrap();
    wait_for("the mount to be detached", || log().contains(DRAINS).then_some(()));
    assert_eq!(
        clone.tell("read 0 4") as u8,
        image()[4 * PAGE as usize],
        "the first SIGTERM must not affect clones"
    );
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the supervisor to exit", || (!processes[0].is_alive()).then_some(()));
    child.wait().unwrap();
    assert_eq!(clone.dies_of(&format!("read 0 {}", PAGES - 1)), Some(libc::SIGBUS));
    assert!(log().contains(&format!("{}", clone.pid())), "{}", log());
    assert_nothing_is_left(&world, &processes);
}

/// A signal that arrives before the supervisor has handled the first one does not count as a second signal.
#[test]
fn signals_pending_together_count_as_one() {
    let _host = host::shared();
    for signals in [[Signal::TERM, Signal::HUP], [Signal::INT, Signal::TERM]] {
        let world = TestMount::new("decode");
        let digest = world.import_bytes(&image(), "web:1");
        let mut clone = map(&world, &digest);
        let processes = world.processes();
        drill::stop(processes[0]);
        for signal in signals.into_iter().chain([Signal::CONT]) {
            processes[0].signal(signal).unwrap();
        }
        wait_for("the mount to be detached", || world.log().contains(DRAINS).then_some(()));
        assert_reads(&mut clone);
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

/// When a terminal closes, the shell sends SIGHUP to its jobs, then the kernel sends SIGHUP to the foreground process
/// group; at the end of a session come SIGTERM and SIGHUP. Neither pair may abort the mount.
#[test]
fn sighup_of_a_closing_terminal_only_drains_the_mount() {
    let _host = host::shared();
    for first in [Signal::HUP, Signal::TERM] {
        let world = TestMount::new("decode");
        let digest = world.import_bytes(&image(), "web:1");
        let mut clone = map(&world, &digest);
        let processes = world.processes();
        processes[0].signal(first).unwrap();
        wait_for("the mount to be detached", || world.log().contains(DRAINS).then_some(()));
        processes[0].signal(Signal::HUP).unwrap();
        wait_for("the second signal", || {
            world.log().contains("ignoring the signal: the mount is already draining").then_some(())
        });
        assert_reads(&mut clone);
        drop(clone);
        assert_nothing_is_left(&world, &processes);
    }
}

/// `stencil restart` replaces the program of the supervisor by exec; the new program must know that a first signal
/// came.
#[test]
fn a_restart_remembers_the_first_sigterm() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&image(), "web:1");
    let mut clone = map(&world, &digest);
    clone.tell("read 0 3");
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the mount to be detached", || {
        (fs::read_dir(world.mountpoint()).unwrap().count() == 0).then_some(())
    });
    world.stencil(&["restart", "--all"]).ok();
    assert_eq!(world.processes()[0], processes[0], "exec must keep the process");
    assert_eq!(
        clone.tell("read 0 4") as u8,
        image()[4 * PAGE as usize],
        "the restart must not affect clones"
    );
    let processes = world.processes();
    processes[0].signal(Signal::TERM).unwrap();
    wait_for("the supervisor to exit", || (!processes[0].is_alive()).then_some(()));
    assert_eq!(clone.dies_of(&format!("read 0 {}", PAGES - 1)), Some(libc::SIGBUS));
    assert_nothing_is_left(&world, &processes);
}

#[test]
fn a_foreground_mount_logs_to_its_terminal_and_ends_on_sigint() {
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
    let log = fs::read_to_string(world.dir().join("terminal")).unwrap();
    assert!(log.contains("serving with") && log.contains("the mount has ended"), "{log}");
}
