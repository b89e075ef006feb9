//! The baseline of the memory audit: the memory that was available before a launch.

use serde_json::{Value, json};

use crate::clones::counted_once::{audited, world, writer};
use crate::support::host;
use crate::support::mount::TestMount;

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
