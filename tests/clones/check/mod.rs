//! `stencil check`: clean clones are proven, and each cause that loses sharing fails exactly its property.

pub mod vmms;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::Value;
use stencilfs::sys::process::ProcessId;

use super::dirty_exact::{PAGE, SIZE, map, world, world_with};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// The properties of a process that maps a template, in the order of the report.
const PROPERTIES: [&str; 9] = [
    "process",
    "template",
    "mount",
    "serving",
    "private",
    "huge-entries",
    "not-locked",
    "not-copied",
    "bytes",
];

fn rows(world: &TestMount, words: &[&str], code: i32) -> Vec<Value> {
    let run = world.stencil(&[&["--json", "check"], words].concat()).exits(code);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    report["clones"].as_array().unwrap().clone()
}

/// Checks one clone, which must be proven.
pub fn is_proven(world: &TestMount, words: &[&str]) {
    for row in rows(world, words, 0) {
        let checks = row["checks"].as_array().unwrap();
        let names: Vec<&str> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
        assert_eq!((names, &row["ok"]), (PROPERTIES.to_vec(), &true.into()), "{row:#}");
        let is_clean = |check: &Value| check["ok"] == true && check["remedy"].is_null() && check["why"] != "";
        assert!(checks.iter().all(is_clean), "{row:#}");
    }
}

/// Checks one clone, which must not be proven, and returns the properties that failed.
pub fn failed(world: &TestMount, words: &[&str]) -> BTreeSet<String> {
    let rows = rows(world, words, 6);
    let [row] = &rows[..] else { panic!("{rows:#?}") };
    assert_eq!(row["ok"], false);
    let text = world.stencil(&[&["check"], words].concat()).exits(6).out;
    let failed = row["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false);
    let name = |check: &Value| {
        let [name, why, remedy] = ["name", "why", "remedy"].map(|field| check[field].as_str().unwrap());
        assert!(text.contains(&format!("  {name}: {why}\n    hint: {remedy}\n")), "{text}\n{row:#}");
        name.to_owned()
    };
    failed.map(name).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// An actor that has mapped the file by this command.
fn mapped(command: &str, file: &Path) -> (Actor, String) {
    let mut actor = Actor::start();
    actor.tell(&format!("{command} 0 {} 0 {SIZE}", file.display()));
    let pid = actor.pid().to_string();
    (actor, pid)
}

#[test]
fn clean_clones_are_proven_and_a_lost_expectation_is_named() {
    let _host = host::shared();
    for (serve, other) in [("decode", "passthrough"), ("passthrough", "decode"), ("kernel", "passthrough")] {
        let (world, digest) = world(serve);
        world.import_bytes(&vec![9; 4 << 20], "other:1");
        world.wait_until_verified(&digest);
        assert!(world.stencil(&["check", "--all"]).ok().out.contains("no clones"));
        let launched = world.json(&["clone", "web:1", "-n", "2", "--simulate", "read=10%,write=1%"]);
        let id = launched["clones"][0]["id"].as_str().unwrap();
        let mut actor = Actor::start();
        map(&mut actor, &world.file(&digest, "memory"));
        actor.write_pages(0, 0..50);
        actor.read_pages(0, 100..200);
        let pid = actor.pid().to_string();
        is_proven(&world, &["--all"]);
        assert_eq!(rows(&world, &["--all"], 0).len(), 3);
        is_proven(&world, &[id, &pid, "--template", "web:1", "--serving", serve]);
        let bytes = rows(&world, &[id], 0)[0]["checks"][8]["why"].as_str().unwrap().to_owned();
        assert!(bytes.split(' ').next().unwrap().parse::<u64>().unwrap() > 200, "{bytes}");
        assert!(world.stencil(&["check", &pid]).ok().out.ends_with(": ok\n"));

        assert_eq!(failed(&world, &[id, "--serving", other]), set(&["serving"]), "{serve}");
        assert_eq!(failed(&world, &[id, "--template", "other:1"]), set(&["template"]), "{serve}");
        assert_eq!(failed(&world, &[&pid, "--template", "other:1"]), set(&["template"]), "{serve}");
        world.stencil(&["check", "no-clone"]).exits(4).says("no clone has the id");
        world.stencil(&["check", id, "--serving", "fast"]).exits(2);
    }
}

#[test]
fn each_cause_that_loses_sharing_fails_its_property() {
    let _host = host::shared();
    let (world, digest) = world("passthrough");
    let memory = world.file(&digest, "memory");
    let (_actor, pid) = mapped("shared", &memory);
    assert_eq!(failed(&world, &[&pid]), set(&["private"]));
    let (_actor, pid) = mapped("shifted", &memory);
    assert_eq!(failed(&world, &[&pid]), set(&["huge-entries"]));
    let (mut actor, pid) = (Actor::start(), |actor: &Actor| actor.pid().to_string());
    map(&mut actor, &memory);
    is_proven(&world, &[&pid(&actor)]);
    actor.tell(&format!("nohuge 0 {SIZE}"));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["huge-entries"]));

    // Another file with the same bytes, and a part of the memory.
    let copy = world.dir().join("copy");
    fs::copy(&memory, &copy).unwrap();
    let mut actor = Actor::start();
    map(&mut actor, &copy);
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["template"]));
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {} rw", memory.display(), SIZE / 2));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["template"]));
    actor.tell(&format!("map 1 {} {} {} rw", memory.display(), SIZE / 2, SIZE / 2));
    is_proven(&world, &[&pid(&actor)]);

    // Other memory between the first and the last page: a mapping of the copy, and anonymous memory with its bytes.
    let inner = SIZE / PAGE - 2;
    let mut actor = Actor::start();
    map(&mut actor, &memory);
    actor.tell(&format!("over 0 1 {inner} {}", copy.display()));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["template"]));
    actor.tell(&format!("replace 0 1 {inner}"));
    is_proven(&world, &[&pid(&actor)]);
    actor.tell(&format!("load 0 1 {inner} {}", copy.display()));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-copied"]));

    // Most pages of the first half are copied without a change. The second half is zero memory.
    let half = SIZE / PAGE / 2;
    let mut actor = Actor::start();
    map(&mut actor, &memory);
    actor.tell(&format!("replace 0 {half} {}", half - 1));
    for page in 0..half / 10 * 9 {
        actor.tell(&format!("write 0 {page} 7"));
    }
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-copied"]));

    // A balloon splits a misaligned mapping into small parts.
    let (mut actor, misaligned) = mapped("shifted", &memory);
    for part in 0..SIZE / PAGE / 256 {
        actor.tell(&format!("replace 0 {} 1", part * 256 + 128));
    }
    assert_eq!(failed(&world, &[&misaligned]), set(&["huge-entries"]));

    // What prealloc does: a write to each page that changes no byte. Then a few pages are discarded.
    let mut actor = Actor::start();
    map(&mut actor, &memory);
    for page in 0..SIZE / PAGE {
        let write =
            if page < SIZE / PAGE / 2 { format!("write 0 {page} 7") } else { format!("fill 0 {page} 0") };
        actor.tell(&write);
    }
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-copied"]));
    actor.tell("discard 0 100 20");
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-copied"]));
    let mut actor = Actor::start();
    map(&mut actor, &memory);
    actor.tell(&format!("lock 0 {PAGE}"));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-locked"]));
    actor.tell(&format!("lock 0 {SIZE}"));
    assert_eq!(failed(&world, &[&pid(&actor)]), set(&["not-locked", "not-copied"]));

    let dead = pid(&actor);
    actor.kill();
    assert_eq!(failed(&world, &[&dead]), set(&["process"]));
}

#[test]
fn every_ram_file_must_be_mapped() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let source = world.dir().join("source");
    fs::write(&source, vec![7; 4 << 20]).unwrap();
    let dimm = format!("dimm={}", source.display());
    let imported = world.json(&["import", source.to_str().unwrap(), "two:1", "--file", &dimm]);
    let digest = imported["digest"].as_str().unwrap();
    world.wait_until_verified(digest);
    let mut actor = Actor::start();
    let pid = actor.pid().to_string();
    for (id, file) in ["memory", "dimm"].into_iter().enumerate() {
        actor.tell(&format!("map {id} {} 0 {} rw", world.file(digest, file).display(), 4 << 20));
        match file {
            "dimm" => is_proven(&world, &[&pid]),
            _ => assert_eq!(failed(&world, &[&pid]), set(&["template"])),
        }
    }
}

#[test]
fn no_mount_is_left_out_silently() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let (_actor, _) = mapped("shared", &world.file(&digest, "memory"));
    let elsewhere = world.dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mut other = world.command();
    let other = other.env("STENCIL_RUNTIME_DIR", &elsewhere).args(["check", "--all"]).output().unwrap();
    let warning = String::from_utf8(other.stderr).unwrap();
    assert!(warning.contains("the mount has no readable record in this runtime directory"), "{warning}");
    let record = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap();
    let record = record.path().join("mount.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    let run = world.stencil(&["check", "--all"]).exits(75);
    assert!(run.err.contains("cannot read the record of a mount"), "{run:?}");
    fs::write(&record, &text).unwrap();
}

#[test]
fn a_mapping_from_before_the_promotion_is_not_served_as_its_mount_serves_now() {
    let _host = host::shared();
    let (world, digest) = world_with(&["--serve", "auto", "--hydrate-timeout", "0.001"]);
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    let pid = actor.pid().to_string();
    wait_for("the promotion", || {
        (world.status()["templates"][0]["files"][0]["hydrated"] == true).then_some(())
    });
    assert_eq!(failed(&world, &[&pid]), set(&["serving"]));
    is_proven(&world, &[&pid, "--serving", "decode"]);
}

#[test]
fn a_mount_without_processes_proves_nothing() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    actor.read_pages(0, 0..10);
    let pid = actor.pid().to_string();
    is_proven(&world, &[&pid]);
    let kill = |pid: u64| {
        let process = ProcessId::of(pid as u32).unwrap().unwrap();
        process.signal(Signal::KILL).unwrap();
        wait_for("the exit of a killed process", || (!process.is_alive()).then_some(()));
    };
    let status = world.status();
    kill(status["supervisor_pid"].as_u64().unwrap());
    assert_eq!(failed(&world, &[&pid]), set(&["mount", "serving"]));
    kill(status["server_pid"].as_u64().unwrap());
    for words in [&pid[..], "--all"] {
        assert_eq!(failed(&world, &[words]), set(&["template"]));
        let text = world.stencil(&["check", words]).exits(6).out;
        assert!(text.contains("the mount is dead") && text.contains("stencil umount"), "{text}");
    }
    unmount(world.mountpoint(), UnmountFlags::DETACH).unwrap();
    for words in [&pid[..], "--all"] {
        assert_eq!(failed(&world, &[words]), set(&["template"]));
        let text = world.stencil(&["check", words]).exits(6).out;
        assert!(text.contains("the mount is dead") && text.contains("the detached mount"), "{text}");
    }
}
