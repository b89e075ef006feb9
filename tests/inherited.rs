//! What a parent leaves to its children: signals that are ignored or blocked, limits, descriptors that are closed or
//! non-blocking. And files that nobody writes or reads.

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

/// `stencil` with these options of env(1) in front.
fn under(world: &TestMount, env: &[&str], words: &[&str]) -> Command {
    let mut command = world.command_in("env");
    command.args(env).arg(STENCIL).args(words);
    command
}

fn output(command: &mut Command) -> Run {
    Run::of(format!("{command:?}"), &command.output().unwrap())
}

/// A mask of `/proc/PID/status`.
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

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Everything ignored and blocked, as no shell leaves it, and as service managers and test harnesses have done.
#[test]
fn signals_that_the_parent_ignores_and_blocks_hurt_nobody() {
    const DEAF: &[&str] = &["--ignore-signal", "--block-signal"];
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    output(&mut under(&world, DEAF, &["mount", mnt])).ok();
    let digest = world.import_bytes(&random(1, 1 << 20), "web:1");
    // SIGCHLD: nobody could wait for a child.
    output(&mut under(&world, DEAF, &["clone", &digest, "-n", "2", "--simulate", "write=1%"])).ok();
    let said = "grep -E '^Sig(Blk|Ign):' /proc/self/status; echo >&$STENCIL_NOTIFY; exec sleep 1000";
    let words = ["clone", "web:1", "--ready", "notify", "--", "bash", "-c", said];
    output(&mut under(&world, DEAF, &words)).ok();
    let ids = world.stencil(&["ps", "--ids"]).ok().out;
    let logs: Vec<String> = ids.lines().map(|id| world.stencil(&["logs", id]).ok().out).collect();
    let masks = logs.iter().find(|log| log.contains("SigBlk")).unwrap_or_else(|| panic!("{logs:?}"));
    for line in masks.lines().filter(|line| line.starts_with("Sig")) {
        let mask = u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
        // Signals 32 and 33 are the C library's own: its posix_spawn ignores them, and signal(2) refuses them.
        assert_eq!(mask & !(3 << 31), 0, "a program of a clone begins with {masks}");
    }
    output(&mut under(&world, DEAF, &["stop", "--all"])).ok();
    // A supervisor that hears nothing could only be killed.
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = ProcessId::of(supervisor).unwrap().unwrap();
    assert_eq!(mask(supervisor, "SigBlk"), 0);
    process.signal(Signal::TERM).unwrap();
    assert!(process.wait_gone(Duration::from_secs(10)).unwrap(), "the supervisor is deaf");
}

#[test]
fn nohup_is_kept_and_an_ignored_sigint_is_not() {
    let world = TestMount::unmounted();
    let mut command = under(
        &world,
        &["--ignore-signal=HUP", "--ignore-signal=INT"],
        &["mount", "-f", world.mountpoint().to_str().unwrap()],
    );
    let mut mount = command.stderr(Stdio::null()).spawn().unwrap();
    wait_for("the mount", || world.recorded_server());
    assert_ne!(mask(mount.id(), "SigIgn") & bit(Signal::HUP), 0, "the end of a session ends it");
    send(&mount, Signal::INT);
    assert!(mount.wait().unwrap().success());
    // A background command of a script: SIGINT is ignored there.
    let mut command =
        under(&world, &["--ignore-signal=INT", "--block-signal=INT"], &["import", "-", "web:1"]);
    let mut import = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a handler", || (mask(import.id(), "SigCgt") & bit(Signal::INT) != 0).then_some(()));
    send(&import, Signal::INT);
    let _open = import.stdin.take();
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("interrupted"), "{}", text(&output));
}

#[test]
fn a_limit_that_stops_a_command_is_named() {
    let world = TestMount::unmounted();
    world.open_to_others();
    let source = world.dir().join("source");
    fs::write(&source, random(2, 4 << 20)).unwrap();
    let limited = |limit: &str, words: &[&str]| {
        let script = format!("ulimit {limit} && exec {STENCIL} \"$@\"");
        let output = world.command_in("bash").args(["-c", &script, "bash"]).args(words).output().unwrap();
        assert!(output.status.signal().is_none(), "{limit} {words:?}: {:?}", output.status);
        Run::of(format!("{limit}: {words:?}"), &output)
    };
    let source = source.to_str().unwrap();
    limited("-f 64", &["import", source, "web:1"]).exits(1).says("File too large").says("ulimit -f");
    assert!(is_empty(&world));
    // How much a build needs depends on how it was compiled: the largest limit that is too small.
    let mut runs =
        (6..=30).rev().map(|size| limited(&format!("-v {}", size * 2000), &["import", source, "web:1"]));
    runs.find(|run| run.code != 0).unwrap().exits(1).says("ulimit -v");
    world.stencil(&["import", source, "web:1"]).ok();
    assert_eq!(fs::read_dir(world.store_dir().join("tmp")).unwrap().count(), 0, "nothing is left");
    let out = world.dir().join("out");
    limited("-f 64", &["export", "web:1", out.to_str().unwrap()]).exits(1).says("ulimit -f");
    assert!(!out.exists());
    let few = limited("-n 6", &["import", source, "web:2"]).exits(1);
    assert!(few.err.contains("Too many open files") && few.err.contains("ulimit -n"), "{}", few.err);
    run("chown", &["-R", "65534", world.store_dir().to_str().unwrap()]);
    // A user that may have one process: as many threads as there are do the work.
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
fn closed_descriptors_are_not_taken_for_files() {
    let world = TestMount::unmounted();
    let source = world.dir().join("source");
    fs::write(&source, random(3, 1 << 20)).unwrap();
    let script = format!("exec {STENCIL} \"$@\" <&- >&- 2>&-");
    let closed = |words: &[&str]| {
        let status = world.command_in("bash").args(["-c", &script, "bash"]).args(words).status().unwrap();
        assert!(status.success(), "{words:?}: {status}");
    };
    closed(&["-v", "import", source.to_str().unwrap(), "web:1"]);
    closed(&["mount", world.mountpoint().to_str().unwrap()]);
    closed(&["-v", "verify"]);
    world.stencil(&["verify"]).ok();
    let digest = world.json(&["inspect", "web:1"])["digest"].as_str().unwrap().to_owned();
    assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), fs::read(&source).unwrap());
}

#[test]
fn a_pipe_that_somebody_made_non_blocking_loses_nothing() {
    let world = TestMount::unmounted();
    let content = random(4, 1 << 20);
    world.import_bytes(&content, "web:1");
    let saved = world.dir().join("saved");
    world.stencil(&["save", "web:1", "-o", saved.to_str().unwrap()]).ok();
    for (words, expected) in
        [(&["export", "web:1", "-"][..], content), (&["save", "web:1"], fs::read(&saved).unwrap())]
    {
        let (read, write) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&write, true).unwrap();
        let mut child = world.command().args(words).stdout(OwnedFd::from(write)).spawn().unwrap();
        // Soon full, and left so until the command must have met it.
        wait_for("bytes in the pipe", || {
            let there = rustix::io::ioctl_fionread(&read).unwrap();
            (there >= 1 << 15 || child_ended(&child)).then_some(())
        });
        std::thread::sleep(Duration::from_millis(50));
        let mut got = Vec::new();
        (&read).read_to_end(&mut got).unwrap();
        assert!(child.wait().unwrap().success(), "{words:?}");
        assert!(got == expected, "{words:?}: {} of {} bytes", got.len(), expected.len());
    }
}

fn child_ended(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.contains(") Z ")
}

/// A pipe that no process has open at the other end.
fn lonely(world: &TestMount) -> std::path::PathBuf {
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

/// No time limit and no signal applied while the pipe was opened.
#[test]
fn a_pipe_without_another_end_is_given_up() {
    let world = TestMount::unmounted();
    let fifo = lonely(&world);
    let fifo = fifo.to_str().unwrap();
    let source = world.dir().join("source");
    fs::write(&source, [1; 4096]).unwrap();
    let source = source.to_str().unwrap();
    let file = format!("extra={fifo},kind=blob");
    for words in [
        &["import", fifo, "web:1"][..],
        &["import", source, "web:1", "--state", fifo],
        &["import", source, "web:1", "--file", &file],
        &["load", "-i", fifo],
    ] {
        let limited = [words, &["--stall-timeout", "0.2"]].concat();
        world.stencil(&limited).exits(75).says("no bytes for 0.2 s");
        assert!(is_empty(&world), "{words:?}");
        for signal in [Signal::TERM, Signal::INT] {
            let mut child = world.command().args(words).stderr(Stdio::piped()).spawn().unwrap();
            wait_for("a handler", || (mask(child.id(), "SigCgt") & bit(signal) != 0).then_some(()));
            send(&child, signal);
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(1), "{words:?}: {said}");
            assert!(said.contains("interrupted") && is_empty(&world), "{words:?}: {said}");
        }
    }
    world.stencil(&["import", source, "web:1"]).ok();
    for words in [&["export", "web:1", fifo][..], &["save", "web:1", "-o", fifo]] {
        let limited = [words, &["--stall-timeout", "0.2"]].concat();
        world.stencil(&limited).exits(75).says("timed out after 0.2 s waiting for a reader");
        let mut child = world.command().args(words).stderr(Stdio::null()).spawn().unwrap();
        wait_for("a wait", || asleep(&child).then_some(()));
        send(&child, Signal::TERM);
        child.wait().unwrap();
    }
    let mut export = world.command().args(["export", "web:1", fifo]).spawn().unwrap();
    assert_eq!(fs::read(fifo).unwrap(), [1; 4096], "a reader that comes later gets all of it");
    assert!(export.wait().unwrap().success());
    // A reader that stands still.
    let big = world.dir().join("big");
    fs::write(&big, random(6, 1 << 20)).unwrap();
    world.stencil(&["import", big.to_str().unwrap(), "big:1"]).ok();
    let mut export = world.command().args(["export", "big:1", fifo]).stderr(Stdio::piped()).spawn().unwrap();
    let reader = fs::File::open(fifo).unwrap();
    wait_for("a full pipe", || (rustix::io::ioctl_fionread(&reader).unwrap() >= 1 << 16).then_some(()));
    send(&export, Signal::TERM);
    let mut said = String::new();
    export.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(export.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("interrupted"), "{said}");
}

fn asleep(child: &Child) -> bool {
    let wchan = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
    wchan.contains("nanosleep") || wchan.contains("fifo") || wchan.contains("pipe")
}

#[test]
fn a_recipe_comes_from_a_pipe_that_is_opened_later() {
    let world = TestMount::unmounted();
    world.import_bytes(&[5; 4096], "web:1");
    let fifo = lonely(&world);
    let command = || {
        world
            .command()
            .args(["recipe", "edit", "web:1", "--from", fifo.to_str().unwrap()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ended = |child: Child| {
        let output = child.wait_with_output().unwrap();
        (output.status, text(&output))
    };
    let child = command();
    write_to(&fifo, b"{}");
    let (status, said) = ended(child);
    assert!(matches!(status.code(), Some(1 | 2)), "{said}");
    let child = command();
    write_to(&fifo, b"\xff");
    assert!(ended(child).1.contains("invalid recipe: not UTF-8"));
}

fn write_to(fifo: &Path, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(fifo).unwrap().write_all(bytes).unwrap();
}
