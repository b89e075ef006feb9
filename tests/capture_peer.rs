//! A QEMU that does not speak as one should, or does not run: the capture says what is the case, its memory is bounded,
//! and the guest goes on.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stencilfs::clones::qmp::Qmp;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::procfs;

use crate::support::actor::compile;
use crate::support::guest::{Qemu, ignores_shared, patiently, qemu_words};
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount};
use crate::support::passing::{Running, StandsStill};

#[test]
fn a_peer_that_floods_a_capture_does_not_hold_the_guest() {
    let _host = host::shared();
    let proxy = compile("qmp_proxy");
    // A host that is busy may take longer for the flood than an answer of QEMU may.
    for (mode, codes, words) in [
        ("flood", &[0, 75][..], ""),
        ("endless", &[1], "invalid QMP message: longer than"),
        ("deep", &[1], "invalid QMP message: "),
    ] {
        let world = TestMount::unmounted();
        let (own, through) = (world.dir().join("qmp"), world.dir().join("proxy"));
        let mut command = Command::new(&proxy);
        command.arg(mode).arg(&through).arg(&own).arg("qemu-system-x86_64");
        command.args(qemu_words(world.dir(), "16M"));
        let second = format!("unix:{}/qmp2,server=on,wait=off", world.dir().display());
        let _qemu = Running::start(command.args(["-qmp", &second]), &world.dir().join("log"));
        let mut qmp =
            patiently("QMP", Duration::from_secs(30), || Qmp::connect(&world.dir().join("qmp2")).ok());
        patiently("the first socket", Duration::from_secs(30), || own.exists().then_some(()));
        // Far less than is sent; what a capture needs is much less again.
        let mut capture = world.command_in("prlimit");
        capture.args(["--data=100663296", "--", STENCIL, "capture"]).arg(&through).arg("vm:x");
        let run = Run::of(mode.into(), &capture.output().unwrap());
        assert!(codes.contains(&run.code), "{mode}: {run:?}");
        assert!(run.err.contains(words), "{mode}: {}", run.err);
        patiently("the guest, as before", Duration::from_secs(15), || {
            (qmp.status().unwrap() == "running" && !ignores_shared(&mut qmp)).then_some(())
        });
        world.stencil(&["inspect", "vm:x"]).exits(if run.code == 0 { 0 } else { 4 });
    }
}

/// A frozen control group, which is thawed and removed when dropped.
struct Frozen {
    group: PathBuf,
    thaw: [&'static str; 2],
}

impl Frozen {
    /// Freezes a process, by a hierarchy of either version of control groups.
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
fn a_qemu_that_stands_still_is_told_as_such() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let qemu = Qemu::start(world.dir(), &qemu_words(world.dir(), "16M"));
    let pid = qemu.qmp().peer_pid().unwrap();
    let told = |words: &str, remedy: &str| {
        let begin = Instant::now();
        for more in [&[][..], &["--check"]] {
            let socket = qemu.socket();
            let mut words = vec!["capture", socket.to_str().unwrap()];
            words.extend(if more.is_empty() { &["vm:x"][..] } else { more });
            let run = world.stencil(&words).exits(75);
            assert!(run.err.contains(&format!("QEMU (process {pid}) ")), "{}", run.err);
        }
        let run = world.stencil(&["capture", qemu.socket().to_str().unwrap(), "vm:x"]).exits(75).says(words);
        assert!(run.err.contains(remedy), "{}", run.err);
        assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    };
    let process = ProcessId::of(pid).unwrap().unwrap();
    let stopped = StandsStill::stop(process);
    patiently("a stopped process", Duration::from_secs(5), || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
    });
    told("is stopped (SIGSTOP)", &format!("kill -CONT {pid}"));
    drop(stopped);

    let mut hierarchies = 0;
    for is_v2 in [true, false] {
        let Some(frozen) = Frozen::freeze(pid, is_v2) else { continue };
        hierarchies += 1;
        let [file, word] = frozen.thaw;
        let remedy = format!("echo {word} > {}", frozen.group.join(file).display());
        told("is frozen by its cgroup", &remedy);
    }
    assert!(hierarchies > 0, "control groups with a freezer");

    // Somebody else's session is told as before.
    let held = Qmp::connect(&qemu.socket()).unwrap();
    let mut capture = world.command();
    let capture =
        capture.arg("capture").arg(qemu.socket()).arg("vm:x").stderr(Stdio::piped()).spawn().unwrap();
    let run = Run::of("capture".into(), &capture.wait_with_output().unwrap()).exits(75);
    assert!(run.err.contains("end the other session"), "{}", run.err);
    drop(held);
    assert_eq!(qemu.status(), "running");
}
