//! The memory that was free before a launch.

use serde_json::{Value, json};

use crate::counted_once::{audited, world, writer};
use crate::support::host;
use crate::support::mount::TestMount;

/// The memory that was free before a launch says something of that launch's clones, and of no other ones.
#[test]
fn a_baseline_goes_with_its_launch() {
    let _host = host::alone();
    let (world, digest) = world();
    let memory = |world: &TestMount| audited(world)["audit"]["memory"].clone();
    world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "write=100p"]).ok();
    let launched = world.json(&["density", "--audit"])["audit"].clone();
    assert_eq!(launched["memory"]["tolerance_percent"], 5.0, "{launched:#}");
    let verdicts = [&launched["frames"]["verdict"], &launched["memory"]["verdict"]];
    let doubtful = verdicts.contains(&&json!("doubtful"));
    assert_eq!(launched["verdict"], if doubtful { "doubtful" } else { "ok" }, "{launched:#}");
    // What is launched beside them was not there before either.
    world.stencil(&["clone", "web:1", "--simulate", "write=100p"]).ok();
    assert!(memory(&world).is_object());
    world.stencil(&["stop", "--all"]).ok();
    let actor = writer(&world, &digest, 10);
    assert_eq!(memory(&world), Value::Null, "nobody noted what was free before it");
    world.stencil(&["clone", "web:1", "--simulate", "write=100p"]).ok();
    assert_eq!(memory(&world), Value::Null, "another clone had taken memory before");
    let text = world.stencil(&["density", "--audit"]).ok().out;
    assert!(text.contains("no baseline") && text.contains("ok: off by"), "{text}");
    assert!(text.contains("tolerance 0.5 %"), "{text}");
    drop(actor);
}
