//! The demo, the set-up and the guard: what `make` runs around the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::guest::patiently;
use crate::support::host;
use crate::support::mount::{STENCIL, daemon, temporary};

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Clones of the demo: of QEMU, and simulated ones. In `make soak` as many as in `make demo`.
fn clones() -> (u32, u32) {
    host::rounds((2, 40), (6, 200))
}

/// The demo with the binaries of this build, in a folder of its own.
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

/// Processes that were given this folder as TMPDIR.
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
fn nothing_is_left(dir: &Path) {
    assert_eq!(processes_in(dir), Vec::<String>::new());
    let left: Vec<_> = fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
}

#[test]
fn soak_it_shows_the_main_job_and_leaves_nothing() {
    let _host = host::shared();
    let dir = temporary("demo-");
    let began = Instant::now();
    let (qemus, simulated) = clones();
    let output = demo(dir.path(), clones()).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for words in [
        &format!("{} clones take", qemus + simulated),
        "= host memory",
        "sharing ratio",
        "audit",
        "and in the store",
        "on its disk: ",
        "the base image of their disks: before, while all wrote, and after",
        &format!("{} stopped", qemus + simulated),
        "Done",
    ] {
        assert!(said.contains(words), "no '{words}' in {said}");
    }
    // The clones run on while they are measured: a figure that moved meanwhile is none that is wrong.
    assert!(!said.contains("wrong: off by"), "{said}");
    let limit = Duration::from_secs(host::rounds(240, 600));
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    nothing_is_left(dir.path());
}

#[test]
fn soak_it_leaves_nothing_when_it_is_interrupted() {
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
        patiently("that moment", Duration::from_secs(600), || {
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
        nothing_is_left(dir.path());
    }
}

#[test]
fn an_older_kernel_is_named_at_once() {
    let dir = temporary("demo-");
    for (mut command, who) in
        [(demo(dir.path(), (1, 1)), "demo"), (Command::new(script("support/setup.sh")), "setup")]
    {
        let began = Instant::now();
        let output = command.env("STENCIL_TEST_KERNEL_RELEASE", "6.1.0-37-amd64").output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{who}: {:?}", began.elapsed());
        assert_eq!(output.status.code(), Some(1), "{who}");
        let said = text(&output);
        assert!(said.contains("kernel 6.1.0-37-amd64: Linux 6.9 or newer is needed"), "{who}: {said}");
    }
    nothing_is_left(dir.path());
}

#[test]
fn setup_says_what_to_do_without_cargo_and_elsewhere() {
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
    let said = text(&output);
    assert!(said.contains("this is fedora/") && said.contains("vmlinuz"), "{said}");
}

#[test]
fn the_guard_names_and_clears_what_is_left() {
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
    assert_eq!(guard("true").status.code(), Some(0), "nothing left, nothing said");
    let output =
        guard("touch $TMPDIR/file; mkdir $TMPDIR/m; mount -t tmpfs none $TMPDIR/m; setsid sleep 1000 &");
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    for words in ["sleep 1000", "tmpfs mount ", "/file", "have been cleared"] {
        assert!(said.contains(words), "no '{words}' in {said}");
    }
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.path().to_str().unwrap()));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["target"]);
}

#[test]
fn the_guard_knows_a_relative_build_directory_and_waits_for_another_run() {
    let _host = host::shared();
    let dir = temporary("guard-");
    let guard = |line: &str| {
        let mut command = Command::new(script("support/guard.sh"));
        command.args(["bash", "-c", line]).current_dir(dir.path()).env("TMPDIR", dir.path());
        command.env("CARGO_TARGET_DIR", "here").stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let began = dir.path().join("began");
    let mut first = guard("touch here/tmp/first began; sleep 1; rm here/tmp/first began").spawn().unwrap();
    patiently("the first run", Duration::from_secs(10), || began.exists().then_some(()));
    let second = guard("ls here/tmp; mkdir here/tmp/m; mount -t tmpfs none here/tmp/m").output().unwrap();
    assert!(first.wait().unwrap().success(), "nothing of the first run was cleared or blamed");
    let said = text(&second);
    assert!(said.contains("another run uses") && !said.contains("first"), "{said}");
    assert!(said.contains("tmpfs mount ") && second.status.code() == Some(1), "{said}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn setup_sees_a_compiler_without_a_static_library() {
    let dir = temporary("setup-");
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    // A cc that cannot link, in front of the real one.
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
