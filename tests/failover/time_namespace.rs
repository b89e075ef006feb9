//! Processes of another time namespace, where all start times differ, are recognized as the same processes.

use serde_json::Value;
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::mount::{Run, TestMount};
use crate::support::store::guest_like;

/// Runs `stencil` in the initial or in the other time namespace.
type Stencil = fn(&TestMount, &[&str]) -> Run;

fn here(world: &TestMount, words: &[&str]) -> Run {
    world.stencil(words)
}

fn there(world: &TestMount, words: &[&str]) -> Run {
    world.in_other_time_namespace(words)
}

fn json(stencil: Stencil, world: &TestMount, words: &[&str]) -> Value {
    serde_json::from_str(&stencil(world, &[&["--json"], words].concat()).ok().out).unwrap()
}

fn clones_of(answer: &Value) -> Vec<&Value> {
    answer["clones"].as_array().unwrap().iter().collect()
}

/// Mounts and clones started in one time namespace are listed, measured, protected from `rm`, and stopped in the other.
fn check_across_namespaces(start: Stencil, check: Stencil) {
    let world = TestMount::unmounted();
    start(&world, &["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"]).ok();
    world.import_bytes(&guest_like(1, 4 << 20), "web:1");
    start(&world, &["clone", "web:1", "-n", "2", "--simulate", "write=100p"]).ok();
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 2000";
    start(&world, &["clone", "web:1", "--ready", "notify", "--", "sh", "-c", script]).ok();

    let status = json(check, &world, &["status"]);
    assert_eq!(status["mounts"].as_array().unwrap().len(), 1, "{status:#}");
    assert_eq!(status["mounts"][0]["templates"][0]["clones"], 2, "{status:#}");
    let ps = json(check, &world, &["ps"]);
    let states: Vec<&Value> = clones_of(&ps).iter().map(|clone| &clone["state"]).collect();
    assert_eq!(states, ["running"; 3], "{ps:#}");
    let density = json(check, &world, &["density"]);
    let kinds: Vec<&Value> = clones_of(&density).iter().map(|clone| &clone["kind"]).collect();
    assert_eq!(kinds, ["simulated"; 2], "the kinds must come from the records: {density:#}");
    assert!(density["totals"]["lazy_ratio"].is_number(), "{density:#}");
    check(&world, &["rm", "web:1"]).exits(5);

    let process = |clone: &&Value| ProcessId::of(clone["pid"].as_u64().unwrap() as u32).unwrap().unwrap();
    let processes: Vec<ProcessId> = clones_of(&ps).iter().map(process).collect();
    let stopped = json(check, &world, &["stop", "--all"]);
    let how: Vec<&Value> = stopped["stopped"].as_array().unwrap().iter().map(|clone| &clone["how"]).collect();
    assert_eq!(how, ["stopped"; 3], "{stopped:#}");
    assert!(processes.iter().all(|process| !process.is_alive()), "{processes:?}");
    check(&world, &["rm", "web:1"]).ok();
    assert_eq!(world.processes().len(), 2, "supervisor and server");
    check(&world, &["umount", world.mountpoint().to_str().unwrap()]).ok();
    assert!(world.processes().is_empty());
}

#[test]
fn another_time_namespace_sees_the_hosts_mounts_and_clones() {
    let _host = host::shared();
    check_across_namespaces(here, there);
}

#[test]
fn the_host_sees_mounts_and_clones_of_a_time_namespace() {
    let _host = host::shared();
    check_across_namespaces(there, here);
}
