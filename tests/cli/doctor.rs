//! `stencil doctor`: a property that it could not check is unknown, and its last line is a verdict.

use std::fs::File;

use serde_json::Value;

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount};

/// Runs `stencil doctor` where the kernel's configuration cannot be read.
fn without_configuration(world: &TestMount, words: &str) -> Run {
    let script = format!(
        "mount --bind /dev/null /proc/config.gz; mount -t tmpfs none /boot; exec {STENCIL} doctor {words}"
    );
    let mut command = world.command_in("unshare");
    Run::of(format!("doctor {words}"), &command.args(["--mount", "sh", "-c", &script]).output().unwrap())
}

fn reply(run: Run) -> Value {
    serde_json::from_str(&run.ok().out).unwrap()
}

fn passthrough(reply: &Value) -> (&str, &str) {
    let check = reply["checks"].as_array().unwrap().iter().find(|c| c["name"] == "passthrough").unwrap();
    (check["verdict"].as_str().unwrap(), check["found"].as_str().unwrap())
}

#[test]
fn doctor_takes_passthrough_for_supported_only_with_a_proof() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let digest = world.import_bytes(&[7; 1 << 20], "web:1");

    let unknown = reply(without_configuration(&world, "--json"));
    let (verdict, found) = passthrough(&unknown);
    assert!(verdict == "unknown" && found.contains("no kernel configuration"), "{unknown:#}");
    assert_eq!(unknown["verdict"], "unknown");
    let checks = unknown["checks"].as_array().unwrap();
    for result in ["ok", "note", "unknown", "missing"] {
        let count = checks.iter().filter(|check| check["verdict"] == result).count();
        assert_eq!(unknown["counts"][result], count, "{result}: {unknown:#}");
    }
    assert!(unknown["summary"].as_str().unwrap().contains("1 unknown (passthrough)"), "{unknown:#}");

    let _open = File::open(world.file(&digest, "memory")).unwrap();
    let proven = reply(without_configuration(&world, "--json"));
    let expected = format!("{} serves by passthrough", world.mountpoint().display());
    assert_eq!(passthrough(&proven), ("ok", expected.as_str()));

    let text = without_configuration(&world, "").ok().out;
    let last = text.lines().last().unwrap();
    assert_eq!(last, proven["summary"].as_str().unwrap());
    assert!(last.starts_with("this host can run Stencil: "), "{last}");

    // The configuration of the running kernel, wherever it is.
    let here = world.json(&["doctor"]);
    let (verdict, found) = passthrough(&here);
    assert!(verdict == "ok" && found.starts_with("CONFIG_FUSE_PASSTHROUGH=y in /"), "{here:#}");
}
