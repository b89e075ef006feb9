//! `capture --check` names everything that stands against a capture, and prints a command line with which the VM can be
//! captured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::guest::{Qemu, media, patiently, qemu_words};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::passing::Running;
use crate::support::store::random;

/// RAM files that a printed command line made.
struct InShm(Vec<PathBuf>);

impl Drop for InShm {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| drop(fs::remove_file(file)));
    }
}

/// Everything of a VM that a check could change.
fn state(qmp: &mut Qmp) -> Vec<Value> {
    let mut all: Vec<Value> = [
        "query-status",
        "query-migrate-capabilities",
        "query-migrate-parameters",
        "query-migrate",
        "query-jobs",
    ]
    .map(|command| qmp.run(command, json!({})).unwrap())
    .into();
    all.push(media(qmp));
    all
}

#[test]
fn every_obstacle_is_named_and_the_printed_line_can_be_captured() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let dir = world.dir();
    // A name that a shell would split.
    let (disk, odd) = (dir.join("disk.raw"), dir.join("it's a disk.raw"));
    fs::write(&disk, random(1, 1 << 20)).unwrap();
    fs::write(&odd, random(2, 16 << 20)).unwrap();
    let socket = dir.join("qmp");
    let own = format!(
        "-M q35 -accel tcg -m 64 -nodefaults -no-user-config -display none -device virtio-balloon-pci,id=b \
         -netdev socket,id=n0,listen=127.0.0.1:0 -device virtio-net-pci,netdev=n0,id=eth -drive \
         file={},format=raw,snapshot=on,if=none,id=d0 -device virtio-blk-pci,drive=d0 \
         -drive driver=null-co,if=none,id=d1,size=1M,read-zeroes=on -device virtio-blk-pci,drive=d1 \
         -chardev file,id=c0,path={} -device isa-serial,chardev=c0 -overcommit mem-lock=off \
         -qmp unix:{},server=on,wait=off",
        disk.display(),
        dir.join("serial").display(),
        socket.display()
    );
    let mut words: Vec<String> = own.split_ascii_whitespace().map(str::to_owned).collect();
    words.extend(["-drive".into(), format!("file={},format=raw,if=none,id=d2", odd.display())]);
    words.extend(["-device", "virtio-blk-pci,drive=d2"].map(str::to_owned));
    let mut qemu = Qemu::start(dir, &words);
    let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    qemu.qmp().run("migrate-set-capabilities", multifd).unwrap();
    let job =
        json!({"job-id": "mine", "device": "d2", "target": dir.join("copy"), "sync": "full", "speed": 1});
    qemu.qmp().run("drive-backup", job).unwrap();
    let before = state(&mut qemu.qmp());

    let said = world.stencil(&["capture", "--check", socket.to_str().unwrap()]).exits(6);
    let report = world.stencil(&["--json", "capture", "--check", socket.to_str().unwrap()]).exits(6);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(report["can_be_captured"], false);
    let mut after = state(&mut qemu.qmp());
    // The job goes on.
    after[4] = before[4].clone();
    assert_eq!(after, before);
    for (about, blocks, words) in [
        ("ram", true, "not in a file mapped with share=on"),
        ("device", true, "virtio-balloon-pci (b)"),
        ("option", true, "unsupported network type socket"),
        ("disk", true, "snapshot=on"),
        ("disk", true, "driver=null-co"),
        ("busy", true, "in use by backup job 'mine'"),
        ("clone", false, "vmgenid"),
        ("clone", false, "virtio-rng"),
        ("settings", false, "multifd"),
    ] {
        let is_it = |one: &&Value| {
            one["about"] == about && one["blocks"] == blocks && one["what"].as_str().unwrap().contains(words)
        };
        assert!(
            report["findings"].as_array().unwrap().iter().any(|f| is_it(&f)),
            "{about} {words}: {report:#}"
        );
        assert!(said.out.contains(words), "{words}: {}", said.out);
    }
    let ram = report["findings"].as_array().unwrap().iter().find(|f| f["about"] == "ram").unwrap();
    assert!(ram["remedy"].as_str().unwrap().contains("command line below"), "{ram}");
    // What a capture says has a size that QEMU takes.
    world.stencil(&["capture", socket.to_str().unwrap(), "vm:x"]).exits(5);
    qemu.qmp().run("block-job-cancel", json!({"device": "mine", "force": true})).unwrap();
    patiently("the job's end", Duration::from_secs(10), || {
        (qemu.run("query-jobs") == json!([])).then_some(())
    });
    let run = world.stencil(&["capture", socket.to_str().unwrap(), "vm:x"]).exits(2);
    assert!(run.err.contains(",size=64M,mem-path="), "{}", run.err);

    // The line, as it is printed, in a shell.
    qemu.kill();
    fs::remove_file(&socket).unwrap();
    let line = said.out.split_once("after this VM has exited:\n").unwrap().1;
    let files = line.split(['=', ',', ' ']).filter(|word| word.starts_with("/dev/shm/")).map(PathBuf::from);
    let in_shm = InShm(files.collect());
    assert_eq!(in_shm.0.len(), 1, "{line}");
    let folder = Path::new(report["directory"].as_str().unwrap());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]).current_dir(folder).stdin(Stdio::null());
    let mut fresh = Running::start(&mut command, &dir.join("fresh.log"));
    patiently("QMP", Duration::from_secs(30), || {
        let log = fs::read_to_string(dir.join("fresh.log")).unwrap();
        assert!(fresh.0.try_wait().unwrap().is_none(), "{log}\n{line}");
        Qmp::connect(&socket).ok().map(drop)
    });
    let report = world.json(&["capture", "--check", socket.to_str().unwrap()]);
    assert_eq!((&report["can_be_captured"], &report["findings"]), (&json!(true), &json!([])), "{report:#}");
    let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:1"]);
    assert_eq!(captured["warnings"], json!([]));
    assert_eq!(captured["files"].as_array().unwrap().iter().filter(|f| f["kind"] == "ram").count(), 1);

    // Clones start, and 2 MiB of the template can be mapped as one.
    world.json(&["clone", "vm:1", "-n", "2"]);
    let density = world.json(&["density"]);
    let clones = density["clones"].as_array().unwrap();
    assert_eq!(clones.len(), 2);
    for map in clones.iter().flat_map(|clone| clone["maps"].as_array().unwrap()) {
        assert_eq!(map["start"].as_u64().unwrap() % (2 << 20), 0, "{map}");
    }
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn a_vm_that_can_be_captured_is_told_so() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let qemu = Qemu::start(world.dir(), &qemu_words(world.dir(), "16M"));
    let socket = qemu.socket().display().to_string();
    let run = world.stencil(&["capture", "--check", &socket]).ok();
    assert!(run.out.contains("can be captured\n"), "{}", run.out);
    qemu.run("stop");
    world.stencil(&["capture", "--check", &socket]).ok();
    qemu.run("cont");
    world.stencil(&["capture", "--check", &socket, "x"]).exits(2);
    world.stencil(&["capture", &socket]).exits(2);
    // A replaced file is found as well.
    fs::rename(world.dir().join("ram"), world.dir().join("own")).unwrap();
    fs::write(world.dir().join("ram"), vec![0; 16 << 20]).unwrap();
    let run = world.stencil(&["capture", "--check", &socket]).exits(6);
    assert!(run.out.contains("obstacle: file: the VM does not map memory object 'ram0'"), "{}", run.out);
    assert_eq!(qemu.status(), "running");
}
