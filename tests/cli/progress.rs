//! Long operations draw progress with throughput and remaining time on a terminal, and nothing elsewhere.

use std::process::Command;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount};
use crate::support::store::random;

/// Runs a command on a new pseudoterminal and returns its output.
fn on_a_terminal(world: &TestMount, args: &str) -> String {
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{STENCIL} {args}"), "/dev/null"]);
    for (key, value) in world.command().get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let output = command.env("TERM", "xterm").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args}: {text}");
    text
}

#[test]
fn progress_is_drawn_on_terminals_only() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let source = world.dir().join("source");
    std::fs::write(&source, random(5, 192 << 20)).unwrap();
    let source = source.to_str().unwrap();
    for (args, phase) in [
        (format!("import {source} web:1"), "ETA"),
        ("verify web:1".to_owned(), "ETA"),
        ("clone web:1 -n 20 --simulate write=64p".to_owned(), "hydrate"),
        ("clone web:1 -n 200 --simulate write=64p".to_owned(), "launch"),
    ] {
        let drawn = on_a_terminal(&world, &args);
        assert!(drawn.contains(phase) && drawn.contains("ETA"), "{args}: {drawn:?}");
    }
    for args in [
        &["import", source, "web:2"][..],
        &["verify", "web:1"],
        &["clone", "web:1", "--simulate", "write=1p"],
    ] {
        let ran = world.stencil(args).ok();
        assert!(!ran.err.contains("ETA") && !ran.err.contains('\x1b'), "{args:?}: {:?}", ran.err);
    }
}
