//! State that a process inherits: ignored and blocked signals, resource limits, closed and non-blocking descriptors.
//! Also pipes without a process at the other end.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use stencilfs::sys::process::ProcessId;

use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::store::random;

/// `stencil` run through env(1) with these options.
fn under(world: &TestMount, env: &[&str], args: &[&str]) -> Command {
    let mut command = world.command_in("env");
    command.args(env).arg(STENCIL).args(args);
    command
}

fn output(command: &mut Command) -> Run {
    Run::of(format!("{command:?}"), &command.output().unwrap())
}

/// A signal mask of `/proc/PID/status`, by the name of its line.
fn mask(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

fn bit(signal: Signal) -> u64 {
    1 << (signal.as_raw() - 1)
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// All signals ignored and blocked: no shell starts a command like this, but some service managers and test harnesses
/// do.
#[test]
fn inherited_ignored_and_blocked_signals_are_reset() {
    const ALL_SIGNALS_OFF: &[&str] = &["--ignore-signal", "--block-signal"];
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    output(&mut under(&world, ALL_SIGNALS_OFF, &["mount", mnt])).ok();
    let digest = world.import_bytes(&random(1, 1 << 20), "web:1");
    // With SIGCHLD ignored, a process cannot wait for its children.
    output(&mut under(&world, ALL_SIGNALS_OFF, &["clone", &digest, "-n", "2", "--simulate", "write=1%"]))
        .ok();
    let script = "grep -E '^Sig(Blk|Ign):' /proc/self/status; echo >&$STENCIL_NOTIFY; exec sleep 1000";
    let args = ["clone", "web:1", "--ready", "notify", "--", "bash", "-c", script];
    output(&mut under(&world, ALL_SIGNALS_OFF, &args)).ok();
    let ids = world.stencil(&["ps", "--ids"]).ok().out;
    let logs: Vec<String> = ids.lines().map(|id| world.stencil(&["logs", id]).ok().out).collect();
    let masks = logs.iter().find(|log| log.contains("SigBlk")).unwrap_or_else(|| panic!("{logs:?}"));
    for line in masks.lines().filter(|line| line.starts_with("Sig")) {
        let mask = u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
        // Signals 32 and 33 are reserved by glibc: its posix_spawn(3) ignores them, and signal(2) rejects them.
        assert_eq!(mask & !(3 << 31), 0, "the program of a clone started with {masks}");
    }
    output(&mut under(&world, ALL_SIGNALS_OFF, &["stop", "--all"])).ok();
    // A supervisor with all signals blocked could end only by SIGKILL.
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = ProcessId::of(supervisor).unwrap().unwrap();
    assert_eq!(mask(supervisor, "SigBlk"), 0);
    process.signal(Signal::TERM).unwrap();
    assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap(), "the supervisor must end on SIGTERM");
}

#[test]
fn nohup_stays_in_effect_and_an_ignored_sigint_does_not() {
    let world = TestMount::unmounted();
    let mut command = under(
        &world,
        &["--ignore-signal=HUP", "--ignore-signal=INT"],
        &["mount", "-f", world.mountpoint().to_str().unwrap()],
    );
    let mut mount = command.stderr(Stdio::null()).spawn().unwrap();
    wait_for("the mount", || world.recorded_server());
    assert_ne!(mask(mount.id(), "SigIgn") & bit(Signal::HUP), 0, "SIGHUP must stay ignored under nohup(1)");
    send(&mount, Signal::INT);
    assert!(mount.wait().unwrap().success());
    // Shells start background commands of scripts with SIGINT ignored.
    let mut command =
        under(&world, &["--ignore-signal=INT", "--block-signal=INT"], &["import", "-", "web:1"]);
    let mut import = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a signal handler", || (mask(import.id(), "SigCgt") & bit(Signal::INT) != 0).then_some(()));
    send(&import, Signal::INT);
    let _open = import.stdin.take();
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
}

#[test]
fn errors_name_the_resource_limit_that_was_exceeded() {
    let world = TestMount::unmounted();
    world.open_to_others();
    let source = world.dir().join("source");
    fs::write(&source, random(2, 4 << 20)).unwrap();
    let limited = |limit: &str, args: &[&str]| {
        let script = format!("ulimit {limit} && exec {STENCIL} \"$@\"");
        let output = world.command_in("bash").args(["-c", &script, "bash"]).args(args).output().unwrap();
        assert!(output.status.signal().is_none(), "{limit} {args:?}: {:?}", output.status);
        Run::of(format!("{limit}: {args:?}"), &output)
    };
    let source = source.to_str().unwrap();
    limited("-f 64", &["import", source, "web:1"]).exits(1).says("File too large").says("ulimit -f");
    assert!(is_empty(&world));
    // The address space that the program needs depends on the build: find the largest limit that is too small.
    let mut runs =
        (6..=30).rev().map(|size| limited(&format!("-v {}", size * 2000), &["import", source, "web:1"]));
    runs.find(|run| run.code != 0).unwrap().exits(1).says("ulimit -v");
    world.stencil(&["import", source, "web:1"]).ok();
    assert_eq!(
        fs::read_dir(world.store_dir().join("tmp")).unwrap().count(),
        0,
        "no temporary file may be left"
    );
    let out = world.dir().join("out");
    limited("-f 64", &["export", "web:1", out.to_str().unwrap()]).exits(1).says("ulimit -f");
    assert!(!out.exists());
    let few = limited("-n 6", &["import", source, "web:2"]).exits(1);
    assert!(few.err.contains("Too many open files") && few.err.contains("ulimit -n"), "{}", few.err);
    run("chown", &["-R", "65534", world.store_dir().to_str().unwrap()]);
    // RLIMIT_NPROC of 1: no thread can be created, so verify must work in the main thread.
    let output = world
        .command_in("setpriv")
        .args([
            "--reuid=65534",
            "--clear-groups",
            "bash",
            "-c",
            "ulimit -u 1 && exec \"$@\"",
            "bash",
            STENCIL,
        ])
        .args(["verify"])
        .output()
        .unwrap();
    Run::of("verify in one thread".into(), &output).ok();
}

#[test]
fn closed_standard_descriptors_are_not_reused_for_files() {
    let world = TestMount::unmounted();
    let source = world.dir().join("source");
    fs::write(&source, random(3, 1 << 20)).unwrap();
    let script = format!("exec {STENCIL} \"$@\" <&- >&- 2>&-");
    let closed = |args: &[&str]| {
        let status = world.command_in("bash").args(["-c", &script, "bash"]).args(args).status().unwrap();
        assert!(status.success(), "{args:?}: {status}");
    };
    closed(&["-v", "import", source.to_str().unwrap(), "web:1"]);
    closed(&["mount", world.mountpoint().to_str().unwrap()]);
    closed(&["-v", "verify"]);
    world.stencil(&["verify"]).ok();
    let digest = world.json(&["inspect", "web:1"])["digest"].as_str().unwrap().to_owned();
    assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), fs::read(&source).unwrap());
}

#[test]
fn output_to_a_non_blocking_pipe_is_complete() {
    let world = TestMount::unmounted();
    let content = random(4, 1 << 20);
    world.import_bytes(&content, "web:1");
    let saved = world.dir().join("saved");
    world.stencil(&["save", "web:1", "-o", saved.to_str().unwrap()]).ok();
    for (args, expected) in
        [(&["export", "web:1", "-"][..], content), (&["save", "web:1"], fs::read(&saved).unwrap())]
    {
        let (read, write) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&write, true).unwrap();
        let mut child = world.command().args(args).stdout(OwnedFd::from(write)).spawn().unwrap();
        // The pipe fills up, and stays full for 50 ms so that the command gets EAGAIN.
        wait_for("bytes in the pipe", || {
            let pending = rustix::io::ioctl_fionread(&read).unwrap();
            (pending >= 1 << 15 || has_exited(&child)).then_some(())
        });
        std::thread::sleep(Duration::from_millis(50));
        let mut got = Vec::new();
        (&read).read_to_end(&mut got).unwrap();
        assert!(child.wait().unwrap().success(), "{args:?}");
        assert!(got == expected, "{args:?}: {} of {} bytes", got.len(), expected.len());
    }
}

fn has_exited(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.contains(") Z ")
}

/// A FIFO that no process has open.
fn fifo_without_peer(world: &TestMount) -> std::path::PathBuf {
    let path = world.dir().join("fifo");
    if !path.exists() {
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    }
    path
}

fn is_empty(world: &TestMount) -> bool {
    let count = |name: &str| fs::read_dir(world.store_dir().join(name)).map_or(0, Iterator::count);
    count("tmp") == 0 && count("tags") == 0
}

/// open(2) of a FIFO blocks until the other end is opened: the timeout and signals must apply there too.
#[test]
fn opening_a_pipe_without_a_peer_times_out_or_is_interrupted() {
    let world = TestMount::unmounted();
    let fifo = fifo_without_peer(&world);
    let fifo = fifo.to_str().unwrap();
    let source = world.dir().join("source");
    fs::write(&source, [1; 4096]).unwrap();
    let source = source.to_str().unwrap();
    let file = format!("extra={fifo},kind=blob");
    for args in [
        &["import", fifo, "web:1"][..],
        &["import", source, "web:1", "--state", fifo],
        &["import", source, "web:1", "--file", &file],
        &["load", "-i", fifo],
    ] {
        let limited = [args, &["--stall-timeout", "0.2"]].concat();
        world.stencil(&limited).exits(75).says("no bytes for 0.2 s");
        assert!(is_empty(&world), "{args:?}");
        for signal in [Signal::TERM, Signal::INT] {
            let mut child = world.command().args(args).stderr(Stdio::piped()).spawn().unwrap();
            wait_for("a signal handler", || (mask(child.id(), "SigCgt") & bit(signal) != 0).then_some(()));
            send(&child, signal);
            let mut printed = String::new();
            child.stderr.take().unwrap().read_to_string(&mut printed).unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(1), "{args:?}: {printed}");
            assert!(printed.contains("interrupted") && is_empty(&world), "{args:?}: {printed}");
        }
    }
    world.stencil(&["import", source, "web:1"]).ok();
    for args in [&["export", "web:1", fifo][..], &["save", "web:1", "-o", fifo]] {
        let limited = [args, &["--stall-timeout", "0.2"]].concat();
        world.stencil(&limited).exits(75).says("timed out after 0.2 s waiting for a reader");
        let mut child = world.command().args(args).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the command to block on the pipe", || is_blocked(&child).then_some(()));
        send(&child, Signal::TERM);
        child.wait().unwrap();
    }
    let mut export = world.command().args(["export", "web:1", fifo]).spawn().unwrap();
    assert_eq!(fs::read(fifo).unwrap(), [1; 4096], "a reader that opens the pipe later must get all bytes");
    assert!(export.wait().unwrap().success());
    // A reader that has the pipe open and reads nothing.
    let big = world.dir().join("big");
    fs::write(&big, random(6, 1 << 20)).unwrap();
    world.stencil(&["import", big.to_str().unwrap(), "big:1"]).ok();
    let mut export = world.command().args(["export", "big:1", fifo]).stderr(Stdio::piped()).spawn().unwrap();
    let reader = fs::File::open(fifo).unwrap();
    wait_for("a full pipe", || (rustix::io::ioctl_fionread(&reader).unwrap() >= 1 << 16).then_some(()));
    send(&export, Signal::TERM);
    let mut printed = String::new();
    export.stderr.take().unwrap().read_to_string(&mut printed).unwrap();
    assert_eq!(export.wait().unwrap().code(), Some(1), "{printed}");
    assert!(printed.contains("interrupted"), "{printed}");
}

fn is_blocked(child: &Child) -> bool {
    let wchan = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
    wchan.contains("nanosleep") || wchan.contains("fifo") || wchan.contains("pipe")
}

#[test]
fn recipe_edit_reads_from_a_pipe_opened_later() {
    let world = TestMount::unmounted();
    world.import_bytes(&[5; 4096], "web:1");
    let fifo = fifo_without_peer(&world);
    let command = || {
        world
            .command()
            .args(["recipe", "edit", "web:1", "--from", fifo.to_str().unwrap()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let wait = |child: Child| {
        let output = child.wait_with_output().unwrap();
        (output.status, stderr(&output))
    };
    let child = command();
    write_to(&fifo, b"{}");
    let (status, printed) = wait(child);
    assert!(matches!(status.code(), Some(1 | 2)), "{printed}");
    let child = command();
    write_to(&fifo, b"\xff");
    assert!(wait(child).1.contains("invalid recipe: not UTF-8"));
}

fn write_to(fifo: &Path, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(fifo).unwrap().write_all(bytes).unwrap();
}
