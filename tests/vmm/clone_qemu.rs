//! Real guests resume from one template: each continues where the template was captured, with its own generation ID and
//! random numbers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use stencilfs::clones::qmp::Qmp;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::{self, heartbeats, patiently};

#[test]
fn resumed_guests_get_distinct_ids_and_random_numbers() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&["--serve", "auto"]).ok();
    let before = world.stencil(&["export", "guest:v1/memory", "ram.before"]).ok();
    drop(before);

    let launched = world.json(&["clone", "guest:v1", "-n", "4"]);
    println!("4 guests were running after {:.2} s", launched["ready_seconds"].as_f64().unwrap());
    let clones = launched["clones"].as_array().unwrap();
    let dirs: Vec<&Path> = clones.iter().map(|c| Path::new(c["dir"].as_str().unwrap())).collect();

    let mut randoms = BTreeSet::new();
    let mut generations = BTreeSet::new();
    for dir in &dirs {
        let first = patiently("heartbeats", Duration::from_secs(60), || {
            let beats = heartbeats(&dir.join("serial.log"));
            (beats.len() >= 3).then_some(beats)
        });
        assert!(first[0].count >= 4, "the guest booted instead of resuming: {first:?}");
        // The first random number may have been read before the capture and printed after it.
        randoms.extend(first[1..3].iter().map(|b| b.random.clone()));
        let mut qmp = Qmp::connect(&dir.join("qmp.sock")).unwrap();
        assert_eq!(qmp.status().unwrap(), "running");
        let id = qmp.run("query-vm-generation-id", json!({})).unwrap();
        generations.insert(id["guid"].as_str().unwrap().to_owned());
    }
    assert_eq!(generations.len(), 4, "generation IDs are not distinct");
    assert_eq!(randoms.len(), 8, "random numbers are not distinct");

    // The guests share the template: each has copied a small part.
    let density = world.json(&["density"]);
    for clone in density["clones"].as_array().unwrap() {
        assert_eq!(clone["kind"], "qemu");
        let private = clone["private_bytes"].as_u64().unwrap();
        assert!((1..64 << 20).contains(&private), "{clone}");
    }

    // A killed guest is listed as ended; the others continue.
    let pid = clones[0]["pid"].as_i64().unwrap() as i32;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    patiently("an ended clone", Duration::from_secs(5), || {
        let ps = world.json(&["ps"]);
        let states: Vec<_> = ps["clones"].as_array().unwrap().iter().map(|c| c["state"].clone()).collect();
        (states.iter().filter(|s| **s == "ended").count() == 1).then_some(())
    });
    let beats = heartbeats(&dirs[1].join("serial.log")).len();
    patiently("heartbeats", Duration::from_secs(60), || {
        (heartbeats(&dirs[1].join("serial.log")).len() > beats).then_some(())
    });

    let stopped = world.json(&["stop", "--all"]);
    let how: BTreeSet<_> =
        stopped["stopped"].as_array().unwrap().iter().map(|s| s["how"].to_string()).collect();
    assert_eq!(how, BTreeSet::from(["\"gone\"".to_owned(), "\"stopped\"".to_owned()]), "{stopped}");
    assert_eq!(fs::read_dir(world.runtime_dir().join("clones")).unwrap().count(), 0);

    let digest = launched["digest"].as_str().unwrap();
    let served = fs::read(world.file(digest, "memory")).unwrap();
    assert!(served == fs::read(world.dir().join("ram.before")).unwrap(), "the template was modified");
}

#[test]
fn a_guest_that_cannot_resume_ends_the_launch() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    guest::give(&world);
    // The same memory and recipe, with an invalid device state.
    let memory = world.dir().join("memory");
    world.stencil(&["export", "guest:v1/memory", memory.to_str().unwrap()]).ok();
    let state = world.dir().join("state");
    fs::write(&state, "not a device state").unwrap();
    let store = stencilfs::store::Store::open(&world.store_dir()).unwrap();
    let good = store.resolve(&"guest:v1".parse().unwrap()).unwrap();
    let recipe = store.template(&good).unwrap().policy().recipe.clone();
    for name in ["kernel", "initrd"] {
        let out = world.dir().join(name);
        world.stencil(&["export", &format!("guest:v1/{name}"), out.to_str().unwrap()]).ok();
    }
    let file = |name: &str| format!("{name}={},kind=blob", world.dir().join(name).display());
    let import = ["import", memory.to_str().unwrap(), "guest:bad", "--state", state.to_str().unwrap()];
    world.stencil(&[&import[..], &["--file", &file("kernel"), "--file", &file("initrd")]].concat()).ok();
    let bad = store.resolve(&"guest:bad".parse().unwrap()).unwrap();
    store.set_policy(&bad, |policy| policy.recipe = recipe).unwrap();
    world.mount(&[]).ok();

    let run = world.stencil(&["clone", "guest:bad", "-n", "3"]).exits(1);
    assert!(run.err.contains("did not become ready"), "{}", run.err);
    assert_eq!(fs::read_dir(world.runtime_dir().join("clones")).unwrap().count(), 0);
    world.stencil(&["clone", "guest:v1", "-n", "1"]).ok();
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn ps_lists_a_guest_that_stencil_did_not_launch() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&vec![3; 16 << 20], "web");
    let digest = world.json(&["inspect", "web"])["digest"].as_str().unwrap().to_owned();
    let object = format!(
        "memory-backend-file,id=m,size=16M,mem-path={},share=off,readonly=on,rom=off",
        world.file(&digest, "memory").display()
    );
    let words =
        ["-M", "q35,memory-backend=m", "-m", "16M", "-nodefaults", "-display", "none", "-object", &object];
    let mut other = Command::new("qemu-system-x86_64").args(words).spawn().unwrap();
    let listed = patiently("a foreign clone", Duration::from_secs(20), || {
        let ps = world.json(&["ps"]);
        let clones = ps["clones"].as_array().unwrap();
        clones.first().cloned()
    });
    assert_eq!(listed["kind"], "other");
    assert_eq!(listed["pid"], other.id());
    assert_eq!(listed["digest"], digest.as_str());
    // `stencil stop` does not end a foreign clone.
    world.stencil(&["stop", "--all"]).ok();
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
}
