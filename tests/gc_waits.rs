//! A collection and commands that write wait for one another: not for ever, and not without a word.

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

fn end(mut child: Child) -> Ran {
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait_with_output().unwrap().into()
}

/// Waits until it has a handler for SIGINT.
fn hears_interrupts(child: &Child) {
    wait_for("its handler", || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        (u64::from_str_radix(caught.trim(), 16).unwrap() & 1 << (Signal::INT.as_raw() - 1) != 0).then_some(())
    });
}

/// A collector that waits for an importer hears an interrupt, and holds nobody up afterwards.
#[test]
fn a_collector_that_waits_can_be_interrupted() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let hold = fixture.store().hold_content().unwrap();
    let mut gc = start(&fixture, &["gc"]);
    hears_interrupts(&gc);
    thread::sleep(Duration::from_millis(200));
    assert!(gc.try_wait().unwrap().is_none(), "it waits");
    interrupt(&gc);
    assert_eq!(end(gc).code, 1);
    fixture.import("b", &random(2, BLOCK));
    drop(hold);
    fixture.run(&["gc"]).ok();
}

/// One who writes and does not come to an end holds up a collection for a while, and nobody else.
#[test]
fn a_collector_gives_up_and_writers_go_on() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let hold = fixture.store().hold_content().unwrap();
    let source = fixture.file("source", &random(2, BLOCK));
    let gc = start(&fixture, &["gc"]);
    let gate = fixture.path("store/locks/gate");
    wait_for("gc before the others", || {
        flock_holders(&File::open(&gate).ok()?).contains(&gc.id()).then_some(())
    });
    let mut import = start(&fixture, &["import", source.to_str().unwrap(), "b"]);
    thread::sleep(Duration::from_millis(500));
    assert!(import.try_wait().unwrap().is_none(), "it waits for who waits");
    let collector = gc.id();
    let refused = end(gc);
    assert_eq!(refused.code, 75, "{refused:?}");
    let holder = format!("(process {} (", std::process::id());
    let said: Vec<&str> = refused.stderr.lines().filter(|line| line.contains(&holder)).collect();
    assert!(
        said.len() == 2
            && said[0].contains("waiting for")
            && said[1].contains("timed out after 15 s waiting for"),
        "{refused:?}"
    );
    assert!(refused.stderr.contains("run the command again after that process has ended"), "{refused:?}");
    let imported = end(import).ok();
    assert!(imported.stderr.contains(&format!("(process {collector} (")), "{imported:?}");
    drop(hold);
    fixture.run(&["gc"]).ok();
    fixture.run(&["verify"]).ok();
}

#[test]
fn a_writer_that_waits_for_a_collector_can_be_interrupted() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, BLOCK));
    let source = fixture.file("source", &random(2, BLOCK));
    let collector = File::open(fixture.path("store/locks/content")).unwrap();
    flock(&collector, FlockOperation::LockExclusive).unwrap();
    let mut import = start(&fixture, &["import", source.to_str().unwrap(), "b"]);
    hears_interrupts(&import);
    thread::sleep(Duration::from_millis(500));
    assert!(import.try_wait().unwrap().is_none(), "it waits");
    interrupt(&import);
    let ended = end(import);
    drop(collector);
    assert!(ended.code == 1 && ended.stderr.contains("nothing was imported"), "{ended:?}");
    fixture.assert_clean();
}
