//! A mount whose supervisor and server are dead while its clones live: the commands that count clones name the mount,
//! count its clones from their mappings, and wait for no reply.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{PidfdGetfdFlags, Signal, pidfd_getfd};
use serde_json::Value;
use stencilfs::sys::files::mount;
use stencilfs::sys::process::{ProcessId, pidfd};

use crate::clones::dirty_exact::{PAGE, map, world};
use crate::support::actor::Actor;
use crate::support::exporter::Exporter;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// Returns the server's descriptor of the FUSE connection, which then stays open without anybody to answer.
fn connection(server: ProcessId) -> OwnedFd {
    let folder = format!("/proc/{}/fd", server.pid);
    let is_fuse = |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to == *"/dev/fuse");
    let entry = fs::read_dir(folder).unwrap().map(Result::unwrap).find(is_fuse).unwrap();
    let number = entry.file_name().to_str().unwrap().parse().unwrap();
    pidfd_getfd(pidfd(server.pid).unwrap().unwrap(), number, PidfdGetfdFlags::empty()).unwrap()
}

fn kill_both(world: &TestMount) {
    let processes = world.processes();
    assert_eq!(processes.len(), 2);
    processes.iter().for_each(|process| assert!(process.signal(Signal::KILL).unwrap()));
    wait_for("the end of both", || processes.iter().all(|process| !process.is_alive()).then_some(()));
}

/// Asserts that the commands know a dead mount with two simulated clones and the actor, and `others` clones of another
/// mount.
#[track_caller]
fn assert_known(world: &TestMount, others: u64) {
    let place = world.mountpoint().to_str().unwrap();
    let clones = "3 clones still map its templates";
    let dead = |report: &Value| {
        let dead = report["dead_mounts"].as_array().unwrap_or_else(|| panic!("no dead mount in {report:#}"));
        assert_eq!(
            (dead.len(), &dead[0]["mountpoint"], dead[0]["clones"].as_u64()),
            (1, &Value::from(place), Some(3))
        );
        assert!(dead[0]["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()));
    };
    let status = world.stencil(&["status"]).exits(6).out;
    assert!(status.contains("the mount is dead") && status.contains(clones), "{status}");
    let silent = world.status_of_all()["silent"][0].clone();
    assert_eq!((&silent["state"], silent["clones"].as_u64()), (&Value::from("dead"), Some(3)), "{silent:#}");

    let ps = world.json(&["ps"]);
    dead(&ps);
    assert_eq!(ps["clones"].as_array().unwrap().len() as u64, 3 + others);
    let warning = world.stencil(&["ps"]).ok().err;
    assert!(warning.contains(clones) && warning.contains(place), "{warning}");

    let density = world.json(&["density", "--audit"]);
    dead(&density);
    assert_eq!(density["totals"]["clones"], 3 + others);
    assert_eq!(density["totals"]["private_bytes"], (3 + others) * 30 * PAGE);
    let frames = &density["audit"]["frames"];
    assert_eq!(frames["verdict"], "ok", "{frames:#}");
    assert_eq!(frames["template_bytes"], frames["template_accounted"], "{frames:#}");
    // The actor has read 200 pages and written 30 others.
    assert!(frames["template_bytes"].as_u64().unwrap() >= 200 * PAGE, "{frames:#}");

    let doctor = world.command().args(["--json", "doctor"]).output().unwrap();
    let doctor: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let checks = doctor["checks"].as_array().unwrap();
    let found = |check: &Value| check["name"] == "mount" && check["found"].as_str().unwrap().contains(clones);
    assert!(checks.iter().any(found), "{checks:#?}");

    let exporter = Exporter::start(world, &["--max-age", "0"]);
    wait_for("the clones in the metrics", || {
        (exporter.samples().get("stencil_clones").copied() == Some((3 + others) as f64)).then_some(())
    });
}

fn clones_of_a_dead_mount_are_counted(serve: &str, stuck: bool) {
    let _host = host::shared();
    let (world, digest) = world(serve);
    world.stencil(&["clone", "web:1", "-n", "2", "--simulate", "read=100p,write=30p"]).ok();
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    actor.read_pages(0, 300..500);
    actor.write_pages(0, 0..30);
    let held = stuck.then(|| connection(world.recorded_server().unwrap()));
    kill_both(&world);
    assert_known(&world, 0);
    world.stencil(&["rm", "web:1"]).exits(75).says("the mount is dead");

    // Without a place in the mount table.
    mount::unmount(world.mountpoint(), true).unwrap();
    assert_known(&world, 0);
    world.stencil(&["rm", "web:1"]).exits(75).says("the mount is dead");
    let place = world.mountpoint().to_str().unwrap();
    world.stencil(&["umount", place]).exits(5).says("detached already");
    // The mount ends with its last process.
    world.stencil(&["umount", "--force", place]).ok();
    let status = world.stencil(&["status"]).exits(6).out;
    assert!(status.contains("the mount is dead"), "{status}");
    // Beside another mount at the same place.
    world.mount(&["--serve", serve]).ok();
    world.stencil(&["clone", "web:1", "-n", "1", "--simulate", "read=100p,write=30p"]).ok();
    assert_known(&world, 1);
    drop(held);
    drop(actor);
    world.stencil(&["stop", "--all"]).ok();
    wait_for("the end of the dead mount", || (world.stencil(&["status"]).code == 0).then_some(()));
    assert!(world.json(&["ps"])["dead_mounts"].is_null());
}

#[test]
fn clones_of_a_dead_mount_by_decode_are_counted() {
    clones_of_a_dead_mount_are_counted("decode", false);
}

#[test]
fn clones_of_a_dead_mount_by_passthrough_are_counted() {
    clones_of_a_dead_mount_are_counted("passthrough", false);
}

#[test]
fn clones_of_a_dead_mount_whose_connection_is_stuck_are_counted() {
    clones_of_a_dead_mount_are_counted("decode", true);
}
