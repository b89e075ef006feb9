//! `stencil capture` of a real Firecracker.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use serde_json::{Value, json};
use stencilfs::clones::vmm_api::{Api, Server};
use stencilfs::sys::process::ProcessId;

use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::{TestMount, run, temporary, wait_for};
use crate::support::vm::firecracker::{Firecracker, MEMORY_MIB, program};
use crate::vmm::firecracker_guests::{Clone, boot, dirty, import_snapshot, launch};

/// Returns the state of a VM: `running`, `paused` or `not started`.
fn state(socket: &Path) -> String {
    Api::connect(Server::Firecracker, socket).unwrap().state().unwrap()
}

fn capture(world: &TestMount, socket: &Path, more: &[&str]) -> Value {
    world.json(&[&["capture", socket.to_str().unwrap()], more].concat())
}

/// Returns the memory in a template.
fn memory(world: &TestMount, tag: &str) -> Vec<u8> {
    let out = world.dir().join("exported");
    world.stencil(&["export", &format!("{tag}/memory"), out.to_str().unwrap(), "--force"]).ok();
    fs::read(out).unwrap()
}

/// Launches one clone in a jail.
fn launch_in_jail(world: &TestMount) -> Clone {
    let jailer = program("jailer").display().to_string();
    let base = world.dir().join("jails").display().to_string();
    world.stencil(&["chown", "123:123", "fc:1"]).ok();
    launch(world, 1, &["--jailer", &jailer, "--uid", "123", "--gid", "123", "--chroot-base-dir", &base])
        .remove(0)
}

/// Returns the temporary files that a capture has created in the working directory of a process.
fn temporary_files(pid: u64) -> Vec<PathBuf> {
    let names = fs::read_dir(format!("/proc/{pid}/cwd")).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"stencil-")).collect()
}

#[test]
fn a_captured_vm_runs_on_or_stays_paused_and_its_template_has_its_memory() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let mut source = boot(&world, &[]);
    let socket = source.socket();

    let captured = capture(&world, &socket, &["fc:1"]);
    assert_eq!(captured["vm"], "running", "{captured:#}");
    assert!(captured["pause_seconds"].as_f64().unwrap() > 0.0, "{captured:#}");
    assert!(captured["state_bytes"].as_u64().unwrap() > 1000, "{captured:#}");
    let warnings = captured["warnings"].as_array().unwrap();
    assert!(
        warnings.len() == 1 && warnings[0].as_str().unwrap().contains("the next diff snapshot"),
        "{warnings:?}"
    );
    assert_eq!((state(&socket).as_str(), source.serial.ask('w').as_str()), ("running", "W"));
    let mut clone = launch(&world, 1, &[]).remove(0);
    assert_eq!(clone.serial.ask('a'), "K");

    // The memory of a paused VM equals that of Firecracker's own snapshot, and differs from the first capture.
    let first = memory(&world, "fc:1");
    let captured = capture(&world, &socket, &["fc:2", "--pause"]);
    assert_eq!((&captured["vm"], &captured["pause_seconds"]), (&json!("paused"), &Value::Null));
    assert_eq!(state(&socket), "paused");
    let [own, diff] = ["own", "diff"].map(|name| world.dir().join(name));
    for directory in [&own, &diff] {
        fs::create_dir(directory).unwrap();
    }
    source.snapshot("Full", &own);
    let expected = fs::read(own.join("memory")).unwrap();
    assert_eq!(expected.len() as u64, MEMORY_MIB << 20);
    assert!(memory(&world, "fc:2") == expected && expected != first);
    let captured = capture(&world, &socket, &["fc:3"]);
    assert_eq!((&captured["vm"], &captured["pause_seconds"]), (&json!("paused"), &Value::Null));
    assert!(memory(&world, "fc:3") == expected);
    source.resume();
    assert_eq!((source.serial.ask('a'), source.serial.ask('z')), ("K".to_owned(), "Z".to_owned()));

    // The next diff fits on top of the captured template.
    source.snapshot("Diff", &diff);
    source.snapshot("Full", &own);
    world.stencil(&["import", diff.to_str().unwrap(), "fc:diff", "--base", "fc:3"]).ok();
    assert!(memory(&world, "fc:diff") == fs::read(own.join("memory")).unwrap());
    source.resume();
    let captured = capture(&world, &socket, &["fc:4", "--quit"]);
    assert_eq!(captured["vm"], "quit", "{captured:#}");
    assert!(Api::connect(Server::Firecracker, &socket).is_err(), "Firecracker still runs");
}

#[test]
fn a_captured_clone_stores_only_its_changed_pages_in_a_jail_too() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    for (mut clone, tag) in [(launch(&world, 1, &[]).remove(0), "fc:2"), (launch_in_jail(&world), "fc:3")] {
        assert_eq!(clone.serial.ask('w'), "W");
        let captured = capture(&world, &clone.dir.join("api.sock"), &[tag, "--pause"]);
        let changed = dirty(&world, clone.pid);
        let stored = captured["stored_bytes"].as_u64().unwrap();
        println!("{tag}: {changed} pages changed, {stored} bytes stored");
        let limit = changed * 4096 + captured["state_bytes"].as_u64().unwrap() + 8192;
        assert!(stored > 0 && stored <= limit, "{tag}: {changed} pages changed, {captured:#}");
        assert_eq!(temporary_files(clone.pid), [] as [PathBuf; 0]);
    }
    let mut again = launch(&world, 1, &[]).remove(0);
    assert_eq!(again.serial.ask('a'), "K");
    world.stencil(&["stop", "--all"]).ok();
}

/// Starts a capture, and stops the capture while Firecracker writes the memory to a file.
fn stopped_in_snapshot(world: &TestMount, socket: &Path, firecracker: u64) -> Child {
    let is_partly_written = |path: PathBuf| {
        let meta = fs::metadata(path);
        meta.is_ok_and(|meta| meta.len() == MEMORY_MIB << 20 && meta.blocks() * 512 < meta.len())
    };
    loop {
        let mut command = world.command();
        command.args(["capture", socket.to_str().unwrap(), "fc:2"]);
        let mut capture = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let is_writing = wait_for("a file of the snapshot", || {
            let fds = fs::read_dir(format!("/proc/{}/fd", capture.id())).into_iter().flatten().flatten();
            let unnamed = fds.map(|fd| fd.path()).filter(|path| {
                let is_unnamed = |link: PathBuf| link.to_string_lossy().ends_with(" (deleted)");
                fs::read_link(path).is_ok_and(|link| link.starts_with(world.store_dir()) && is_unnamed(link))
            });
            if unnamed.chain(temporary_files(firecracker)).any(is_partly_written) {
                return Some(true);
            }
            let status = capture.try_wait().unwrap()?;
            assert!(status.success(), "the capture has failed: {status}");
            Some(false)
        });
        if is_writing {
            assert!(ProcessId::of(capture.id()).unwrap().unwrap().signal(Signal::STOP).unwrap());
            return capture;
        }
        // The capture was faster than this thread.
        world.stencil(&["rm", "fc:2"]).ok();
    }
}

/// Waits until no process has locked the VM for a capture, so that the helper of a killed capture has exited.
fn wait_for_the_helper(world: &TestMount, socket: &Path) {
    let words = ["capture", socket.to_str().unwrap(), "--check"];
    wait_for("the end of the helper", || (world.stencil(&words).code == 0).then_some(()));
}

#[test]
fn soak_a_killed_capture_leaves_the_vm_running_and_no_file() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    for mut clone in [launch(&world, 1, &[]).remove(0), launch_in_jail(&world)] {
        let socket = clone.dir.join("api.sock");
        for round in 0..host::rounds(3, 20) {
            let mut capture = stopped_in_snapshot(&world, &socket, clone.pid);
            capture.kill().unwrap();
            assert!(!capture.wait().unwrap().success(), "round {round}");
            wait_for_the_helper(&world, &socket);
            assert_eq!(state(&socket), "running", "round {round}");
            assert_eq!(temporary_files(clone.pid), [] as [PathBuf; 0]);
            assert_eq!(clone.serial.ask('r'), "K", "round {round}");
        }
    }
    assert_eq!(world.json(&["ls"])["templates"].as_array().unwrap().len(), 1);
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn a_vm_that_its_owner_has_paused_stays_paused_when_a_capture_is_killed() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let source = boot(&world, &[]);
    source.run("PATCH /vm", json!({"state": "Paused"}));
    let mut capture = stopped_in_snapshot(&world, &source.socket(), source.pid().into());
    capture.kill().unwrap();
    assert!(!capture.wait().unwrap().success());
    wait_for_the_helper(&world, &source.socket());
    assert_eq!(state(&source.socket()), "paused");
}

#[test]
fn a_vm_that_dies_during_its_capture_leaves_no_file_in_its_jail() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    let clone = launch_in_jail(&world);
    let directory = File::open(format!("/proc/{}/cwd", clone.pid)).unwrap();
    let process = ProcessId::of(clone.pid as u32).unwrap().unwrap();
    let mut capture = stopped_in_snapshot(&world, &clone.dir.join("api.sock"), clone.pid);
    process.signal(Signal::KILL).unwrap();
    assert!(ProcessId::of(capture.id()).unwrap().unwrap().signal(Signal::CONT).unwrap());
    assert!(!capture.wait().unwrap().success());
    let jail = format!("/proc/self/fd/{}", directory.as_raw_fd());
    wait_for("the removal of the temporary files", || {
        let names = fs::read_dir(&jail).unwrap().map(|entry| entry.unwrap().file_name());
        let left = names.filter(|name| name.as_encoded_bytes().starts_with(b"stencil-")).count();
        (left == 0).then_some(())
    });
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn root_creates_files_for_a_capture_only_in_a_directory_of_the_user() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    let clone = launch_in_jail(&world);
    let socket = clone.dir.join("api.sock").display().to_string();
    // The same directory, as if the user of the jail had changed to a directory of root.
    let directory = File::open(format!("/proc/{}/cwd", clone.pid)).unwrap();
    fchown(&directory, Some(0), Some(0)).unwrap();
    world.stencil(&["capture", &socket, "fc:2"]).exits(2).says("is not a writable directory of its user 123");
    assert_eq!((state(Path::new(&socket)).as_str(), temporary_files(clone.pid).len()), ("running", 0));
    fchown(&directory, Some(123), Some(123)).unwrap();
    world.stencil(&["capture", &socket, "fc:2"]).ok();
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn a_writable_disk_needs_a_paused_vm() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = world.dir().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let drive = |id: &str, read_only: bool| {
        let body = json!({
            "drive_id": id, "path_on_host": disk, "is_root_device": false, "is_read_only": read_only,
        });
        (format!("PUT /drives/{id}"), body)
    };
    let drives = [drive("base", true), drive("data", false)];
    let drives: Vec<(&str, Value)> = drives.iter().map(|(put, body)| (put.as_str(), body.clone())).collect();
    let mut source = boot(&world, &drives);
    let socket = source.socket().display().to_string();

    let run = world.stencil(&["--json", "capture", &socket, "--check"]).exits(6);
    let check: Value = serde_json::from_str(&run.out).unwrap();
    let findings = check["findings"].as_array().unwrap().iter();
    let disks = findings.filter(|finding| finding["about"] == "disk").map(|finding| &finding["blocks"]);
    assert_eq!(disks.collect::<Vec<_>>(), [false, true], "{check:#}");
    world.stencil(&["capture", &socket, "fc:1"]).exits(2).says("disk 'data'");
    assert_eq!((state(&source.socket()).as_str(), source.serial.ask('r').as_str()), ("running", "K"));
    let captured = capture(&world, &source.socket(), &["fc:1", "--pause"]);
    let warnings = captured["warnings"].to_string();
    for words in ["disk 'base'", "keep the disk", "disk 'data'", "copy the disk before a VM writes to it"] {
        assert!(warnings.contains(words), "{warnings}");
    }
}

#[test]
fn a_vm_that_cannot_be_captured_is_as_before() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let directory = world.dir().join("idle");
    fs::create_dir(&directory).unwrap();
    let idle = Firecracker::start(&directory);
    let socket = idle.socket().display().to_string();
    world.stencil(&["capture", &socket, "fc:1"]).exits(2).says("the VM is in state 'not started'");

    // The snapshot does not fit into the file system of the store.
    let small = temporary("small-");
    mount("none", small.path(), "tmpfs", MountFlags::empty(), Some(c"size=64M")).unwrap();
    let _mounted = Mounted(small.path().to_owned());
    let store = small.path().join("store").display().to_string();
    let mut source = boot(&world, &[]);
    let socket = source.socket().display().to_string();
    world.stencil(&["--store", &store, "capture", &socket, "fc:1"]).exits(1).says("the snapshot needs");
    // Firecracker would be killed for a file beyond its limit.
    let limited = [("--fsize=64000000:", 6), ("--fsize=unlimited:", 0)];
    for (limit, code) in limited {
        run("prlimit", &["--pid", &source.pid().to_string(), limit]);
        world.stencil(&["capture", &socket, "--check"]).exits(code);
    }
    assert_eq!((state(&source.socket()).as_str(), source.serial.ask('r').as_str()), ("running", "K"));
    let listed = world.stencil(&["--store", &store, "ls", "--json"]).ok();
    assert_eq!(serde_json::from_str::<Value>(&listed.out).unwrap()["templates"], json!([]));
}
