//! Several mounts on one mountpoint: a live mount is never unmounted, and two mounts are never stacked.

use std::fs;
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::sys::files::mount::FS_TYPE;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::procfs;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, run, wait_for};

/// The mounts on the scenario's mountpoint, lowest first.
fn mounts_at_mountpoint(world: &TestMount) -> Vec<procfs::MountLine> {
    let mut all = procfs::mounts().unwrap();
    all.retain(|line| line.mountpoint == world.mountpoint());
    assert!(all.iter().all(|line| line.fs_type == FS_TYPE), "{all:?}");
    all
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Two stores are mounted on one mountpoint at the same time: one is mounted, and its command is the one that
/// succeeded.
#[test]
fn soak_exactly_one_of_two_simultaneous_mounts_succeeds() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    let stores = ["a", "b"].map(|name| world.dir().join(name));
    for store in &stores {
        stencilfs::store::Store::open_or_create(store).unwrap();
    }
    for round in 0..host::rounds(10, 75) {
        let start = |store: &std::path::Path| {
            let mut command = world.command();
            command.arg("--store").arg(store).args(["mount", mnt]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        // The two commands start in alternating order.
        let mut children = [round % 2, (round + 1) % 2].map(|at| (at as usize, start(&stores[at as usize])));
        children.sort_by_key(|(at, _)| *at);
        let outputs = children.map(|(_, child)| child.wait_with_output().unwrap());
        let codes = [0, 1].map(|at| outputs[at].status.code());
        let winner = codes.iter().position(|code| *code == Some(0)).unwrap_or_else(|| panic!("{outputs:?}"));
        assert_eq!(codes[1 - winner], Some(5), "round {round}: {}", stderr(&outputs[1 - winner]));
        let lines = mounts_at_mountpoint(&world);
        assert_eq!(lines.len(), 1, "round {round}: {lines:?}");
        assert_eq!(std::path::Path::new(&lines[0].source), stores[winner], "round {round}");
        assert_eq!(world.status()["device"].as_u64(), Some(lines[0].dev), "round {round}");
        assert_eq!(fs::read_dir(mnt).unwrap().count(), 2, "round {round}: the mount must respond");
        world.stencil(&["umount", mnt]).ok();
        assert!(mounts_at_mountpoint(&world).is_empty(), "round {round}");
    }
}

/// A mount of another runtime directory has no record in this one, and is still alive: with both processes, with a
/// stopped server, and with the server alone.
#[test]
fn mount_keeps_a_live_mount_of_another_runtime_directory() {
    const PAGES: u64 = 64;
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&crate::support::store::random(5, (PAGES * 4096) as usize), "web:1");
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), PAGES * 4096));
    let other = world.dir().join("elsewhere");
    let mnt = world.mountpoint().to_str().unwrap();
    let before = mounts_at_mountpoint(&world);
    let assert_refused = |state: &str| {
        let output =
            world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{state}: {}", stderr(&output));
        let remedy = format!("STENCIL_RUNTIME_DIR={} stencil umount {mnt}", world.runtime_dir().display());
        assert!(stderr(&output).contains(&remedy), "{state}: {}", stderr(&output));
        assert_eq!(mounts_at_mountpoint(&world), before, "{state}");
    };
    assert_refused("both processes run");
    let [supervisor, server] = world.processes()[..] else { panic!("expected two processes") };
    server.signal(Signal::STOP).unwrap();
    assert_refused("the server is stopped");
    server.signal(Signal::CONT).unwrap();
    supervisor.signal(Signal::KILL).unwrap();
    assert!(supervisor.wait_for_exit(Duration::from_secs(10)).unwrap());
    assert_refused("no supervisor");
    clone.tell(&format!("read 0 {}", PAGES - 1));
    world.mount(&["--serve", "decode", "--watchdog", "0"]).ok();
    assert_eq!(world.server(), server.pid);
    let processes = world.processes();
    for process in &processes {
        process.signal(Signal::KILL).unwrap();
    }
    wait_for("both processes to exit", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let output = world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
    assert!(output.status.success(), "mount must replace a dead mount: {}", stderr(&output));
    assert_ne!(mounts_at_mountpoint(&world), before);
    drop(clone);
    let ended = world.command().args(["umount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
    assert!(ended.status.success(), "{}", stderr(&ended));
}

/// A mount that hangs during its startup delays other mounts until their timeout; the error names its process.
#[test]
fn mount_times_out_and_names_a_mount_stuck_in_startup() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let records = world.runtime_dir().join("mounts");
    fs::create_dir_all(&records).unwrap();
    let directory = fs::File::open(&records).unwrap();
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let me = format!("{} (", std::process::id());
    let refused = world.mount(&[]).exits(75).says("waiting for the startup of another mount");
    assert!(refused.err.contains(&me), "{}", refused.err);
    drop(directory);
    world.mount(&[]).ok();
    assert!(world.processes().iter().all(ProcessId::is_alive));
}

/// If the runtime directory is full at any step of the startup, no mount is left.
#[test]
fn mount_on_a_full_runtime_directory_leaves_no_mount() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let runtime = world.runtime_dir();
    fs::create_dir_all(&runtime).unwrap();
    let mut failed = 0;
    for files in 2..12 {
        let options = format!("size=1M,mode=755,nr_inodes={files}");
        run("mount", &["-t", "tmpfs", "none", "-o", &options, runtime.to_str().unwrap()]);
        let mounted = world.mount(&[]);
        let lines = mounts_at_mountpoint(&world);
        if mounted.code == 0 {
            world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
        }
        run("umount", &["-l", runtime.to_str().unwrap()]);
        if mounted.code == 0 {
            break;
        }
        failed += 1;
        assert!(lines.is_empty(), "with {files} files: {lines:?}\n{}", mounted.err);
    }
    assert!((3..10).contains(&failed), "{failed}");
}
