//! Processes of another time namespace, in which every start time is another one, are the same processes.

use serde_json::Value;
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::mount::{Run, TestMount};
use crate::support::store::guest_like;

/// Runs `stencil` here or there.
type Stencil = fn(&TestMount, &[&str]) -> Run;

fn here(world: &TestMount, words: &[&str]) -> Run {
    world.stencil(words)
}

fn there(world: &TestMount, words: &[&str]) -> Run {
    world.in_another_time(words)
}

fn json(stencil: Stencil, world: &TestMount, words: &[&str]) -> Value {
    serde_json::from_str(&stencil(world, &[&["--json"], words].concat()).ok().out).unwrap()
}

fn clones_of(answer: &Value) -> Vec<&Value> {
    answer["clones"].as_array().unwrap().iter().collect()
}

/// What one side has started, the other side lists, measures, keeps from removal, and ends.
fn one_side_sees_the_other(started: Stencil, seen: Stencil) {
    let world = TestMount::unmounted();
    started(&world, &["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"]).ok();
    world.import_bytes(&guest_like(1, 4 << 20), "web:1");
    started(&world, &["clone", "web:1", "-n", "2", "--simulate", "write=100p"]).ok();
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 2000";
    started(&world, &["clone", "web:1", "--ready", "notify", "--", "sh", "-c", script]).ok();

    let status = json(seen, &world, &["status"]);
    assert_eq!(status["mounts"].as_array().unwrap().len(), 1, "{status:#}");
    assert_eq!(status["mounts"][0]["templates"][0]["clones"], 2, "{status:#}");
    let ps = json(seen, &world, &["ps"]);
    let states: Vec<&Value> = clones_of(&ps).iter().map(|clone| &clone["state"]).collect();
    assert_eq!(states, ["running"; 3], "{ps:#}");
    let density = json(seen, &world, &["density"]);
    let kinds: Vec<&Value> = clones_of(&density).iter().map(|clone| &clone["kind"]).collect();
    assert_eq!(kinds, ["simulated"; 2], "they are known by their records: {density:#}");
    assert!(density["totals"]["lazy_ratio"].is_number(), "{density:#}");
    seen(&world, &["rm", "web:1"]).exits(5);

    let process = |clone: &&Value| ProcessId::of(clone["pid"].as_u64().unwrap() as u32).unwrap().unwrap();
    let processes: Vec<ProcessId> = clones_of(&ps).iter().map(process).collect();
    let stopped = json(seen, &world, &["stop", "--all"]);
    let how: Vec<&Value> = stopped["stopped"].as_array().unwrap().iter().map(|clone| &clone["how"]).collect();
    assert_eq!(how, ["stopped"; 3], "{stopped:#}");
    assert!(processes.iter().all(|process| !process.is_alive()), "{processes:?}");
    seen(&world, &["rm", "web:1"]).ok();
    assert_eq!(world.processes().len(), 2, "supervisor and server");
    seen(&world, &["umount", world.mountpoint().to_str().unwrap()]).ok();
    assert!(world.processes().is_empty());
}

#[test]
fn another_time_namespace_sees_mounts_and_clones() {
    let _host = host::shared();
    one_side_sees_the_other(here, there);
}

#[test]
fn mounts_and_clones_of_another_time_namespace_are_seen() {
    let _host = host::shared();
    one_side_sees_the_other(there, here);
}
