//! What `docs/reference/compatibility.md` and `docs/reference/exit-codes-and-json.md` promise from the first release on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use stencilfs::error::Code;

use crate::support::guest::{Qemu, qemu_words};
use crate::support::host;
use crate::support::mount::{Run, TestMount, wait_for};
use crate::support::store::{Fixture, random};
use crate::support::tables::{code, rows};

/// The values that a path such as `clones[].maps[].file` has in an answer; nothing where a field is missing.
fn at<'a>(answer: &'a Value, path: &str) -> Option<Vec<&'a Value>> {
    let mut found = vec![answer];
    for step in path.split('.') {
        let (field, list) = step.strip_suffix("[]").map_or((step, false), |field| (field, true));
        let mut next = Vec::new();
        for value in found {
            let value = value.get(field)?;
            if list {
                next.extend(value.as_array()?);
            } else {
                next.push(value);
            }
        }
        found = next;
    }
    Some(found)
}

/// One call of each command that the table has, with an answer in which no list is empty.
fn answers(world: &TestMount) -> BTreeMap<&'static str, Value> {
    let source = world.dir().join("guest.ram");
    fs::write(&source, random(5, 1 << 20)).unwrap();
    let (source, mnt) = (source.to_str().unwrap(), world.mountpoint().to_str().unwrap());
    let object = format!("memory-backend-file,id=m,size=1M,mem-path={source},readonly=on,rom=off");
    let mut answers = BTreeMap::new();
    let mut ask = |words: &[&'static str], more: &[&str]| {
        let answer = world.json(&[words, more].concat());
        answers.insert(words[0], answer.clone());
        answer
    };
    ask(&["import"], &[source, "web:1"]);
    ask(&["tag", "web:1", "web:2"], &[]);
    let disk = world.dir().join("root.qcow2");
    fs::write(&disk, random(8, 1 << 16)).unwrap();
    let file = format!("disk-root={},kind=blob", disk.display());
    world.json(&["import", source, "disk:1", "--file", &file]);
    world.json(&["tag", "disk:1", "disk:2"]);
    ask(&["ls"], &[]);
    ask(&["inspect", "web:1"], &[]);
    ask(&["verify"], &[]);
    let stream = world.dir().join("stream");
    ask(&["save", "web:1", "-o"], &[stream.to_str().unwrap()]);
    ask(&["load", "-i"], &[stream.to_str().unwrap()]);
    // Its lease lasts as long as nobody reads the pipe.
    let mut export = world.command();
    let mut export =
        export.args(["export", "web:1/memory", "-"]).stdout(Stdio::piped()).spawn().expect("stencil export");
    wait_for("a lease", || {
        let du = world.json(&["du"]);
        (!du["leases"].as_array().unwrap().is_empty()).then_some(())
    });
    ask(&["du"], &[]);
    export.kill().unwrap();
    export.wait().unwrap();
    ask(&["gc"], &[]);
    ask(&["mount"], &[mnt]);
    ask(&["path", "web:1"], &[]);
    ask(&["args", "web:1", "--vmm", "qemu"], &[]);
    let launched = ask(&["clone", "web:1", "--simulate", "read=50%,write=10%"], &[]);
    let id = launched["clones"][0]["id"].as_str().unwrap().to_owned();
    ask(&["density"], &[]);
    let audited = world.json(&["density", "--audit"]);
    ask(&["dirty", "--ranges"], &[&id]);
    // The fields below `ended` exist for a clone that has ended.
    let pid = launched["clones"][0]["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    wait_for("the record of its end", || world.json(&["ps"])["clones"][0]["ended"].is_object().then_some(()));
    ask(&["ps"], &[]);
    ask(&["status"], &[]);
    ask(&["restart"], &[mnt]);
    ask(&["doctor"], &[]);
    ask(&["stop", "--all"], &[]);
    ask(&["umount"], &[mnt]);
    ask(&["explain"], &[&object]);
    let recipe = world.dir().join("recipe.json");
    let argv = "-M q35,memory-backend=m -object memory-backend-file,id=m,mem-path={memory} -chardev path={dir}/qmp.sock \
                -drive file={disk:root} -incoming defer"
        .split(' ');
    let disks = json!([{"name": "root", "base": "disk-root", "format": "raw"}]);
    let text = json!({"version": 1, "vmm": "qemu", "program": "qemu", "disks": disks, "argv": argv.collect::<Vec<_>>()});
    fs::write(&recipe, text.to_string()).unwrap();
    let edited = world.json(&["recipe", "edit", "disk:1", "--from", recipe.to_str().unwrap()]);
    answers.insert("recipe edit", edited);
    answers.insert("density --audit", audited);
    let guest = Qemu::start(world.dir(), &qemu_words(world.dir(), "64M"));
    let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    guest.qmp().run("migrate-set-capabilities", multifd).unwrap();
    let socket = guest.socket().display().to_string();
    answers.insert("capture --check", world.json(&["capture", "--check", &socket]));
    answers.insert("capture", world.json(&["capture", guest.socket().to_str().unwrap(), "guest:1"]));
    answers.insert("inspect --recipe", world.json(&["inspect", "--recipe", "disk:1"]));
    // The first of two tags, and the last.
    answers.insert("rm", world.json(&["rm", "disk:2", "disk:1"]));
    answers
}

#[test]
fn json_has_every_promised_field() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let answers = answers(&world);
    let mut missing = Vec::new();
    let mut seen = BTreeSet::new();
    for row in rows("reference/exit-codes-and-json.md", "json_has_every_promised_field") {
        let (command, fields) = (code(&row[0]).unwrap().to_owned(), code(&row[1]).unwrap());
        let Some(answer) = answers.get(command.as_str()) else {
            missing.push(format!("{command}: it is not called here"));
            continue;
        };
        assert_eq!(answer["schema"], 1, "{command}");
        for field in fields.split(' ') {
            if at(answer, field).is_none_or(|values| values.is_empty()) {
                missing.push(format!("{command}: {field}"));
            }
        }
        seen.insert(command);
    }
    assert!(missing.is_empty(), "{missing:#?}\n{answers:#?}");
    let removed = &answers["rm"]["removed"];
    assert_eq!((&removed[0]["template"], &removed[0]["kept_tags"]), (&Value::Null, &json!(["disk:1"])));
    assert!(removed[1]["template"].is_string() && removed[1]["kept_tags"] == json!([]), "{removed:#}");
    assert!(
        std::path::Path::new(answers["status"]["mounts"][0]["log"].as_str().unwrap())
            .starts_with(world.runtime_dir())
    );
    let checks = answers["doctor"]["checks"].as_array().unwrap();
    for name in ["qemu", "qemu-img"] {
        let check = checks.iter().find(|check| check["name"] == name);
        assert!(check.is_some_and(|check| check["verdict"] == "ok"), "{name}: {check:?}");
    }
    assert!(seen.len() >= 22, "{seen:?}");
}

#[test]
fn exit_codes_are_the_promised_ones() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/exit-codes-and-json.md");
    let text = fs::read_to_string(page).unwrap();
    let table = text.split("## Exit codes\n\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let promised: BTreeSet<(u8, String)> = table
        .lines()
        .skip(2)
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            (cells[1].parse().unwrap(), cells[2].trim_matches('`').to_owned())
        })
        .collect();
    let codes = [
        Code::Failed,
        Code::Usage,
        Code::Damage,
        Code::NotFound,
        Code::InUse,
        Code::CheckFailed,
        Code::TryAgain,
    ];
    let mut ours: BTreeSet<(u8, String)> =
        codes.iter().map(|code| (code.exit_code(), code.name().to_owned())).collect();
    ours.insert((0, String::new()));
    assert_eq!(ours, promised, "existing on the left, documented on the right");
}

#[test]
fn promises_begin_with_the_first_release() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/compatibility.md");
    let text = fs::read_to_string(page).unwrap();
    let changes = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/CHANGELOG.md")).unwrap();
    let released = !changes.contains("## 0.1.0 (not released yet)");
    assert!(text.contains("begins with the first release, 0.1.0"), "the page names the first release");
    assert_eq!(released, !text.contains("Stencil has not been released yet"));
    assert!(released || !changes.contains("Incompatible: "), "nothing was promised yet");
    let table = text.split("| subject | promise |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() >= 9, "{rows:?}");
}

/// Where the three words of features lie in `format`, and where its checksum does.
const COMPATIBLE: usize = 16;
const READ_ONLY_COMPATIBLE: usize = 24;
const INCOMPATIBLE: usize = 32;
const SUM: usize = 128;

#[test]
fn a_store_with_new_features_is_read_or_refused_by_name() {
    let fixture = Fixture::new();
    let source = fixture.file("guest.ram", &random(6, 1 << 20));
    let store = fixture.path("store");
    let stencil = |words: &[&str]| {
        let ran = fixture.run(words);
        Run { words: words.join(" "), code: ran.code, out: ran.stdout, err: ran.stderr }
    };
    let import = ["import", source.to_str().unwrap(), "web:2"];
    stencil(&["import", source.to_str().unwrap(), "web:1"]).ok();
    let header = store.join("format");
    let plain = fs::read(&header).unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        let sum = blake3::hash(&bytes[..SUM]);
        bytes[SUM..].copy_from_slice(sum.as_bytes());
        fs::write(&header, bytes).unwrap();
    };

    with(COMPATIBLE, 1);
    stencil(&["verify"]).ok();
    stencil(&import).ok();

    with(READ_ONLY_COMPATIBLE, 2);
    assert!(stencil(&["ls"]).ok().out.contains("web"));
    stencil(&["verify", "web:1"]).ok();
    for words in [&import[..], &["rm", "web:1"], &["tag", "web:1", "web:3"]] {
        stencil(words).exits(1).says("changing the store needs a newer Stencil: unsupported features 0x2");
    }

    with(INCOMPATIBLE, 4);
    stencil(&["ls"]).exits(1).says("needs a newer Stencil: unsupported features 0x4");
    stencil(&import).exits(1).says("needs a newer Stencil: unsupported features 0x4");

    // A version that is not known.
    with(8, 2);
    stencil(&["ls"]).exits(1).says("unsupported format version 2, expected 1");

    fs::write(&header, &plain).unwrap();
    stencil(&["verify"]).ok();
    assert!(stencil(&["ls"]).ok().out.lines().count() == 3, "refused calls have changed nothing");
}
