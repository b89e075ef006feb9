//! Killed, interrupted and simultaneous commands: afterwards the store is as if each had run completely or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::host;
use crate::support::store::{Fixture, guest_like, random, read_all, stencil};

fn signal(child: &Child, signal: Signal) {
    let _ = kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal);
}

/// Panics unless every tag names a complete template with the bytes of its source, `verify` finds no damage, and one
/// more write command removes all leftovers.
fn assert_sound(fixture: &Fixture, sources: &[(&str, &[u8])]) {
    let store = fixture.store();
    for tag in store.tags().unwrap() {
        let bytes = read_all(&store, &tag.digest, 0).unwrap();
        let expected = sources.iter().find(|(name, _)| *name == tag.name).unwrap().1;
        assert!(bytes == expected, "{}: {} bytes", tag.name, bytes.len());
    }
    for digest in store.digests().unwrap() {
        store.template(&digest).unwrap();
    }
    fixture.run(&["verify"]).ok();
    // The next writer removes the leftovers of a killed writer.
    fixture.import("sweeper", &random(99, 4096));
    fixture.run(&["rm", "sweeper"]).ok();
    fixture.assert_clean();
}

/// Sends SIGKILL at many moments between start and end of an import.
#[test]
fn a_killed_import_leaves_a_sound_store() {
    let fixture = Fixture::new();
    let base = guest_like(5, 2 << 20);
    fixture.import("base", &base);
    let bytes = guest_like(6, 48 << 20);
    let source = fixture.file("source", &bytes);
    let source = source.to_str().unwrap();
    let start = Instant::now();
    fixture.run(&["import", source, "whole"]).ok();
    let mut duration = start.elapsed();
    fixture.run(&["rm", "whole"]).ok();
    // `rm` keeps the packs: they are deleted before each attempt, so that each import has to write everything.
    let keep: BTreeSet<std::path::PathBuf> = fixture
        .store()
        .template(&fixture.store().tags().unwrap()[0].digest)
        .unwrap()
        .packs()
        .iter()
        .map(|pack| pack.as_ref().to_owned())
        .collect();
    let mut killed = 0;
    let attempts: u32 = host::rounds(20, 100);
    for attempt in 0..attempts {
        for pack in fixture.files("packs").into_iter().filter(|p| !keep.contains(p)) {
            fs::remove_file(pack).unwrap();
        }
        let mut child =
            stencil(fixture.dir.path(), &["import", source, "victim"]).stdout(Stdio::null()).spawn().unwrap();
        // More kills towards the end, where the commit happens.
        let share = f64::from(attempt + 1) / f64::from(attempts);
        thread::sleep(duration.mul_f64(share.sqrt()));
        signal(&child, Signal::KILL);
        match child.wait().unwrap().code() {
            None => killed += 1,
            // The import has become faster: the next kill comes earlier.
            Some(_) => duration = duration.mul_f64(0.9),
        }
        assert_sound(&fixture, &[("base", &base), ("victim", &bytes)]);
        if fixture.run(&["inspect", "victim"]).code == 0 {
            fixture.run(&["rm", "victim"]).ok();
        }
        for digest in fixture.store().digests().unwrap() {
            if fixture.store().tags().unwrap().iter().all(|t| t.digest != digest) {
                fixture.run(&["rm", &digest.to_string()]).ok();
            }
        }
    }
    assert!(killed > attempts / 3, "only {killed} of {attempts} imports were killed before they finished");
}

#[test]
fn an_interrupted_import_cleans_up_at_once() {
    let fixture = Fixture::new();
    for (number, name) in [Signal::INT, Signal::TERM].into_iter().zip(["INT", "TERM"]) {
        // A pipe that stays open: the import is certainly still running.
        let mut child = stencil(fixture.dir.path(), &["import", "-", "victim"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(&random(1, 5 << 20)).unwrap();
        thread::sleep(Duration::from_millis(150));
        signal(&child, number);
        let stdin = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(stdin);
        assert_eq!(output.status.code(), Some(1), "{name}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("interrupted") && text.lines().count() == 2, "{name}: {text}");
        fixture.assert_clean();
        assert_eq!(
            fixture.files("packs").len() + fixture.files("images").len() + fixture.files("tags").len(),
            0
        );
    }
}

#[test]
fn simultaneous_imports_share_a_name_or_content() {
    let fixture = Fixture::new();
    let (same, other) = (guest_like(1, 8 << 20), guest_like(2, 8 << 20));
    let (a, b) = (fixture.file("a", &same), fixture.file("b", &other));
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    for round in 0..4 {
        // In the first round the imports also race to create the store.
        let children: Vec<Child> = [("same", a), ("same", a), ("contested", a), ("contested", b)]
            .iter()
            .map(|(name, source)| {
                let args = ["import", source, name];
                stencil(fixture.dir.path(), &args).stdout(Stdio::null()).spawn().unwrap()
            })
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success(), "round {round}");
        }
        let store = fixture.store();
        let tags = store.tags().unwrap();
        assert_eq!(tags.len(), 2, "{tags:?}");
        assert!(read_all(&store, &tags[1].digest, 0).unwrap() == same);
        let contested = read_all(&store, &tags[0].digest, 0).unwrap();
        assert!(contested == same || contested == other);
        assert_eq!(store.digests().unwrap().len(), 2);
        fixture.run(&["verify"]).ok();
        fixture.assert_clean();
    }
}

/// Panics unless an import succeeded; another command may also fail with exit code 4 because its object does not exist
/// at the moment.
fn assert_ran(command: &[&str], output: &std::process::Output) {
    let code = output.status.code();
    let expected = code == Some(0) || (code == Some(4) && command[0] != "import");
    assert!(expected, "{command:?}: {code:?} {}", String::from_utf8_lossy(&output.stderr));
}

/// Commands that change names run simultaneously, many times: each succeeds or fails with an error, and no tag ever
/// names a missing template.
#[test]
fn simultaneous_import_tag_chmod_and_rm_keep_tags_valid() {
    let fixture = Fixture::new();
    let bytes = guest_like(1, 1 << 20);
    let source = fixture.file("a", &bytes);
    let source = source.to_str().unwrap().to_owned();
    let dir = fixture.dir.path();
    fixture.run(&["import", &source, "base"]).ok();
    let commands: [&[&str]; 5] = [
        &["import", &source, "x:1"],
        &["tag", "x:1", "y"],
        &["rm", "x:1"],
        &["rm", "y"],
        &["chmod", "0440", "x:1"],
    ];
    thread::scope(|scope| {
        for command in commands {
            scope.spawn(move || {
                for _ in 0..15 {
                    let output = stencil(dir, command).output().unwrap();
                    assert_ran(command, &output);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..30 {
                let store = fixture.store();
                for tag in store.tags().unwrap() {
                    assert!(store.has(&tag.digest), "{tag:?}");
                }
            }
        });
    });
    // "base" also names the template, so that no `rm` removes it.
    assert!(read_all(&fixture.store(), &fixture.store().tags().unwrap()[0].digest, 0).unwrap() == bytes);
    fixture.run(&["verify"]).ok();
    fixture.assert_clean();
}

/// No command changes names while another process holds the lock for reading.
#[test]
fn commands_that_change_names_wait_for_the_lock() {
    let fixture = Fixture::new();
    let source = fixture.file("a", &guest_like(1, 1 << 20));
    let source = source.to_str().unwrap();
    for name in ["base", "gone"] {
        fixture.run(&["import", source, name]).ok();
    }
    let lock = fs::File::open(fixture.path("store/locks/names")).unwrap();
    flock(&lock, FlockOperation::LockShared).unwrap();
    let commands: [&[&str]; 5] = [
        &["import", source, "new"],
        &["tag", "base", "other"],
        &["rm", "gone"],
        &["chmod", "0440", "base"],
        &["chown", "1", "base"],
    ];
    let start = |args: &&[&str]| stencil(fixture.dir.path(), args).stdout(Stdio::null()).spawn().unwrap();
    let mut children: Vec<Child> = commands.iter().map(start).collect();
    thread::sleep(Duration::from_millis(700));
    for (child, command) in children.iter_mut().zip(commands) {
        assert!(child.try_wait().unwrap().is_none(), "{command:?} did not wait");
    }
    flock(&lock, FlockOperation::Unlock).unwrap();
    for (child, command) in children.iter_mut().zip(commands) {
        assert!(child.wait().unwrap().success(), "{command:?}");
    }
    let tags: Vec<String> = fixture.store().tags().unwrap().iter().map(|t| t.name.clone()).collect();
    assert_eq!(tags, ["base", "new", "other"]);
}

/// The template itself is created and removed in each round.
#[test]
fn simultaneous_import_and_rm_of_the_last_tag_are_atomic() {
    let fixture = Fixture::new();
    let bytes = guest_like(1, 1 << 20);
    let source = fixture.file("a", &bytes);
    let source = source.to_str().unwrap().to_owned();
    let dir = fixture.dir.path();
    let commands: [&[&str]; 2] = [&["import", &source, "x"], &["rm", "x"]];
    thread::scope(|scope| {
        for command in commands {
            scope.spawn(move || {
                for _ in 0..40 {
                    let output = stencil(dir, command).output().unwrap();
                    assert_ran(command, &output);
                }
            });
        }
    });
    assert_sound(&fixture, &[("x", &bytes)]);
    let store = fixture.store();
    assert_eq!(store.tags().unwrap().len(), store.digests().unwrap().len());
}
