//! Long operations draw progress with throughput and remaining time on a terminal, and nothing elsewhere; as JSON lines
//! on request.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount};
use crate::support::pages::tables::{code, rows};
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
        ("stop --all".to_owned(), "stop"),
        ("du".to_owned(), "references"),
        ("gc".to_owned(), "references"),
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

/// The progress that a command reports as JSON lines. Panics unless each phase begins with 0 and never runs backwards.
fn reported(world: &TestMount, args: &[&str]) -> Vec<Value> {
    let run = world.stencil(&[&["--progress", "json"], args].concat()).ok();
    let lines = run.err.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let done = |line: &Value| line["done"].as_u64().unwrap();
    for (at, line) in lines.iter().enumerate() {
        let before = at.checked_sub(1).map(|at| &lines[at]).filter(|before| before["phase"] == line["phase"]);
        assert!(before.map_or(done(line) == 0, |before| done(before) <= done(line)), "{args:?}: {lines:?}");
        assert!(line["total"].as_u64().is_none_or(|total| done(line) <= total), "{args:?}: {lines:?}");
    }
    lines
}

#[test]
fn json_progress_of_every_command_is_as_documented() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let source = world.dir().join("source");
    std::fs::write(&source, random(5, 8 << 20)).unwrap();
    let place = |name: &str| world.dir().join(name).display().to_string();
    let (out, stream) = (place("out"), place("stream"));
    let promised: Vec<String> = rows("reference/exit-codes-and-json.md", "progress_has_every_promised_field")
        .iter()
        .map(|row| code(&row[0]).unwrap().to_owned())
        .collect();
    let mut seen = BTreeMap::new();
    for args in [
        &["import", source.to_str().unwrap(), "web:1"][..],
        &["verify"],
        &["export", "web:1/memory", &out],
        &["save", "web:1", "-o", &stream],
        &["load", "-i", &stream],
        &["clone", "web:1", "-n", "3", "--simulate", "write=1p"],
        &["stop", "--all"],
        &["warm", "web:1"],
        &["du"],
        &["gc"],
    ] {
        if args[0] == "stop" {
            let clone = world.json(&["ps"])["clones"][0]["pid"].to_string();
            world.stencil(&["working-set", "record", &clone]).ok();
        }
        let lines = reported(&world, args);
        for line in &lines {
            let fields: Vec<&String> = line.as_object().unwrap().keys().collect();
            assert_eq!(fields, promised.iter().collect::<Vec<_>>(), "{args:?}");
            assert_eq!(line["schema"], 1);
        }
        let last = lines.last().unwrap_or_else(|| panic!("{args:?} reports no progress"));
        assert_eq!(last["done"], last["total"], "{args:?}: {lines:?}");
        let unit = if ["clone", "stop"].contains(&args[0]) { "clones" } else { "bytes" };
        assert_eq!(last["unit"], if args[0] == "du" { "templates" } else { unit }, "{args:?}");
        let mut phases: Vec<String> =
            lines.iter().map(|line| line["phase"].as_str().unwrap().to_owned()).collect();
        phases.dedup();
        seen.insert(args[0].to_owned(), phases);
    }
    let documented = rows("reference/exit-codes-and-json.md", "every_listed_command_reports_progress");
    let words =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    for row in documented {
        for command in words(&row[0]).iter().filter(|command| *command != "capture") {
            let phases: Vec<String> =
                words(&row[1]).into_iter().filter(|word| !word.starts_with('-')).collect();
            assert_eq!(seen.remove(command), Some(phases), "{command}");
        }
    }
    assert_eq!(seen, BTreeMap::new());

    // The result on standard output stays one JSON object, and nothing is reported without the option.
    let run = world.stencil(&["--json", "--progress", "json", "verify"]).ok();
    assert!(run.err.starts_with('{') && serde_json::from_str::<Value>(&run.out).is_ok(), "{run:?}");
    assert_eq!(world.stencil(&["--json", "verify"]).ok().err, "");
}
