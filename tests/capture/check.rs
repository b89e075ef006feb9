//! `stencil capture --check` lists every obstacle to a capture, and prints a command line with which the VM can be
//! captured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::random;
use crate::support::vm::guest::{Qemu, media, patiently, qemu_words};

/// RAM files below /dev/shm that the printed command line created; removed on drop.
struct ShmFiles(Vec<PathBuf>);

impl Drop for ShmFiles {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| drop(fs::remove_file(file)));
    }
}

/// Returns all state of a VM that `--check` could change.
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
fn check_lists_every_obstacle_and_prints_a_capturable_command() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let dir = world.dir();
    // The name of the second disk needs quoting in a shell.
    let (disk, quoted) = (dir.join("disk.raw"), dir.join("it's a disk.raw"));
    fs::write(&disk, random(1, 1 << 20)).unwrap();
    fs::write(&quoted, random(2, 16 << 20)).unwrap();
    let socket = dir.join("qmp");
    let options = format!(
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
    let mut words: Vec<String> = options.split_ascii_whitespace().map(str::to_owned).collect();
    words.extend(["-drive".into(), format!("file={},format=raw,if=none,id=d2", quoted.display())]);
    words.extend(["-device", "virtio-blk-pci,drive=d2"].map(str::to_owned));
    let mut qemu = Qemu::start(dir, &words);
    let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
    qemu.qmp().run("migrate-set-capabilities", multifd).unwrap();
    let job =
        json!({"job-id": "mine", "device": "d2", "target": dir.join("copy"), "sync": "full", "speed": 1});
    qemu.qmp().run("drive-backup", job).unwrap();
    let before = state(&mut qemu.qmp());

    let text = world.stencil(&["capture", "--check", socket.to_str().unwrap()]).exits(6);
    let report = world.stencil(&["--json", "capture", "--check", socket.to_str().unwrap()]).exits(6);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(report["can_be_captured"], false);
    let mut after = state(&mut qemu.qmp());
    // The backup job makes progress meanwhile.
    after[4] = before[4].clone();
    assert_eq!(after, before);
    for (about, blocks, what) in [
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
        let is_expected = |f: &&Value| {
            f["about"] == about && f["blocks"] == blocks && f["what"].as_str().unwrap().contains(what)
        };
        assert!(
            report["findings"].as_array().unwrap().iter().any(|f| is_expected(&f)),
            "{about} {what}: {report:#}"
        );
        assert!(text.out.contains(what), "{what}: {}", text.out);
    }
    let ram = report["findings"].as_array().unwrap().iter().find(|f| f["about"] == "ram").unwrap();
    assert!(ram["remedy"].as_str().unwrap().contains("command line below"), "{ram}");
    // The remedy in the error of a capture has the size in the syntax of QEMU.
    world.stencil(&["capture", socket.to_str().unwrap(), "vm:x"]).exits(5);
    qemu.qmp().run("block-job-cancel", json!({"device": "mine", "force": true})).unwrap();
    patiently("the end of the backup job", Duration::from_secs(10), || {
        (qemu.run("query-jobs") == json!([])).then_some(())
    });
    let run = world.stencil(&["capture", socket.to_str().unwrap(), "vm:x"]).exits(2);
    assert!(run.err.contains(",size=64M,mem-path="), "{}", run.err);

    // The printed line runs unchanged in a shell.
    qemu.kill();
    fs::remove_file(&socket).unwrap();
    let line = text.out.split_once("after this VM has exited:\n").unwrap().1;
    let files = line.split(['=', ',', ' ']).filter(|word| word.starts_with("/dev/shm/")).map(PathBuf::from);
    let in_shm = ShmFiles(files.collect());
    assert_eq!(in_shm.0.len(), 1, "{line}");
    let line_dir = Path::new(report["directory"].as_str().unwrap());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line}")]).current_dir(line_dir).stdin(Stdio::null());
    let mut new_vm = Running::start(&mut command, &dir.join("new_vm.log"));
    patiently("QMP", Duration::from_secs(30), || {
        let log = fs::read_to_string(dir.join("new_vm.log")).unwrap();
        assert!(new_vm.0.try_wait().unwrap().is_none(), "{log}\n{line}");
        Qmp::connect(&socket).ok().map(drop)
    });
    let report = world.json(&["capture", "--check", socket.to_str().unwrap()]);
    assert_eq!((&report["can_be_captured"], &report["findings"]), (&json!(true), &json!([])), "{report:#}");
    let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:1"]);
    assert_eq!(captured["warnings"], json!([]));
    assert_eq!(captured["files"].as_array().unwrap().iter().filter(|f| f["kind"] == "ram").count(), 1);

    // Clones start, and the alignment of their mappings allows pages of 2 MiB.
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
fn check_reports_whether_a_vm_can_be_captured() {
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
    // The check also reports a replaced RAM file.
    fs::rename(world.dir().join("ram"), world.dir().join("own")).unwrap();
    fs::write(world.dir().join("ram"), vec![0; 16 << 20]).unwrap();
    let run = world.stencil(&["capture", "--check", &socket]).exits(6);
    assert!(run.out.contains("obstacle: file: the VM does not map memory object 'ram0'"), "{}", run.out);
    assert_eq!(qemu.status(), "running");
}
