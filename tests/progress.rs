//! Long work shows progress with throughput and time left on a terminal, and nothing elsewhere.

use std::process::Command;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount};
use crate::support::store::random;

/// What a command draws on a terminal of its own.
fn on_a_terminal(world: &TestMount, words: &str) -> String {
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{STENCIL} {words}"), "/dev/null"]);
    for (key, value) in world.command().get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let output = command.env("TERM", "xterm").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words}: {text}");
    text
}

#[test]
fn import_verify_hydration_and_launch_draw_and_only_on_a_terminal() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let source = world.dir().join("source");
    std::fs::write(&source, random(5, 192 << 20)).unwrap();
    let source = source.to_str().unwrap();
    for (words, phase) in [
        (format!("import {source} web:1"), "ETA"),
        ("verify web:1".to_owned(), "ETA"),
        ("clone web:1 -n 20 --simulate write=64p".to_owned(), "hydrate"),
        ("clone web:1 -n 200 --simulate write=64p".to_owned(), "launch"),
    ] {
        let drawn = on_a_terminal(&world, &words);
        assert!(drawn.contains(phase) && drawn.contains("ETA"), "{words}: {drawn:?}");
    }
    for words in [
        &["import", source, "web:2"][..],
        &["verify", "web:1"],
        &["clone", "web:1", "--simulate", "write=1p"],
    ] {
        let ran = world.stencil(words).ok();
        assert!(!ran.err.contains("ETA") && !ran.err.contains('\x1b'), "{words:?}: {:?}", ran.err);
    }
}
