//! A QMP peer that sends invalid or endless output, and a QEMU that is stopped: the capture reports the cause, its
//! memory is bounded, and the guest continues.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stencilfs::clones::qmp::Qmp;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::procfs;

use crate::support::actor::compile;
use crate::support::daemon::passing::{Running, StoppedProcess};
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount};
use crate::support::vm::guest::{Qemu, ignores_shared, patiently, qemu_words};

#[test]
fn invalid_or_endless_qmp_output_does_not_block_the_guest() {
    let _host = host::shared();
    let proxy = compile("qmp_proxy");
    // On a busy host the flood may last longer than the timeout for a reply of QEMU.
    for (mode, codes, message) in [
        ("flood", &[0, 75][..], ""),
        ("endless", &[1], "invalid QMP message: longer than"),
        ("deep", &[1], "invalid QMP message: "),
    ] {
        let world = TestMount::unmounted();
        let (qemu_socket, proxy_socket) = (world.dir().join("qmp"), world.dir().join("proxy"));
        let mut command = Command::new(&proxy);
        command.arg(mode).arg(&proxy_socket).arg(&qemu_socket).arg("qemu-system-x86_64");
        command.args(qemu_words(world.dir(), "16M"));
        let second = format!("unix:{}/qmp2,server=on,wait=off", world.dir().display());
        let _qemu = Running::start(command.args(["-qmp", &second]), &world.dir().join("log"));
        let mut qmp =
            patiently("QMP", Duration::from_secs(30), || Qmp::connect(&world.dir().join("qmp2")).ok());
        patiently("the first socket", Duration::from_secs(30), || qemu_socket.exists().then_some(()));
        // A limit of 96 MiB: far less than the proxy sends, and far more than a capture needs.
        let mut capture = world.command_in("prlimit");
        capture.args(["--data=100663296", "--", STENCIL, "capture"]).arg(&proxy_socket).arg("vm:x");
        let run = Run::of(mode.into(), &capture.output().unwrap());
        assert!(codes.contains(&run.code), "{mode}: {run:?}");
        assert!(run.err.contains(message), "{mode}: {}", run.err);
        patiently("a running guest with its own settings", Duration::from_secs(15), || {
            (qmp.status().unwrap() == "running" && !ignores_shared(&mut qmp)).then_some(())
        });
        world.stencil(&["inspect", "vm:x"]).exits(if run.code == 0 { 0 } else { 4 });
    }
}

/// A frozen control group; thawed and removed on drop.
struct Frozen {
    group: PathBuf,
    thaw: [&'static str; 2],
}

impl Frozen {
    /// Freezes a process by a control group of version 1 or 2. Returns `None` if that hierarchy is not mounted.
    fn freeze(pid: u32, is_v2: bool) -> Option<Frozen> {
        let mounts = procfs::mounts().unwrap();
        let root = mounts.iter().find(|mount| match is_v2 {
            true => mount.fs_type == "cgroup2",
            false => mount.fs_type == "cgroup" && mount.super_options.split(',').any(|o| o == "freezer"),
        })?;
        let group = root.mountpoint.join(format!("stencil-test-{pid}"));
        fs::create_dir(&group).unwrap();
        let (freeze, thaw) = match is_v2 {
            true => (["cgroup.freeze", "1"], ["cgroup.freeze", "0"]),
            false => (["freezer.state", "FROZEN"], ["freezer.state", "THAWED"]),
        };
        fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
        fs::write(group.join(freeze[0]), freeze[1]).unwrap();
        let (file, line) = if is_v2 { ("cgroup.events", "frozen 1") } else { ("freezer.state", "FROZEN") };
        patiently("a frozen group", Duration::from_secs(5), || {
            fs::read_to_string(group.join(file)).unwrap().contains(line).then_some(())
        });
        Some(Frozen { group, thaw })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.group.join(self.thaw[0]), self.thaw[1]);
        for pid in fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(self.group.parent().unwrap().join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.group);
    }
}

#[test]
fn capture_reports_a_stopped_or_frozen_qemu() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let qemu = Qemu::start(world.dir(), &qemu_words(world.dir(), "16M"));
    let pid = qemu.qmp().peer_pid().unwrap();
    let assert_reported = |message: &str, remedy: &str| {
        let start = Instant::now();
        for option in [&[][..], &["--check"]] {
            let socket = qemu.socket();
            let mut args = vec!["capture", socket.to_str().unwrap()];
            args.extend(if option.is_empty() { &["vm:x"][..] } else { option });
            let run = world.stencil(&args).exits(75);
            assert!(run.err.contains(&format!("QEMU (process {pid}) ")), "{}", run.err);
        }
        let run =
            world.stencil(&["capture", qemu.socket().to_str().unwrap(), "vm:x"]).exits(75).says(message);
        assert!(run.err.contains(remedy), "{}", run.err);
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    };
    let process = ProcessId::of(pid).unwrap().unwrap();
    let stopped = StoppedProcess::stop(process);
    patiently("a stopped process", Duration::from_secs(5), || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
    });
    assert_reported("is stopped by a signal", &format!("kill -CONT {pid}"));
    drop(stopped);

    let mut hierarchies = 0;
    for is_v2 in [true, false] {
        let Some(frozen) = Frozen::freeze(pid, is_v2) else { continue };
        hierarchies += 1;
        let [file, value] = frozen.thaw;
        let remedy = format!("echo {value} > {}", frozen.group.join(file).display());
        assert_reported("is frozen by its cgroup", &remedy);
    }
    assert!(hierarchies > 0, "no control group hierarchy has a freezer");

    // A QMP session of another client is reported as such.
    let held = Qmp::connect(&qemu.socket()).unwrap();
    let mut capture = world.command();
    let capture =
        capture.arg("capture").arg(qemu.socket()).arg("vm:x").stderr(Stdio::piped()).spawn().unwrap();
    let run = Run::of("capture".into(), &capture.wait_with_output().unwrap()).exits(75);
    assert!(run.err.contains("end the other session"), "{}", run.err);
    drop(held);
    assert_eq!(qemu.status(), "running");
}
