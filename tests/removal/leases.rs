//! Leases: `rm` refuses a template that a command is about to use, before any process maps the template, and names the
//! command.

use std::process::{Child, Stdio};

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, wait_for};
use crate::support::store::guest_like;

/// A `stencil clone` that waits for a clone which never becomes ready.
fn stuck_launcher(world: &TestMount, tag: &str) -> Child {
    let args = ["clone", tag, "--ready", "notify", "--timeout", "600", "--", "sleep", "600"];
    world.command().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn rm_refuses_a_leased_template_until_the_lease_holder_exits() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    world.import_bytes(&guest_like(2, 1 << 20), "other");
    let mut launcher = stuck_launcher(&world, "web:1");
    let leases = || world.json(&["inspect", "web:1"])["leases"].as_array().unwrap().clone();
    let lease = wait_for("the lease", || leases().first().cloned());
    assert_eq!(lease["pid"], launcher.id());
    assert_eq!(lease["command"], "clone");
    assert_eq!(lease["digest"], digest);
    let printed = world.stencil(&["inspect", "web:1"]).ok().out;
    assert!(printed.contains(&format!("lease    process {} (clone)", launcher.id())), "{printed}");

    let refused = world.stencil(&["rm", "web:1"]).exits(5).says("is leased");
    assert!(refused.err.contains(&format!("{} (clone)", launcher.id())), "{refused:?}");
    let mut elsewhere = world.command_in("unshare");
    elsewhere.args(["--pid", "--fork", "--mount-proc", "--kill-child", STENCIL, "inspect", "web:1"]);
    let printed = Run::of("inspect".into(), &elsewhere.output().unwrap()).ok().out;
    assert!(printed.contains("(clone) in another PID namespace"), "{printed}");
    world.stencil(&["rm", "other"]).ok();
    // Even SIGKILL of the holder ends the lease.
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    assert!(leases().is_empty());
    world.stencil(&["rm", "web:1"]).ok();
    let directory = world.runtime_dir().join("leases");
    let left: Vec<_> = files_below(&directory).into_iter().filter(|p| !p.ends_with("removal.lock")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn files_below(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { files_below(&e.path()) } else { vec![e.path()] }).collect()
}
