//! Captures that others meddle with towards their end: a helper has the VM, or the template stands.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::capture_failures::{Plug, Vm};
use crate::support::guest::{ignores_shared, media, overlays, patiently};
use crate::support::host;

#[test]
fn a_left_over_disk_has_a_helper_too() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    for signal in [Signal::INT, Signal::KILL] {
        let capture = vm.caught(&[], |vm| vm.disk_is_read() && !ignores_shared(&mut vm.qmp));
        for _ in 0..8 {
            vm.write();
        }
        vm.kill_helper();
        capture.killed();
        // As if that had been killed in its commit, which goes on slowly.
        let nodes = media(&mut vm.qmp).to_string();
        let node = nodes.split('"').find(|word| word.starts_with("stencil-")).unwrap();
        let id = format!("commit-{node}");
        let job =
            json!({"job-id": id, "device": node, "auto-finalize": false, "auto-dismiss": false, "speed": 1});
        vm.qmp.run("block-commit", job).unwrap();

        let log = fs::File::create(vm.log()).unwrap();
        let mut child = vm.capture(&[]).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        patiently("the capture's words", Duration::from_secs(10), || {
            fs::read_to_string(vm.log()).unwrap().contains("was left by an earlier capture").then_some(())
        });
        patiently("a helper", Duration::from_secs(10), || (!vm.helpers().is_empty()).then_some(()));
        // It has been told what it is to do.
        std::thread::sleep(Duration::from_millis(200));
        kill_process(Pid::from_child(&child), signal).unwrap();
        let begin = Instant::now();
        let status = child.wait().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(10));
        let said = fs::read_to_string(vm.log()).unwrap();
        assert!(
            signal == Signal::KILL
                || status.code() == Some(1) && said.contains("interrupted during the commit"),
            "{said}"
        );
        vm.qmp.run("block-job-set-speed", json!({"device": id, "speed": 0})).unwrap();
        vm.is_as_before();
    }
    vm.end();
}

#[test]
fn a_commit_that_is_interrupted_is_the_helpers() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    // A job that somebody holds back does not come to its end; a commit that was faster is made again.
    let held = (0..20).find_map(|_| {
        let mut capture = vm.caught(&[], Vm::disk_is_read);
        vm.write();
        capture.go_on();
        while capture.child.try_wait().unwrap().is_none() {
            let jobs = vm.qmp.run("query-jobs", json!({})).unwrap();
            let Some(id) = jobs[0]["id"].as_str() else { continue };
            if vm.qmp.run("job-pause", json!({"id": id})).is_ok() {
                return Some((capture, id.to_owned()));
            }
        }
        None
    });
    let (capture, id) = held.expect("a commit that can be held back");
    std::thread::sleep(Duration::from_millis(100));
    vm.write();
    let begin = Instant::now();
    kill_process(capture.pid(), Signal::INT).unwrap();
    let run = capture.goes_on().exits(1);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(run.err.contains("interrupted during the commit"), "{}", run.err);
    vm.world.stencil(&["verify", "vm:x"]).ok();
    let _ = vm.qmp.run("job-resume", json!({"id": id}));
    vm.is_as_before();
    vm.end();
}

#[test]
fn who_lets_a_vm_run_that_was_read_does_not_undo_its_template() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let capture = vm.caught(&["--pause"], Vm::is_read);
    // It has read all that it reads when it comes to this lock.
    let place = vm.world.store_dir().join("locks/names");
    vm.world.stencil(&["rm", "vm:x"]);
    let lock = fs::File::options().create(true).append(true).open(&place).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let pid = capture.child.id();
    capture.go_on();
    patiently("commit", Duration::from_secs(30), || {
        let mut open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        open.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file == place)).then_some(())
    });
    vm.qmp.run("cont", json!({})).unwrap();
    flock(&lock, FlockOperation::Unlock).unwrap();
    capture.goes_on().exits(0);
    vm.world.stencil(&["verify", "vm:x"]).ok();
    vm.is_as_before();
    vm.end();
}

/// As the qemu-img of a killed capture, which may take a moment to go.
#[test]
fn an_image_that_somebody_has_for_a_moment_gets_what_its_dead_vm_wrote() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let capture = vm.caught(&[], Vm::disk_is_read);
    vm.write();
    vm.write();
    vm.qmp.run("quit", json!({})).unwrap();
    patiently("end of QEMU", Duration::from_secs(10), || vm.qemu.has_ended().then_some(()));
    let mut holder = Command::new("qemu-io");
    holder.args(["-f", "qcow2"]).arg(vm.image()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    // It answers when it has the image.
    writeln!(holder.stdin.as_mut().unwrap(), "length").unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    capture.killed();
    std::thread::sleep(Duration::from_secs(1));
    assert!(holder.try_wait().unwrap().is_none());
    assert_eq!(overlays(&vm.folder()).len(), 1);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    patiently("the overlay's end", Duration::from_secs(20), || {
        overlays(&vm.folder()).is_empty().then_some(())
    });
    vm.is_all_in_image();
}
