//! Captures that are interrupted, or whose VM is resumed, near their end: a helper completes the commit of the disk,
//! and a complete template stays.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::capture::failures::{DiskOption, Vm};
use crate::support::host;
use crate::support::vm::guest::{ignores_shared, media, overlays, patiently};

#[test]
fn an_interrupted_commit_of_a_leftover_overlay_completes() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    for signal in [Signal::INT, Signal::KILL] {
        let capture = vm.stop_capture_at(&[], |vm| vm.runs_on_overlay() && !ignores_shared(&mut vm.qmp));
        for _ in 0..8 {
            vm.write();
        }
        vm.kill_helper();
        capture.kill();
        // The state after a capture that was killed during its commit; the job makes almost no progress.
        let nodes = media(&mut vm.qmp).to_string();
        let node = nodes.split('"').find(|word| word.starts_with("stencil-")).unwrap();
        let id = format!("commit-{node}");
        let job =
            json!({"job-id": id, "device": node, "auto-finalize": false, "auto-dismiss": false, "speed": 1});
        vm.qmp.run("block-commit", job).unwrap();

        let log = fs::File::create(vm.log()).unwrap();
        let mut child = vm.capture(&[]).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        patiently("the warning of the capture", Duration::from_secs(10), || {
            fs::read_to_string(vm.log()).unwrap().contains("was left by an earlier capture").then_some(())
        });
        patiently("a helper", Duration::from_secs(10), || (!vm.helpers().is_empty()).then_some(()));
        // The helper gets its instructions from the capture.
        std::thread::sleep(Duration::from_millis(200));
        kill_process(Pid::from_child(&child), signal).unwrap();
        let start = Instant::now();
        let status = child.wait().unwrap();
        assert!(start.elapsed() < Duration::from_secs(10));
        let log_text = fs::read_to_string(vm.log()).unwrap();
        assert!(
            signal == Signal::KILL
                || status.code() == Some(1) && log_text.contains("interrupted during the commit"),
            "{log_text}"
        );
        vm.qmp.run("block-job-set-speed", json!({"device": id, "speed": 0})).unwrap();
        vm.wait_restored();
    }
    vm.quit();
}

#[test]
fn the_helper_completes_an_interrupted_commit() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    // A paused job does not complete; a commit that completes first is repeated.
    let paused = (0..20).find_map(|_| {
        let mut capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
        vm.write();
        capture.resume();
        while capture.child.try_wait().unwrap().is_none() {
            let jobs = vm.qmp.run("query-jobs", json!({})).unwrap();
            let Some(id) = jobs[0]["id"].as_str() else { continue };
            if vm.qmp.run("job-pause", json!({"id": id})).is_ok() {
                return Some((capture, id.to_owned()));
            }
        }
        None
    });
    let (capture, id) = paused.expect("no commit could be paused in 20 captures");
    std::thread::sleep(Duration::from_millis(100));
    vm.write();
    let start = Instant::now();
    kill_process(capture.pid(), Signal::INT).unwrap();
    let run = capture.finish().exits(1);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(run.err.contains("interrupted during the commit"), "{}", run.err);
    vm.world.stencil(&["verify", "vm:x"]).ok();
    let _ = vm.qmp.run("job-resume", json!({"id": id}));
    vm.wait_restored();
    vm.quit();
}

#[test]
fn resuming_the_vm_after_its_ram_is_read_keeps_the_template() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let capture = vm.stop_capture_at(&["--pause"], Vm::state_is_written);
    // The capture takes this lock after it has read everything.
    let lock_path = vm.world.store_dir().join("locks/names");
    vm.world.stencil(&["rm", "vm:x"]);
    let lock = fs::File::options().create(true).append(true).open(&lock_path).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let pid = capture.child.id();
    capture.resume();
    patiently("an open lock file", Duration::from_secs(30), || {
        let mut fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        fds.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file == lock_path)).then_some(())
    });
    vm.qmp.run("cont", json!({})).unwrap();
    flock(&lock, FlockOperation::Unlock).unwrap();
    capture.finish().exits(0);
    vm.world.stencil(&["verify", "vm:x"]).ok();
    vm.wait_restored();
    vm.quit();
}

/// The image may be in use for a moment by the qemu-img of a killed capture.
#[test]
fn the_overlay_of_an_exited_vm_waits_for_a_busy_image() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
    vm.write();
    vm.write();
    vm.qmp.run("quit", json!({})).unwrap();
    patiently("the exit of QEMU", Duration::from_secs(10), || vm.qemu.has_ended().then_some(()));
    let mut holder = Command::new("qemu-io");
    holder.args(["-f", "qcow2"]).arg(vm.image()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    // qemu-io answers once it has opened the image.
    writeln!(holder.stdin.as_mut().unwrap(), "length").unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    capture.kill();
    std::thread::sleep(Duration::from_secs(1));
    assert!(holder.try_wait().unwrap().is_none());
    assert_eq!(overlays(&vm.dir()).len(), 1);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    patiently("the removal of the overlay", Duration::from_secs(20), || {
        overlays(&vm.dir()).is_empty().then_some(())
    });
    vm.assert_image_has_all_writes();
}
