//! Captures of a running QEMU: the VM is in its former state afterwards, and devices that clones cannot have are
//! refused.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;
use stencilfs::clones::recipe::device_type;

use crate::support::host;
use crate::support::mount::{TestMount, run, temporary};
use crate::support::vm::guest::{Qemu, ignores_shared, patiently, qemu_words};

#[test]
fn capture_restores_the_run_state_of_the_guest() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mut guest = Qemu::boot(world.dir());
    let socket = guest.socket();
    let socket = socket.to_str().unwrap();

    // A running guest runs again after a short pause.
    let beats = guest.heartbeats().len();
    let captured = world.json(&["capture", socket, "guest:run"]);
    assert_eq!(captured["vm"], "running");
    assert_eq!(guest.status(), "running");
    assert!(!ignores_shared(&mut guest.qmp()), "the capability x-ignore-shared was not restored");
    guest.wait_heartbeats(beats + 3);
    let pause = captured["pause_seconds"].as_f64().unwrap();
    println!("the guest was paused for {:.0} ms", pause * 1000.0);
    assert!(pause < 10.0);
    assert_eq!(captured["warnings"], json!([]));
    let names: Vec<&str> =
        captured["files"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["initrd", "kernel", "memory", "state"]);
    let recipe = world.stencil(&["inspect", "--recipe", "guest:run"]).ok().out;
    let vm_dir = world.dir().display().to_string();
    assert!(!recipe.contains(&vm_dir), "a path of the VM is in the command line of its clones: {recipe}");

    // With --pause the guest stays paused, and its RAM is equal to the template.
    let captured = world.json(&["capture", socket, "guest:still", "--pause"]);
    assert_eq!(captured["pause_seconds"], Value::Null);
    assert_ne!(guest.status(), "running");
    let beats = guest.heartbeats().len();
    let copy = world.dir().join("copy");
    world.stencil(&["export", "guest:still/memory", copy.to_str().unwrap()]).ok();
    assert!(fs::read(&copy).unwrap() == fs::read(world.dir().join("ram")).unwrap());
    let run = world.stencil(&["capture", socket, "guest:again"]).exits(2);
    assert!(run.err.contains("cont"), "{}", run.err);
    assert_eq!(guest.heartbeats().len(), beats);
    guest.run("cont");
    guest.wait_heartbeats(beats + 3);

    // A paused guest stays paused.
    guest.run("stop");
    let beats = guest.heartbeats().len();
    let captured = world.json(&["capture", socket, "guest:paused"]);
    assert_eq!(captured["pause_seconds"], Value::Null);
    std::thread::sleep(Duration::from_millis(600));
    assert!(guest.heartbeats().len() <= beats + 1, "the paused guest ran");
    guest.run("cont");
    guest.wait_heartbeats(beats + 3);

    // The guest continues if the store cannot be written.
    let blocked = world.dir().join("blocked");
    fs::write(&blocked, "not a directory").unwrap();
    world.stencil(&["--store", blocked.to_str().unwrap(), "capture", socket, "guest:x"]).exits(1);
    assert_eq!(guest.status(), "running");

    // With --quit QEMU exits.
    let captured = world.json(&["capture", socket, "guest:last", "--quit"]);
    assert_eq!(captured["vm"], "quit");
    patiently("the exit of QEMU", Duration::from_secs(10), || guest.has_ended().then_some(()));
}

#[test]
fn soak_a_killed_capture_leaves_the_guest_running() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    // A VM without a guest: the firmware runs, and part of the RAM has data.
    let guest = Qemu::start(world.dir(), &qemu_words(world.dir(), "192M"));
    let ram = vec![0x5a; 64 << 20];
    std::os::unix::fs::FileExt::write_all_at(
        &fs::OpenOptions::new().write(true).open(world.dir().join("ram")).unwrap(),
        &ram,
        100 << 20,
    )
    .unwrap();
    let rounds = host::rounds(10, 40);
    let mut completed = 0;
    for round in 0..rounds {
        let mut command = world.command();
        command.arg("capture").arg(guest.socket()).arg(format!("guest:k{round}"));
        let mut capture = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3 + round * 211 % 240));
        let _ = kill_process(Pid::from_raw(capture.id() as i32).unwrap(), Signal::KILL);
        completed += usize::from(capture.wait().unwrap().success());
        patiently("a running guest", Duration::from_secs(15), || (guest.status() == "running").then_some(()));
        patiently("the restored capability", Duration::from_secs(15), || {
            (!ignores_shared(&mut guest.qmp())).then_some(())
        });
    }
    println!("{rounds} captures, {completed} of them completed before the signal");
    // A killed capture leaves no template. The next capture works when the helper of the killed capture has restored
    // the VM's settings and closed its QMP session.
    let socket = guest.socket();
    patiently("a capture after the helper has exited", Duration::from_secs(15), || {
        let run = world.stencil(&["capture", socket.to_str().unwrap(), "guest:whole"]);
        assert!(matches!(run.code, 0 | 5), "{run:?}");
        (run.code == 0).then_some(())
    });
    world.stencil(&["verify", "guest:whole"]).ok();
}

#[test]
fn unsupported_devices_and_ram_are_refused_without_changes() {
    let _host = host::shared();
    let dir = temporary("refuse-");
    let path = dir.path().display().to_string();
    let good = qemu_words(dir.path(), "16M").join(" ");
    let ram = "-object memory-backend-file,id=ram0,size=16M";
    for (from, to, message, remedy) in [
        (
            "-accel",
            "-netdev socket,id=n0,listen=127.0.0.1:0 -device e1000e,netdev=n0 -accel",
            "-netdev socket,id=n0,listen=127.0.0.1:0: unsupported network type socket",
            "capture again",
        ),
        (
            "-accel",
            "-drive if=none,id=d0,driver=null-co,read-zeroes=on -netdev user,id=n0,tftp=/srv -accel",
            "a disk with driver=null-co,read-zeroes=on; -netdev user,id=n0,tftp=/srv: a network with tftp=/srv",
            "capture again",
        ),
        ("share=on", "share=off", "RAM of this VM", "add share=on to -object memory-backend-file,id=ram0,"),
        (
            ram,
            "-object memory-backend-memfd,id=ram0,size=16M",
            "RAM of this VM",
            "memory-backend-file,id=ram0,size=16M,mem-path=FILE,share=on",
        ),
        (
            ",memory-backend=ram0",
            ",memory-backend=ram1 -object memory-backend-ram,id=ram1,size=16M",
            "RAM of this VM",
            "replace -object memory-backend-ram,id=ram1",
        ),
        ("-accel", "-device virtio-balloon-pci,id=b -accel", "device virtio-balloon-pci (b)", ""),
    ] {
        let mut changed = good.replacen(from, to, 1);
        if to.contains("memfd") {
            changed = changed.replace(&format!(",mem-path={path}/ram"), "");
        }
        let words: Vec<String> = changed.split_ascii_whitespace().map(str::to_owned).collect();
        let qemu = Qemu::start(dir.path(), &words);
        let store = dir.path().join("store");
        let run = Command::new(crate::support::mount::STENCIL)
            .arg("--store")
            .arg(&store)
            .arg("capture")
            .arg(qemu.socket())
            .arg("x")
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{to}: {err}");
        assert!(err.contains(message) && err.contains(remedy), "{to}: {err}");
        assert_eq!(qemu.status(), "running");
        assert!(!ignores_shared(&mut qemu.qmp()));
    }
    // A block device of the host is reported together with the other obstacles.
    let image = dir.path().join("image");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let device = run("losetup", &["-f", "--show", image.to_str().unwrap()]);
    let device = device.trim();
    let more = format!(
        "-drive file={device},format=raw,if=none,id=d0 -drive file={},format=raw,snapshot=on,if=none,id=d1 -accel",
        image.display()
    );
    let words: Vec<String> =
        good.replacen("-accel", &more, 1).split_ascii_whitespace().map(str::to_owned).collect();
    let qemu = Qemu::start(dir.path(), &words);
    let done = Command::new(crate::support::mount::STENCIL)
        .args(["--store", dir.path().join("store").to_str().unwrap(), "capture"])
        .arg(qemu.socket())
        .arg("x")
        .output()
        .unwrap();
    drop(qemu);
    run("losetup", &["-d", device]);
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{err}");
    assert!(err.contains(&format!("{device} is a raw host disk")), "{err}");
    assert!(err.contains("a disk with snapshot=on"), "{err}");

    // A hot-plugged device is not on the command line.
    let port = good.replacen("-accel", "-device pcie-root-port,id=slot0 -accel", 1);
    let words: Vec<String> = port.split_ascii_whitespace().map(str::to_owned).collect();
    let qemu = Qemu::start(dir.path(), &words);
    let plugged = json!({"driver": "virtio-rng-pci", "rng": "rng0", "bus": "slot0", "id": "late"});
    qemu.qmp().run("device_add", plugged).unwrap();
    let run = Command::new(crate::support::mount::STENCIL)
        .args(["--store", dir.path().join("store").to_str().unwrap(), "capture"])
        .arg(qemu.socket())
        .arg("x")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(err.contains("plugged in or out (3 on the command line, 4 in the VM)"), "{err}");
}

#[test]
fn device_aliases_match_those_of_qemu() {
    let help = run("qemu-system-x86_64", &["-device", "help"]);
    let quoted_after = |line: &str, prefix: &str| {
        Some(line.split_once(prefix)?.1.split('"').next().unwrap_or_default().to_owned())
    };
    let aliases: Vec<_> = help
        .lines()
        .filter_map(|line| Some((quoted_after(line, "alias \"")?, quoted_after(line, "name \"")?)))
        .collect();
    assert!(aliases.len() > 10, "{help}");
    for (alias, name) in &aliases {
        assert_eq!(device_type(alias), name, "{alias}");
        assert_eq!(device_type(name), name, "{name} is a type, not an alias");
    }
}

#[test]
fn capture_reports_a_missing_vm_and_missing_identity_devices() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.stencil(&["capture", "/nonexistent/qmp", "x"]).exits(4).says("cannot connect to the QMP socket");
    let file = world.dir().join("file");
    fs::write(&file, "x").unwrap();
    world.stencil(&["capture", file.to_str().unwrap(), "x"]).exits(1);
    // A VM without vmgenid and virtio-rng is captured with a warning.
    let words = qemu_words(world.dir(), "16M").join(" ");
    let bare = words.replace("-device vmgenid,guid=auto", "").replace("-device virtio-rng-pci,rng=rng0", "");
    let bare: Vec<String> = bare.split_ascii_whitespace().map(str::to_owned).collect();
    let qemu = Qemu::start(world.dir(), &bare);
    // The only session of the socket was in use a moment ago: the capture must neither hang nor fail.
    let held = Qmp::connect(&qemu.socket()).unwrap();
    drop(held);
    let captured = world.json(&["capture", qemu.socket().to_str().unwrap(), "bare"]);
    let warnings = captured["warnings"].to_string();
    assert!(warnings.contains("vmgenid") && warnings.contains("virtio-rng"), "{warnings}");
}
