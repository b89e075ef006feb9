//! Clones that `stencil stop` cannot end: of a launch that cannot be removed, of another PID namespace, and of a
//! running launcher. Other clones are not affected.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::clones::command::{nothing_is_left, processes_of};
use crate::support::daemon::passing::Immutable;
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount};
use crate::support::vm::guest::patiently;

const READY: &str = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 2000";

fn world() -> TestMount {
    let world = TestMount::new("auto");
    world.import_bytes(&vec![7; 1 << 20], "web");
    world
}

fn clone_with(script: &str) -> [&str; 8] {
    ["clone", "web", "--ready", "notify", "--", "sh", "-c", script]
}

/// Starts a launcher whose clones never become ready, and waits until the clones run.
fn launcher(world: &TestMount, count: usize) -> Child {
    let before = launching(world).len();
    let mut command = world.command();
    command.args(["clone", "web", "-n", &count.to_string(), "--ready", "notify", "--", "sleep", "1000"]);
    let launcher = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    patiently("clones", Duration::from_secs(20), || (launching(world).len() >= before + count).then_some(()));
    launcher
}

/// Returns the clones that are being launched and have a process.
fn launching(world: &TestMount) -> Vec<Value> {
    let ps = world.json(&["ps"]);
    let mut clones = ps["clones"].as_array().unwrap().clone();
    clones.retain(|clone| clone["state"] == "launching" && clone["pid"] != 0);
    clones
}

fn is_alive(clone: &Value) -> bool {
    let command = fs::read(format!("/proc/{}/cmdline", clone["pid"])).unwrap_or_default();
    command.starts_with(b"sleep\0")
}

#[test]
fn a_launch_that_cannot_be_removed_blocks_no_other_clone() {
    let _host = host::shared();
    let world = world();
    let mut launchers = [launcher(&world, 3), launcher(&world, 2)];
    let left = launching(&world).swap_remove(1);
    let immutable = Immutable::make(Path::new(left["dir"].as_str().unwrap()));
    for process in processes_of(&world).iter().filter(|p| p.contains("launch-watchdog")) {
        let pid = process.split_once(' ').unwrap().0.parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    for launcher in &mut launchers {
        launcher.kill().unwrap();
        launcher.wait().unwrap();
    }

    let launched = world.json(&clone_with(READY));
    let ps = world.json(&["ps"]);
    let listed: Vec<&Value> = ps["clones"].as_array().unwrap().iter().map(|clone| &clone["id"]).collect();
    let id = &launched["clones"][0]["id"];
    assert_eq!(listed.len(), 2, "only the clone that cannot be removed is left: {ps:#}");
    assert!(listed.contains(&id) && listed.contains(&&left["id"]), "{ps:#}");
    assert!(!processes_of(&world).iter().any(|process| process.contains("sleep 1000")));
    world.stencil(&["stop", id.as_str().unwrap()]).ok();
    let refused = world.stencil(&["stop", "--all"]).exits(1);
    assert!(refused.err.contains(left["dir"].as_str().unwrap()), "{refused:?}");
    drop(immutable);
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn stop_leaves_clones_of_another_pid_namespace_alone() {
    let _host = host::shared();
    let world = world();
    let in_other_namespace = |args: &[&str]| {
        let mut command = world.command_in("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(STENCIL).args(args);
        Run::of(args.join(" "), &command.output().unwrap())
    };
    let script = format!("echo {{port:web}} > {{dir}}/port; {READY}");
    let launched = world.json(&clone_with(&script));
    let clone = &launched["clones"][0];
    let id = clone["id"].as_str().unwrap();
    let held = launcher(&world, 2);
    let being_launched = launching(&world);

    let listed = in_other_namespace(&["--json", "ps"]).ok();
    let listed: Value = serde_json::from_str(&listed.out).unwrap();
    let states: Vec<&Value> = listed["clones"].as_array().unwrap().iter().map(|c| &c["state"]).collect();
    assert_eq!(states, ["foreign"; 3]);
    in_other_namespace(&["stop", id]).exits(75).says("another PID namespace");
    let stopped = in_other_namespace(&["--json", "stop", "--all"]).ok();
    assert!(stopped.err.contains(id), "the clones are not named: {stopped:?}");
    assert_eq!(serde_json::from_str::<Value>(&stopped.out).unwrap()["stopped"], Value::Array(vec![]));
    in_other_namespace(&["dirty", id]).exits(75);
    // A process in that namespace can launch clones.
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 3000 >/dev/null";
    in_other_namespace(&clone_with(script)).ok();

    assert!(is_alive(clone) && being_launched.iter().all(is_alive));
    let dir = Path::new(clone["dir"].as_str().unwrap());
    let port = fs::read_to_string(dir.join("port")).unwrap();
    let owner = fs::read_link(world.runtime_dir().join("ports").join(port.trim())).unwrap();
    assert_eq!(owner, Path::new(id), "the clone lost its port");
    assert_eq!(launching(&world), being_launched);
    kill_process(Pid::from_child(&held), Signal::INT).unwrap();
    held.wait_with_output().unwrap();
    world.stencil(&["stop", id]).ok();
    // The clone of a namespace that no longer exists.
    let ps = world.json(&["ps"]);
    let remainder = &ps["clones"][0];
    assert_eq!((ps["clones"].as_array().unwrap().len(), &remainder["state"]), (1, &Value::from("foreign")));
    let refused = world.stencil(&["stop", remainder["id"].as_str().unwrap()]).exits(75);
    assert!(refused.says("remove this directory").err.contains(remainder["dir"].as_str().unwrap()));
    fs::remove_dir_all(remainder["dir"].as_str().unwrap()).unwrap();
    nothing_is_left(&world);
}

#[test]
fn stop_refuses_a_clone_that_is_still_being_launched() {
    let _host = host::shared();
    let world = world();
    let launcher = launcher(&world, 1);
    let clone = launching(&world).remove(0);
    world.stencil(&["stop", clone["id"].as_str().unwrap()]).exits(75).says("is still being launched");
    assert!(is_alive(&clone));
    kill_process(Pid::from_child(&launcher), Signal::INT).unwrap();
    launcher.wait_with_output().unwrap();
    nothing_is_left(&world);
}
