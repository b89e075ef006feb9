//! Who relies on a template before the kernel shows that it is used: a removal refuses, and names them.

use std::process::{Child, Stdio};

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, wait_for};
use crate::support::store::guest_like;

/// A launcher that waits for a clone which never gets ready.
fn stuck_launcher(world: &TestMount, tag: &str) -> Child {
    let words = ["clone", tag, "--ready", "notify", "--timeout", "600", "--", "sleep", "600"];
    world.command().args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_leased_template_is_not_removed_until_its_holder_ends() {
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
    let shown = world.stencil(&["inspect", "web:1"]).ok().out;
    assert!(shown.contains(&format!("lease    process {} (clone)", launcher.id())), "{shown}");

    let refused = world.stencil(&["rm", "web:1"]).exits(5).says("is leased");
    assert!(refused.err.contains(&format!("{} (clone)", launcher.id())), "{refused:?}");
    let mut elsewhere = world.command_in("unshare");
    elsewhere.args(["--pid", "--fork", "--mount-proc", "--kill-child", STENCIL, "inspect", "web:1"]);
    let shown = Run::of("inspect".into(), &elsewhere.output().unwrap()).ok().out;
    assert!(shown.contains("(clone) in another PID namespace"), "{shown}");
    world.stencil(&["rm", "other"]).ok();
    // However its holder ends, it is nobody's then.
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    assert!(leases().is_empty());
    world.stencil(&["rm", "web:1"]).ok();
    let folder = world.runtime_dir().join("leases");
    let left: Vec<_> = walk(&folder).into_iter().filter(|p| !p.ends_with("removal.lock")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { walk(&e.path()) } else { vec![e.path()] }).collect()
}
