//! The scripts that `make` runs: the demo, the setup, the guard against leftovers and the runner of
//! unit tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::host;
use crate::support::mount::{STENCIL, daemon, temporary};
use crate::support::vm::guest::patiently;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Numbers of QEMU clones and simulated clones. `make soak` uses the numbers of `make demo`.
fn clones() -> (u32, u32) {
    host::rounds((2, 40), (6, 200))
}

/// The demo with the binaries of this build, in its own temporary directory.
fn demo(dir: &Path, (qemus, simulated): (u32, u32)) -> Command {
    daemon();
    let mut command = Command::new(script("demo.sh"));
    command
        .env("STENCIL_DEMO_QEMUS", qemus.to_string())
        .env("STENCIL_DEMO_SIMULATED", simulated.to_string())
        .env("STENCIL_BIN_DIR", Path::new(STENCIL).parent().unwrap())
        .env("TMPDIR", dir)
        .env_remove("STENCIL_STORE")
        .env_remove("STENCIL_RUNTIME_DIR")
        .stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Command lines of all processes whose environment has this directory as TMPDIR.
fn processes_in(dir: &Path) -> Vec<String> {
    let wanted = format!("TMPDIR={}", dir.display());
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()))
        .filter(|pid| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|b| *b == 0).any(|word| word == wanted.as_bytes())
        })
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " "))
        .collect()
}

#[track_caller]
fn assert_nothing_is_left(dir: &Path) {
    assert_eq!(processes_in(dir), Vec::<String>::new());
    let left: Vec<_> = fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
}

#[test]
fn soak_demo_reports_sharing_and_leaves_nothing_behind() {
    let _host = host::shared();
    let dir = temporary("demo-");
    let started = Instant::now();
    let (qemus, simulated) = clones();
    let output = demo(dir.path(), clones()).output().unwrap();
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    for message in [
        &format!("memory of {} clones", qemus + simulated),
        "= host memory",
        "sharing ratio",
        "audit",
        "and in the store",
        "on its disk: ",
        "the base image of their disks: before, while all wrote, and after",
        &format!("{} clones stopped", qemus + simulated),
        "Done",
    ] {
        assert!(printed.contains(message), "no '{message}' in {printed}");
    }
    // The clones run while they are measured: a figure that changed during the audit is not a wrong figure.
    assert!(!printed.contains("wrong: off by"), "{printed}");
    let limit = Duration::from_secs(host::rounds(240, 600));
    assert!(started.elapsed() < limit, "{:?}", started.elapsed());
    assert_nothing_is_left(dir.path());
}

#[test]
fn soak_interrupted_demo_leaves_nothing_behind() {
    let _host = host::shared();
    let moments: &[&str] = host::rounds(
        &["A Linux guest boots"],
        &["becomes a template", "QEMU clones resume", "simulated clones map it", "What they cost"],
    );
    for moment in moments {
        let dir = temporary("demo-");
        let log = dir.path().with_extension("log");
        let mut child = demo(dir.path(), clones())
            .stdout(fs::File::create(&log).unwrap())
            .stderr(fs::File::options().append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        patiently(&format!("'{moment}' in the output of the demo"), Duration::from_secs(600), || {
            let said = fs::read_to_string(&log).unwrap();
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none() || said.contains(moment),
                "the demo exited ({ended:?}) before it printed '{moment}': {said}"
            );
            said.contains(moment).then_some(())
        });
        std::thread::sleep(Duration::from_millis(300));
        kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(143), "{moment}");
        fs::remove_file(&log).unwrap();
        assert_nothing_is_left(dir.path());
    }
}

#[test]
fn demo_and_setup_reject_an_older_kernel() {
    let dir = temporary("demo-");
    for (mut command, script) in
        [(demo(dir.path(), (1, 1)), "demo"), (Command::new(script("support/setup.sh")), "setup")]
    {
        let started = Instant::now();
        let output = command.env("STENCIL_TEST_KERNEL_RELEASE", "6.1.0-37-amd64").output().unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{script}: {:?}", started.elapsed());
        assert_eq!(output.status.code(), Some(1), "{script}");
        let printed = text(&output);
        assert!(
            printed.contains("kernel 6.1.0-37-amd64: Linux 6.9 or newer is needed"),
            "{script}: {printed}"
        );
    }
    assert_nothing_is_left(dir.path());
}

#[test]
fn setup_explains_missing_cargo_and_unsupported_systems() {
    let dir = temporary("setup-");
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for tool in ["bash", "id", "uname", "dirname", "sed"] {
        let place =
            ["/usr/bin", "/bin"].map(|d| Path::new(d).join(tool)).into_iter().find(|p| p.exists()).unwrap();
        std::os::unix::fs::symlink(place, bin.join(tool)).unwrap();
    }
    let output = Command::new(script("support/setup.sh"))
        .env("PATH", &bin)
        .env("HOME", dir.path())
        .env_remove("CARGO_HOME")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("cargo: install Rust 1.88 or newer with rustup"), "{}", text(&output));

    let release = dir.path().join("os-release");
    fs::write(&release, "ID=fedora\nVERSION_CODENAME=\n").unwrap();
    let output = Command::new(script("support/setup.sh"))
        .env("STENCIL_TEST_OS_RELEASE", &release)
        .env("CARGO_TARGET_DIR", dir.path().join("target"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let printed = text(&output);
    assert!(printed.contains("this is fedora/") && printed.contains("vmlinuz"), "{printed}");
}

#[test]
fn guard_reports_and_clears_leftovers() {
    let _host = host::shared();
    let dir = temporary("guard-");
    let guard = |line: &str| {
        let mut command = Command::new(script("support/guard.sh"));
        command
            .args(["bash", "-c", line])
            .env("TMPDIR", dir.path())
            .env("CARGO_TARGET_DIR", dir.path().join("target"));
        command.output().unwrap()
    };
    assert_eq!(guard("exit 7").status.code(), Some(7));
    assert_eq!(guard("true").status.code(), Some(0), "no leftovers, no error");
    let output =
        guard("touch $TMPDIR/file; mkdir $TMPDIR/m; mount -t tmpfs none $TMPDIR/m; setsid sleep 1000 &");
    assert_eq!(output.status.code(), Some(1));
    let printed = text(&output);
    for message in ["sleep 1000", "tmpfs mount ", "/file", "have been cleared"] {
        assert!(printed.contains(message), "no '{message}' in {printed}");
    }
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.path().to_str().unwrap()));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["target"]);
}

#[test]
fn guard_resolves_a_relative_target_dir_and_waits_its_turn() {
    let _host = host::shared();
    let dir = temporary("guard-");
    let guard = |line: &str| {
        let mut command = Command::new(script("support/guard.sh"));
        command.args(["bash", "-c", line]).current_dir(dir.path()).env("TMPDIR", dir.path());
        command.env("CARGO_TARGET_DIR", "here").stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let marker = dir.path().join("began");
    let mut first = guard("touch here/tmp/first began; sleep 1; rm here/tmp/first began").spawn().unwrap();
    patiently("the start of the first run", Duration::from_secs(10), || marker.exists().then_some(()));
    let second = guard("ls here/tmp; mkdir here/tmp/m; mount -t tmpfs none here/tmp/m").output().unwrap();
    assert!(
        first.wait().unwrap().success(),
        "the guard of the second run must not report or clear files of the first run"
    );
    let printed = text(&second);
    assert!(printed.contains("another run uses") && !printed.contains("first"), "{printed}");
    assert!(printed.contains("tmpfs mount ") && second.status.code() == Some(1), "{printed}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn setup_detects_a_compiler_that_cannot_link_statically() {
    let dir = temporary("setup-");
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    // A cc that always fails, before the real one in PATH.
    fs::write(bin.join("cc"), "#!/bin/sh\nexit 1\n").unwrap();
    fs::set_permissions(bin.join("cc"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let release = dir.path().join("os-release");
    fs::write(&release, "ID=fedora\nVERSION_CODENAME=\n").unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let output = Command::new(script("support/setup.sh"))
        .env("PATH", path)
        .env("STENCIL_TEST_OS_RELEASE", &release)
        .env("CARGO_TARGET_DIR", dir.path().join("target"))
        .output()
        .unwrap();
    assert!(text(&output).contains("libc6-dev"), "{}", text(&output));
}

/// The devices may be open to all users of a host.
#[test]
fn unit_tests_have_neither_root_nor_fuse_nor_kvm() {
    let dir = temporary("private-");
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let program = dir.path().join("program");
    fs::copy("/bin/dash", &program).unwrap();
    let unit = |line: &str| {
        let mut command = Command::new(script("support/unprivileged.sh"));
        command.arg(&program).args(["-c", line]).output().unwrap()
    };
    // The user nobody cannot reach the program by its path, so the program is run through a descriptor.
    let user = unit("id -un; grep CapBnd /proc/self/status; echo x >$TMPDIR/file; cat $TMPDIR/file");
    assert_eq!(text(&user), "nobody\nCapBnd:\t0000000000000000\nx\n");
    for device in ["/dev/fuse", "/dev/kvm"] {
        assert!(Path::new(device).exists());
        let opened = unit(&format!(": <{device}"));
        assert!(!opened.status.success() && text(&opened).contains("Permission denied"), "{}", text(&opened));
    }
    assert!(unit(": </dev/null").status.success());
}
