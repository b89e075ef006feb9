//! Logs as JSON: every line of supervisor and server has the mount, and lines about a template its digest and its file.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use crate::mount::damage::{flip, image, lost_blocks};
use crate::support::host;
use crate::support::mount::{Run, TestMount, wait_for};

fn lines(world: &TestMount) -> Vec<Value> {
    let log = world.log();
    log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn every_line_has_the_mount_and_lines_about_a_template_have_its_digest() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "-o", "log-format=json"]);
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    flip(&world.store_dir());
    lost_blocks(&world.file(&digest, "memory"), &bytes);
    // Another server, then another program for both, and another supervisor: each continues with the same log format.
    world.kill_server();
    let mountpoint = world.mountpoint().to_str().unwrap();
    world.stencil(&["restart", mountpoint]).ok();
    lost_blocks(&world.file(&digest, "memory"), &bytes);
    let servers = |lines: &[Value]| {
        let of_servers = lines.iter().filter(|line| line["process"] == "server");
        of_servers.map(|line| line["pid"].as_u64().unwrap()).collect::<std::collections::BTreeSet<_>>().len()
    };
    let all = wait_for("lines of three servers", || Some(lines(&world)).filter(|all| servers(all) >= 3));
    for line in &all {
        let fields: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        let about_template = ["time", "level", "process", "pid", "mount", "template", "file", "message"];
        let other = ["time", "level", "process", "pid", "mount", "message"];
        assert!(fields == about_template || fields == other, "{line}");
        assert_eq!(line["mount"], mountpoint, "{line}");
        assert!(["supervisor", "server"].contains(&line["process"].as_str().unwrap()), "{line}");
        let time = line["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && &time[10..11] == "T", "{line}");
        assert_eq!(
            line["template"].is_string(),
            line["message"].as_str().unwrap().contains(&digest),
            "{line}"
        );
    }
    let damage = all.iter().filter(|line| line["level"] == "error" && line["template"] == *digest);
    let damage: Vec<&Value> = damage.filter(|line| line["file"] == "memory").collect();
    assert!(!damage.is_empty(), "{all:#?}");
    assert!(all.iter().any(|line| line["process"] == "supervisor"), "{all:#?}");
}

#[test]
fn a_mount_in_the_foreground_logs_as_json_to_standard_error() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let log = world.dir().join("log");
    let mut command = world.command();
    command.args(["mount", "-f", "--log-format", "json", "--serve", "decode"]).arg(world.mountpoint());
    let mut child = command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    wait_for("the mount", || (world.status_of_all()["mounts"].as_array()?.len() == 1).then_some(()));
    world.kill_server();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().count() > 1, "{text}");
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(line["mount"], world.mountpoint().to_str().unwrap(), "{line}");
    }
    let refused: Run = world.mount(&["--log-format", "xml"]).exits(2);
    assert!(refused.err.contains("invalid log format 'xml'"), "{}", refused.err);
}
