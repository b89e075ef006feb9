//! Firecrackers in jails of Firecracker's own jailer: 64 at once, beside many other mounts.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use serde_json::{Value, json};
use stencilfs::sys::process::procfs;

use crate::support::daemon::drill::Drill;
use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::{Run, TestMount, temporary, wait_for, without_others};
use crate::support::vm::firecracker::{Firecracker, WRITTEN_PAGES, program};
use crate::vmm::firecracker_guests::{Clone, ask_all, dirty, import_snapshot};

/// Number of clones.
const CLONES: usize = 64;

/// Number of clones that Stencil launches at the same time. By hand all are started at once.
const PARALLEL: usize = 8;

/// Rounds of a measurement.
const ROUNDS: usize = 3;

/// Number of other mounts.
const MOUNTS: usize = 300;

/// Maximum duration of a launch, relative to the same jails without Stencil.
const TIME_LIMIT: f64 = 1.9;

/// Maximum duration of a launch, relative to Firecrackers without jail and without Stencil.
const PLAIN_TIME_LIMIT: f64 = 3.1;

/// A tmpfs for the jails and the runtime directory, as on a real host.
struct Jails {
    _mounted: Mounted,
    base: PathBuf,
    _dir: tempfile::TempDir,
}

/// Mounts a tmpfs.
fn in_memory(path: &Path) -> Mounted {
    mount("none", path, "tmpfs", MountFlags::empty(), Some(c"mode=755")).unwrap();
    Mounted(path.to_owned())
}

impl Jails {
    fn new() -> Jails {
        let dir = temporary("jails-");
        let mounted = in_memory(dir.path());
        let base = dir.path().join("jails");
        Jails { _mounted: mounted, base, _dir: dir }
    }
}

/// Mounts a store with a snapshot that only root and the user of the jails can read.
fn world_with_jails(serve: &str) -> (Jails, TestMount) {
    let jails = Jails::new();
    let world = TestMount::unmounted().with_runtime_dir(jails.base.with_file_name("run"));
    world.mount(&["--serve", serve]).ok();
    drop(import_snapshot(&world, &[]));
    world.stencil(&["chown", "123:123", "fc:1"]).ok();
    world.stencil(&["chmod", "0440", "fc:1"]).ok();
    (jails, world)
}

/// Launches clones in jails, beside other mounts that only the launcher sees. Returns the clones and the duration in
/// seconds.
fn launch(world: &TestMount, jails: &Jails) -> (Vec<Clone>, f64) {
    let script = format!(
        "{} && for n in $(seq {MOUNTS}); do mount -t tmpfs none \"$1\"; done && shift && exec \"$@\"",
        without_others(world.dir())
    );
    let other = world.dir().join("other");
    fs::create_dir_all(&other).unwrap();
    let mut command = world.command_in("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(&other);
    command.args([env!("CARGO_BIN_EXE_stencil"), "--json", "clone", "fc:1"]);
    command.args(["-n", &CLONES.to_string(), "--parallel", &PARALLEL.to_string()]);
    command.arg("--firecracker").arg(program("firecracker")).arg("--jailer").arg(program("jailer"));
    command.args(["--uid", "123", "--gid", "123", "--chroot-base-dir"]).arg(&jails.base);
    let run = Run::of("clone".into(), &command.output().unwrap()).ok();
    let launched: Value = serde_json::from_str(&run.out).unwrap();
    let clones = launched["clones"].as_array().unwrap().iter().map(Clone::of).collect();
    (clones, launched["ready_seconds"].as_f64().unwrap())
}

/// Starts a Firecracker without Stencil. `n` is its number.
type Start = fn(&Path, usize) -> Firecracker;

/// Starts a Firecracker without a jail in a new directory below `base`.
fn start_plain(base: &Path, n: usize) -> Firecracker {
    let directory = base.join(n.to_string());
    fs::create_dir_all(&directory).unwrap();
    Firecracker::start_by(&directory, Command::new(program("firecracker")))
}

/// Starts a Firecracker in a jail below `base`, with links to the snapshot there.
fn start_in_jail(base: &Path, n: usize) -> Firecracker {
    let root = base.join("firecracker").join(format!("hand-{n}")).join("root");
    fs::create_dir_all(&root).unwrap();
    for name in ["state", "memory"] {
        fs::hard_link(base.join(name), root.join(name)).unwrap();
    }
    chown(File::create(root.join("log")).map(|_| root.join("log")).unwrap(), Some(123), Some(123)).unwrap();
    let mut command = Command::new(program("jailer"));
    command.args(["--id", &format!("hand-{n}"), "--uid", "123", "--gid", "123", "--exec-file"]);
    command.arg(program("firecracker")).arg("--chroot-base-dir").arg(base).arg("--");
    Firecracker::start_by(&root, command)
}

/// Loads a snapshot in as many Firecrackers at once, without Stencil. Their files are below `base`, which is then
/// removed. Returns the duration in seconds.
fn load_by_hand(snapshot: &Path, base: &Path, start: Start) -> f64 {
    let body = json!({
        "snapshot_path": snapshot.join("state"),
        "mem_backend": {"backend_type": "File", "backend_path": snapshot.join("memory")},
        "resume_vm": false,
    });
    let loaded = Arc::new(Barrier::new(CLONES));
    let begin = Instant::now();
    let load = |n: usize| {
        let (base, body, loaded) = (base.to_owned(), body.clone(), Arc::clone(&loaded));
        std::thread::spawn(move || {
            let firecracker = start(&base, n);
            firecracker.load(&body);
            // Same order as in a launch by Stencil.
            loaded.wait();
            firecracker.resume();
            firecracker
        })
    };
    let threads: Vec<_> = (0..CLONES).map(load).collect();
    let loaded: Vec<Firecracker> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let seconds = begin.elapsed().as_secs_f64();
    drop(loaded);
    fs::remove_dir_all(base).unwrap();
    seconds
}

#[test]
fn soak_sixty_four_clones_in_jails_take_at_most_twice_the_time_of_jails_by_hand() {
    let _host = host::alone();
    let (jails, world) = world_with_jails("passthrough");
    let (snapshot, plain) = (world.dir().join("source"), world.dir().join("plain"));
    let hand = jails.base.with_file_name("hand");
    load_by_hand(&snapshot, &plain, start_plain);
    let mut clones = vec![];
    // The shortest of several rounds: other load on the host only adds time.
    let [mut raw, mut by_hand, mut jailed] = [f64::MAX; 3];
    host::measured(|| {
        for _ in 0..ROUNDS {
            world.stencil(&["stop", "--all"]).ok();
            raw = raw.min(load_by_hand(&snapshot, &plain, start_plain));
            fs::create_dir(&hand).unwrap();
            for name in ["state", "memory"] {
                fs::copy(snapshot.join(name), hand.join(name)).unwrap();
            }
            by_hand = by_hand.min(load_by_hand(Path::new("/"), &hand, start_in_jail));
            let seconds;
            (clones, seconds) = launch(&world, &jails);
            jailed = jailed.min(seconds);
        }
        println!(
            "{CLONES} Firecrackers, shortest of all rounds: {raw:.3} s; in jails by hand {by_hand:.3} s, {:.2} times the first; in \
             jails by stencil clone {jailed:.3} s, {:.2} times the first",
            by_hand / raw,
            jailed / raw
        );
        let (ratio, to_plain) = (jailed / by_hand, jailed / raw);
        match ratio <= TIME_LIMIT && to_plain <= PLAIN_TIME_LIMIT {
            true => Ok(()),
            false => Err(format!(
                "{ratio:.2} times the time of jails by hand, {to_plain:.2} times that without jails"
            )),
        }
    });
    check_and_stop(&world, &jails, clones);
}

#[test]
fn soak_sixty_four_clones_in_jails_run_by_decode() {
    let _host = host::alone();
    let (jails, world) = world_with_jails("decode");
    let (clones, _) = launch(&world, &jails);
    check_and_stop(&world, &jails, clones);
}

/// Checks that all clones read and write their memory, that their dirty pages and the sum of all are exact, and that
/// the clones survive killed servers. Stops all clones; nothing may be left.
fn check_and_stop(world: &TestMount, jails: &Jails, mut clones: Vec<Clone>) {
    let copied = |clones: &[Clone]| clones.iter().map(|clone| dirty(world, clone.pid)).collect::<Vec<_>>();
    // After one command, each guest has written to the pages of its stack and of its variables.
    ask_all(&mut clones, 'm', "K");
    let before = copied(&clones);
    assert_eq!(before, [before[0]; CLONES]);
    ask_all(&mut clones, 'w', "W");
    assert_eq!(copied(&clones), [before[0] + WRITTEN_PAGES; CLONES]);

    let density = world.json(&["density", "--audit"]);
    let rows = density["clones"].as_array().unwrap();
    assert!(rows.len() == CLONES && rows.iter().all(|row| row["uid"] == 123), "{density:#}");
    let error = density["audit"]["frames"]["error_percent"].as_f64().unwrap();
    assert!(error.abs() <= 0.5, "{}", density["audit"]);
    let logs = world.json(&["logs", &clones[0].id]);
    assert!(logs["log"].as_str().unwrap().contains("Running Firecracker v"), "{logs}");
    let digest = world.json(&["inspect", "fc:1"])["digest"].as_str().unwrap().to_owned();
    let mut drill = Drill::new(world);
    for _ in 0..host::rounds(4, 20) {
        // A server that answers no request before its end would be restarted after a pause.
        drop(File::open(world.file(&digest, "memory")).unwrap());
        clones.iter_mut().for_each(|clone| clone.serial.send('m'));
        drill.kill();
        for clone in &mut clones {
            assert_eq!(clone.serial.answer(), "K", "clone {} after kill {}", clone.id, drill.kills().len());
        }
    }
    ask_all(&mut clones, 'a', "K");
    let jails_bytes = fs::metadata(program("firecracker")).unwrap().len();
    assert!(rows.iter().all(|row| row["disk_bytes"] == jails_bytes), "{density:#}");
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(world, jails);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    assert_eq!(world.processes(), vec![]);
}

/// Asserts that no record, no jail and no process of a jail's user is left.
fn nothing_is_left(world: &TestMount, jails: &Jails) {
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
    for directory in ["clones", "launches"] {
        let left = fs::read_dir(world.runtime_dir().join(directory)).into_iter().flatten().count();
        assert_eq!(left, 0, "{directory}");
    }
    let left: Vec<_> = fs::read_dir(jails.base.join("firecracker")).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    // Processes that have ended may not have been reaped yet.
    let is_alive = |pid: u32| procfs::stat(pid).unwrap().is_some_and(|stat| stat.is_alive());
    let of_the_user =
        |pid: &u32| is_alive(*pid) && procfs::status(*pid).unwrap().is_some_and(|status| status.uid == 123);
    let processes: Vec<u32> = procfs::pids().unwrap().into_iter().filter(of_the_user).collect();
    assert_eq!(processes, Vec::<u32>::new());
}

#[test]
fn soak_a_killed_launch_leaves_no_jail() {
    let _host = host::alone();
    let (jails, world) = world_with_jails("decode");
    let mut killed = 0;
    for round in 0..host::rounds(12, 40) {
        let mut command = world.command_in(env!("CARGO_BIN_EXE_stencil"));
        command.args(["clone", "fc:1", "-n", "4", "--firecracker"]).arg(program("firecracker"));
        command.arg("--jailer").arg(program("jailer")).args(["--uid", "123", "--gid", "123"]);
        command.arg("--chroot-base-dir").arg(&jails.base).stdout(Stdio::null()).stderr(Stdio::null());
        let mut launcher = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(10 * round));
        launcher.kill().unwrap();
        killed += usize::from(launcher.wait().unwrap().signal() == Some(9));
        // The watchdog of the launch cleans up, or the next command does.
        wait_for("the end of the clones", || {
            let all = world.json(&["ps"])["clones"].as_array().unwrap().len();
            let is_launching =
                fs::read_dir(world.runtime_dir().join("launches")).is_ok_and(|mut all| all.next().is_some());
            (matches!(all, 0 | 4) && !is_launching).then_some(())
        });
        world.stencil(&["stop", "--all"]).ok();
        nothing_is_left(&world, &jails);
    }
    assert!(killed > 0, "every launch ended before its kill");
}
