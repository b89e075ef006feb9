//! The promises of `docs/reference/compatibility.md` and `docs/reference/exit-codes-and-json.md`, which hold from the
//! first release on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use stencilfs::error::Code;
use stencilfs::store::TagName;

use crate::support::host;
use crate::support::mount::{Run, TestMount, wait_for};
use crate::support::pages::tables::{code, rows};
use crate::support::store::{Fixture, random};
use crate::support::vm::guest::{Qemu, qemu_words};
use crate::vmm::firecracker::state;

/// Returns the values at a path such as `clones[].maps[].file` in a reply, or `None` if a field is missing.
fn values_at<'a>(reply: &'a Value, path: &str) -> Option<Vec<&'a Value>> {
    let mut found = vec![reply];
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

/// Calls each command of the table once, so that no list in its JSON is empty. Returns the replies by command.
fn replies(world: &TestMount) -> BTreeMap<&'static str, Value> {
    let source = world.dir().join("guest.ram");
    fs::write(&source, random(5, 1 << 20)).unwrap();
    let (source, mnt) = (source.to_str().unwrap(), world.mountpoint().to_str().unwrap());
    let object = format!("memory-backend-file,id=m,size=1M,mem-path={source},readonly=on,rom=off");
    let mut replies = BTreeMap::new();
    let mut call = |command: &[&'static str], args: &[&str]| {
        let reply = world.json(&[command, args].concat());
        replies.insert(command[0], reply.clone());
        reply
    };
    // A template that each tag below moves away from.
    let former = world.import_bytes(&random(9, 4096), "web:1");
    let tag_former = |tag: &str| world.json(&["tag", &former, tag]);
    call(&["import"], &[source, "web:1"]);
    tag_former("web:2");
    call(&["tag", "web:1", "web:2"], &[]);
    let disk = world.dir().join("root.qcow2");
    fs::write(&disk, random(8, 1 << 16)).unwrap();
    let file = format!("disk-root={},kind=blob", disk.display());
    world.json(&["import", source, "disk:1", "--file", &file]);
    world.json(&["tag", "disk:1", "disk:2"]);
    call(&["ls"], &[]);
    call(&["inspect", "web:1"], &[]);
    call(&["verify"], &[]);
    let stream = world.dir().join("stream");
    call(&["save", "web:1", "-o"], &[stream.to_str().unwrap()]);
    tag_former("web:1");
    call(&["load", "-i"], &[stream.to_str().unwrap()]);
    // The export holds a lease until the pipe is read.
    let mut export = world.command();
    let mut export =
        export.args(["export", "web:1/memory", "-"]).stdout(Stdio::piped()).spawn().expect("stencil export");
    wait_for("a lease", || {
        let du = world.json(&["du"]);
        (!du["leases"].as_array().unwrap().is_empty()).then_some(())
    });
    call(&["du"], &[]);
    export.kill().unwrap();
    export.wait().unwrap();
    call(&["gc"], &[]);
    call(&["mount"], &[mnt]);
    call(&["path", "web:1"], &[]);
    call(&["args", "web:1", "--vmm", "qemu"], &[]);
    let simulated = ["clone", "web:1", "--simulate", "read=50%,write=10%"];
    let recording = world.json(&[&simulated[..], &["--record-working-set=0"]].concat());
    let launched = call(&simulated, &[]);
    let id = launched["clones"][0]["id"].as_str().unwrap().to_owned();
    call(&["density"], &[]);
    call(&["capacity", "web:1"], &[]);
    let audited = world.json(&["density", "--audit"]);
    let explained = world.json(&["density", "--why"]);
    let grouped = world.json(&["density", "--by", "template"]);
    call(&["check"], &[&id]);
    call(&["record", "--count", "1"], &["a.rec"]);
    call(&["report"], &["a.rec"]);
    let compared = world.json(&["report", "a.rec", "--compare", "a.rec"]);
    let sample = world.json(&["top", "--once"]);
    call(&["warm", "web:1"], &[]);
    let pid_recorded = recording["clones"][0]["pid"].to_string();
    let recorded = world.json(&["working-set", "record", &pid_recorded]);
    world.json(&["stop", recording["clones"][0]["id"].as_str().unwrap()]);
    let sets = world.json(&["working-set", "ls", "web:1"]);
    let removed_set = world.json(&["working-set", "rm", "web:1"]);
    call(&["dirty", "--ranges"], &[&id]);
    let marked = world.json(&["dirty", &id, "--mark"]);
    let changed = world.json(&["dirty", &id, "--since", marked["epoch"].as_str().unwrap()]);
    // The fields of `ended` exist only for a clone that has ended.
    let pid = launched["clones"][0]["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    wait_for("the record of the exit", || {
        world.json(&["ps"])["clones"][0]["ended"].is_object().then_some(())
    });
    call(&["ps"], &[]);
    call(&["status"], &[]);
    call(&["restart"], &[mnt]);
    call(&["doctor"], &[]);
    call(&["stop", "--all"], &[]);
    call(&["umount"], &[mnt]);
    call(&["explain"], &[&object]);
    let recipe = world.dir().join("recipe.json");
    let argv = "-M q35,memory-backend=m -object memory-backend-file,id=m,mem-path={memory} -chardev path={dir}/qmp.sock \
                -drive file={disk:root} -incoming defer"
        .split(' ');
    let disks = json!([{"name": "root", "base": "disk-root", "format": "raw"}]);
    let text = json!({"version": 1, "vmm": "qemu", "program": "qemu", "disks": disks, "argv": argv.collect::<Vec<_>>()});
    fs::write(&recipe, text.to_string()).unwrap();
    let edited = world.json(&["recipe", "edit", "disk:1", "--from", recipe.to_str().unwrap()]);
    replies.insert("recipe edit", edited);
    replies.insert("clone --record-working-set", recording);
    replies.insert("working-set record", recorded);
    replies.insert("working-set ls", sets);
    replies.insert("working-set rm", removed_set);
    for (name, holes) in [("vm/full", false), ("vm/diff", true)] {
        let folder = world.dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("vm.mem"), if holes { vec![] } else { random(6, 1 << 20) }).unwrap();
        fs::File::options().append(true).open(folder.join("vm.mem")).unwrap().set_len(1 << 20).unwrap();
        fs::write(folder.join("vm.state"), state(0x8664, "8.0.0", 1)).unwrap();
        fs::write(folder.join("disk"), "a disk").unwrap();
    }
    let vm = world.dir().join("vm");
    let of = |name: &str| vm.join(name).display().to_string();
    replies.insert("import DIRECTORY", world.json(&["import", &of("full"), "vm:1"]));
    replies.insert("import --base", world.json(&["import", &of("diff"), "vm:2", "--base", "vm:1"]));
    fs::remove_dir_all(vm.join("diff")).unwrap();
    replies.insert("import DIRECTORIES", world.json(&["import", &vm.display().to_string(), "each"]));
    replies.insert("dirty --mark", marked);
    replies.insert("dirty --since", changed);
    replies.insert("density --audit", audited);
    replies.insert("density --why", explained);
    replies.insert("density --by", grouped);
    replies.insert("report --compare", compared);
    replies.insert("top --once", sample);
    let guest = Qemu::start(world.dir(), &qemu_words(world.dir(), "64M"));
    let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    guest.qmp().run("migrate-set-capabilities", multifd).unwrap();
    let socket = guest.socket().display().to_string();
    replies.insert("capture --check", world.json(&["capture", "--check", &socket]));
    tag_former("guest:1");
    replies.insert("capture", world.json(&["capture", guest.socket().to_str().unwrap(), "guest:1"]));
    replies.insert("inspect --recipe", world.json(&["inspect", "--recipe", "disk:1"]));
    // `disk:2` is one of two tags of a template; `disk:1` is then its last tag.
    replies.insert("rm", world.json(&["rm", "disk:2", "disk:1"]));
    let other = world.dir().join("other-store").display().to_string();
    world.json(&["--store", &other, "import", &of("full"), "vm:1"]);
    replies.insert("store unseal", world.json(&["store", "unseal", &other]));
    replies.insert("store destroy", world.json(&["store", "destroy", "--yes", &other]));
    replies
}

/// Returns the digests and tags of a reply that are in other fields than those for references.
fn misplaced_references(field: &str, value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| misplaced_references(name, value, out))
        }
        Value::Array(values) => values.iter().for_each(|value| misplaced_references(field, value, out)),
        Value::String(text) => {
            let is = |names: [&str; 2]| {
                names.iter().any(|name| field == *name || field.ends_with(&format!("_{name}")))
            };
            let is_digest = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let is_tag = text.parse::<TagName>().is_ok() && text.contains(':');
            if is_digest && !is(["digest", "digests"])
                || is_tag && !is(["tag", "tags"]) && field != "reference"
            {
                out.push(format!("{field}: {text}"));
            }
            if is(["digest", "digests"]) && !is_digest || is(["tag", "tags"]) && !is_tag {
                out.push(format!("{field}: {text}"));
            }
        }
        _ => {}
    }
}

#[test]
fn json_has_every_promised_field() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let replies = replies(&world);
    let mut missing = Vec::new();
    let mut seen = BTreeSet::new();
    for row in rows("reference/exit-codes-and-json.md", "json_has_every_promised_field") {
        let (command, fields) = (code(&row[0]).unwrap().to_owned(), code(&row[1]).unwrap());
        let Some(reply) = replies.get(command.as_str()) else {
            missing.push(format!("{command}: not called by this test"));
            continue;
        };
        assert_eq!(reply["schema"], 1, "{command}");
        for field in fields.split(' ') {
            if values_at(reply, field).is_none_or(|values| values.is_empty()) {
                missing.push(format!("{command}: {field}"));
            }
        }
        seen.insert(command);
    }
    assert!(missing.is_empty(), "{missing:#?}\n{replies:#?}");
    for (command, reply) in &replies {
        let mut misplaced = Vec::new();
        misplaced_references("", reply, &mut misplaced);
        assert!(misplaced.is_empty(), "{command}: {misplaced:#?}");
    }
    let removed = &replies["rm"]["removed"];
    assert_eq!((&removed[0]["digest"], &removed[0]["kept_tags"]), (&Value::Null, &json!(["disk:1"])));
    assert!(removed[1]["digest"].is_string() && removed[1]["kept_tags"] == json!([]), "{removed:#}");
    assert!(
        std::path::Path::new(replies["status"]["mounts"][0]["log"].as_str().unwrap())
            .starts_with(world.runtime_dir())
    );
    let checks = replies["doctor"]["checks"].as_array().unwrap();
    for name in ["qemu", "qemu-img"] {
        let check = checks.iter().find(|check| check["name"] == name);
        assert!(check.is_some_and(|check| check["verdict"] == "ok"), "{name}: {check:?}");
    }
    assert!(seen.len() >= 22, "{seen:?}");
}

#[test]
fn exit_codes_match_the_documentation() {
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
    let mut existing: BTreeSet<(u8, String)> =
        codes.iter().map(|code| (code.exit_code(), code.name().to_owned())).collect();
    existing.insert((0, String::new()));
    assert_eq!(existing, promised, "existing (left) and documented (right) exit codes differ");
}

#[test]
fn compatibility_promises_start_with_the_first_release() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/compatibility.md");
    let text = fs::read_to_string(page).unwrap();
    let changes = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/CHANGELOG.md")).unwrap();
    let released = !changes.contains("## 0.1.0 (not released yet)");
    assert!(
        text.contains("begins with the first release, 0.1.0"),
        "the page does not name the first release"
    );
    assert_eq!(released, !text.contains("Stencil has not been released yet"));
    assert!(
        released || !changes.contains("Incompatible: "),
        "the changelog has an incompatible change before the first release"
    );
    let table = text.split("| subject | promise |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() >= 9, "{rows:?}");
}

/// Offsets of the three 64-bit sets of feature flags in the file `format`, and of its checksum, in bytes.
const COMPATIBLE: usize = 16;
const READ_ONLY_COMPATIBLE: usize = 24;
const INCOMPATIBLE: usize = 32;
const SUM: usize = 128;

#[test]
fn newer_store_features_are_accepted_or_refused_by_class() {
    let fixture = Fixture::new();
    let source = fixture.file("guest.ram", &random(6, 1 << 20));
    let store = fixture.path("store");
    let stencil = |words: &[&str]| {
        let output = fixture.run(words);
        Run { words: words.join(" "), code: output.code, out: output.stdout, err: output.stderr }
    };
    let import = ["import", source.to_str().unwrap(), "web:2"];
    stencil(&["import", source.to_str().unwrap(), "web:1"]).ok();
    let header = store.join("format");
    let original = fs::read(&header).unwrap();
    let set_byte = |offset: usize, byte: u8| {
        let mut bytes = original.clone();
        bytes[offset] = byte;
        let sum = blake3::hash(&bytes[..SUM]);
        bytes[SUM..].copy_from_slice(sum.as_bytes());
        fs::write(&header, bytes).unwrap();
    };

    set_byte(COMPATIBLE, 1);
    stencil(&["verify"]).ok();
    stencil(&import).ok();

    set_byte(READ_ONLY_COMPATIBLE, 2);
    assert!(stencil(&["ls"]).ok().out.contains("web"));
    stencil(&["verify", "web:1"]).ok();
    for words in [&import[..], &["rm", "web:1"], &["tag", "web:1", "web:3"]] {
        stencil(words).exits(1).says("changing the store needs a newer Stencil: unsupported features 0x2");
    }

    set_byte(INCOMPATIBLE, 4);
    stencil(&["ls"]).exits(1).says("needs a newer Stencil: unsupported features 0x4");
    stencil(&import).exits(1).says("needs a newer Stencil: unsupported features 0x4");

    // An unknown format version.
    set_byte(8, 2);
    stencil(&["ls"]).exits(1).says("unsupported format version 2, expected 1");

    fs::write(&header, &original).unwrap();
    stencil(&["verify"]).ok();
    assert!(stencil(&["ls"]).ok().out.lines().count() == 3, "a refused command changed the store");
}
