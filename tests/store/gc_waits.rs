//! `stencil gc` and commands that write wait for each other, with a message and a timeout.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use stencilfs::sys::files::file_locks::flock_holders;

use crate::support::mount::wait_for;
use crate::support::store::{Fixture, Ran, random, stencil};

const BLOCK: usize = 64 << 10;

fn start(fixture: &Fixture, args: &[&str]) -> Child {
    let mut command = stencil(fixture.dir.path(), args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn interrupt(child: &Child) {
    let done = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(done.success());
}

fn wait_for_exit(mut child: Child) -> Ran {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait_with_output().unwrap().into()
}

/// Waits until the process has a handler for SIGINT.
fn wait_for_handler(child: &Child) {
    wait_for("a handler for SIGINT", || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        (u64::from_str_radix(caught.trim(), 16).unwrap() & 1 << (Signal::INT.as_raw() - 1) != 0).then_some(())
    });
}

/// SIGINT ends a gc that waits for an import, and the lock of that gc does not block later writers.
#[test]
fn a_waiting_gc_can_be_interrupted() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let hold = fixture.store().lock_content_shared().unwrap();
    let mut gc = start(&fixture, &["gc"]);
    wait_for_handler(&gc);
    thread::sleep(Duration::from_millis(200));
    assert!(gc.try_wait().unwrap().is_none(), "gc must wait");
    interrupt(&gc);
    assert_eq!(wait_for_exit(gc).code, 1);
    fixture.import("b", &random(2, BLOCK));
    drop(hold);
    fixture.run(&["gc"]).ok();
}

/// A writer that does not finish delays gc until its timeout, and other writers only while gc waits.
#[test]
fn a_waiting_gc_times_out_and_writers_continue() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let hold = fixture.store().lock_content_shared().unwrap();
    let source = fixture.file("source", &random(2, BLOCK));
    let gc = start(&fixture, &["gc"]);
    let gate = fixture.path("store/locks/gate");
    wait_for("gc to hold the gate lock", || {
        flock_holders(&File::open(&gate).ok()?).contains(&gc.id()).then_some(())
    });
    let mut import = start(&fixture, &["import", source.to_str().unwrap(), "b"]);
    thread::sleep(Duration::from_millis(500));
    assert!(import.try_wait().unwrap().is_none(), "import must wait for the waiting gc");
    let collector = gc.id();
    let refused = wait_for_exit(gc);
    assert_eq!(refused.code, 75, "{refused:?}");
    let holder = format!("(process {} (", std::process::id());
    let lines: Vec<&str> = refused.stderr.lines().filter(|line| line.contains(&holder)).collect();
    assert!(
        lines.len() == 2
            && lines[0].contains("waiting for")
            && lines[1].contains("timed out after 15 s waiting for"),
        "{refused:?}"
    );
    assert!(refused.stderr.contains("run the command again after that process has ended"), "{refused:?}");
    let imported = wait_for_exit(import).ok();
    assert!(imported.stderr.contains(&format!("(process {collector} (")), "{imported:?}");
    drop(hold);
    fixture.run(&["gc"]).ok();
    fixture.run(&["verify"]).ok();
}

#[test]
fn a_writer_that_waits_for_gc_can_be_interrupted() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let source = fixture.file("source", &random(2, BLOCK));
    let collector = File::open(fixture.path("store/locks/content")).unwrap();
    flock(&collector, FlockOperation::LockExclusive).unwrap();
    let mut import = start(&fixture, &["import", source.to_str().unwrap(), "b"]);
    wait_for_handler(&import);
    thread::sleep(Duration::from_millis(500));
    assert!(import.try_wait().unwrap().is_none(), "import must wait");
    interrupt(&import);
    let ended = wait_for_exit(import);
    drop(collector);
    assert!(ended.code == 1 && ended.stderr.contains("nothing was imported"), "{ended:?}");
    fixture.assert_clean();
}
