//! The baseline of the memory audit: the memory that was available before a launch.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::clones::counted_once::{SIZE, audited, world, writer};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// The memory that was available before a launch is a baseline for the clones of that launch, and for no others.
#[test]
fn a_memory_baseline_applies_only_to_its_launch() {
    let _host = host::alone();
    let (world, digest) = world();
    let memory = |world: &TestMount| audited(world)["audit"]["memory"].clone();
    world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "write=100p"]).ok();
    let launched = world.json(&["density", "--audit"])["audit"].clone();
    assert_eq!(launched["memory"]["tolerance_percent"], 5.0, "{launched:#}");
    let verdicts = [&launched["frames"]["verdict"], &launched["memory"]["verdict"]];
    let doubtful = verdicts.contains(&&json!("doubtful"));
    assert_eq!(launched["verdict"], if doubtful { "doubtful" } else { "ok" }, "{launched:#}");
    // A later launch did not exist at the baseline of the first one: the audit includes both.
    world.stencil(&["clone", "web:1", "--simulate", "write=100p"]).ok();
    assert!(memory(&world).is_object());
    world.stencil(&["stop", "--all"]).ok();
    let actor = writer(&world, &digest, 10);
    assert_eq!(memory(&world), Value::Null, "no launch recorded a baseline for this process");
    world.stencil(&["clone", "web:1", "--simulate", "write=100p"]).ok();
    assert_eq!(memory(&world), Value::Null, "an earlier clone was not in the baseline");
    let text = world.stencil(&["density", "--audit"]).ok().out;
    assert!(text.contains("no baseline") && text.contains("ok: off by"), "{text}");
    assert!(text.contains("tolerance 0.5 %"), "{text}");
    drop(actor);
}

/// Memory that clones took before a launch and have freed since is no part of what the later clones have taken.
#[test]
fn a_baseline_that_other_clones_have_changed_is_not_used() {
    let _host = host::alone();
    let (world, digest) = world();
    let memory = || audited(&world)["audit"]["memory"].clone();
    let launch = || world.stencil(&["clone", "web:1", "--simulate", "write=100p"]).ok();
    let stop = || world.stencil(&["stop", "--all"]).ok();

    // Without a baseline if a process of another test run cannot be inspected at that moment.
    let launch_with_baseline = || {
        wait_for("a launch with a baseline", || {
            launch();
            memory().is_object().then_some(()).or_else(|| {
                stop();
                None
            })
        });
    };

    // A process that is older than the baseline, and maps the template later.
    let mut older = Actor::start();
    launch_with_baseline();
    older.tell(&format!("map 0 {} 0 {SIZE} rw", world.file(&digest, "memory").display()));
    older.write_pages(0, 0..50);
    assert_eq!(memory(), Value::Null, "the process was there before the baseline");
    stop();
    drop(older);

    // A launch that is in progress, and whose clone maps nothing yet.
    let mut held = world.command();
    held.args(["clone", "web:1", "--ready", "notify", "--", "sh", "-c", "exec sleep 1000"]);
    let mut held = held.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let launches = world.runtime_dir().join("launches");
    wait_for("the launch", || std::fs::read_dir(&launches).ok()?.next().map(drop));
    launch();
    held.kill().unwrap();
    held.wait().unwrap();
    wait_for("the end of the launch", || {
        let clones = world.json(&["ps"])["clones"].as_array().unwrap().len();
        (clones == 1).then_some(())
    });
    assert_eq!(memory(), Value::Null, "another launch was in progress");
    stop();

    // Clones of a dead mount.
    let mut gone = writer(&world, &digest, 100);
    for process in world.processes() {
        process.signal(Signal::KILL).unwrap();
        assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap());
    }
    world.mount(&["--serve", "decode"]).ok();
    launch();
    gone.tell("read 0 0");
    drop(gone);
    assert_eq!(memory(), Value::Null, "a clone of a dead mount was there");
    stop();
    launch_with_baseline();
}
