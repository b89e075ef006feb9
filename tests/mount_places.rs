//! Two mounts that want one place: never is a living one taken away, never do two lie on each other.

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

/// What is mounted there, lowest first.
fn there(world: &TestMount) -> Vec<procfs::MountLine> {
    let mut all = procfs::mounts().unwrap();
    all.retain(|line| line.mountpoint == world.mountpoint());
    assert!(all.iter().all(|line| line.fs_type == FS_TYPE), "{all:?}");
    all
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Of two stores that are mounted on one place at once one is there, and it is the one whose command said so.
#[test]
fn soak_of_two_mounts_at_once_one_is_there() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    let stores = ["a", "b"].map(|name| world.dir().join(name));
    for store in &stores {
        stencilfs::store::Store::open_or_create(store).unwrap();
    }
    for round in 0..host::rounds(10, 150) {
        let start = |store: &std::path::Path| {
            let mut command = world.command();
            command.arg("--store").arg(store).args(["mount", mnt]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        // Now the one first, now the other.
        let mut children = [round % 2, (round + 1) % 2].map(|at| (at as usize, start(&stores[at as usize])));
        children.sort_by_key(|(at, _)| *at);
        let outputs = children.map(|(_, child)| child.wait_with_output().unwrap());
        let codes = [0, 1].map(|at| outputs[at].status.code());
        let winner = codes.iter().position(|code| *code == Some(0)).unwrap_or_else(|| panic!("{outputs:?}"));
        assert_eq!(codes[1 - winner], Some(5), "round {round}: {}", said(&outputs[1 - winner]));
        let lines = there(&world);
        assert_eq!(lines.len(), 1, "round {round}: {lines:?}");
        assert_eq!(std::path::Path::new(&lines[0].source), stores[winner], "round {round}");
        assert_eq!(world.status()["device"].as_u64(), Some(lines[0].dev), "round {round}");
        assert_eq!(fs::read_dir(mnt).unwrap().count(), 2, "round {round}: it answers");
        world.stencil(&["umount", mnt]).ok();
        assert!(there(&world).is_empty(), "round {round}");
    }
}

/// A mount of another runtime directory has no record here and lives all the same: with both of its processes, with a
/// server that stands still, and with its server alone.
#[test]
fn a_living_mount_of_another_runtime_directory_stays() {
    const PAGES: u64 = 64;
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&crate::support::store::random(5, (PAGES * 4096) as usize), "web:1");
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), PAGES * 4096));
    let other = world.dir().join("elsewhere");
    let mnt = world.mountpoint().to_str().unwrap();
    let before = there(&world);
    let refused = |state: &str| {
        let output =
            world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{state}: {}", said(&output));
        let remedy = format!("STENCIL_RUNTIME_DIR={} stencil umount {mnt}", world.runtime_dir().display());
        assert!(said(&output).contains(&remedy), "{state}: {}", said(&output));
        assert_eq!(there(&world), before, "{state}");
    };
    refused("both live");
    let [supervisor, server] = world.processes()[..] else { panic!("two") };
    server.signal(Signal::STOP).unwrap();
    refused("a server that stands still");
    server.signal(Signal::CONT).unwrap();
    supervisor.signal(Signal::KILL).unwrap();
    assert!(supervisor.wait_gone(Duration::from_secs(10)).unwrap());
    refused("no supervisor");
    clone.tell(&format!("read 0 {}", PAGES - 1));
    world.mount(&["--serve", "decode", "--watchdog", "0"]).ok();
    assert_eq!(world.server(), server.pid);
    let processes = world.processes();
    for process in &processes {
        process.signal(Signal::KILL).unwrap();
    }
    wait_for("their end", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    let output = world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
    assert!(output.status.success(), "a dead one is taken away: {}", said(&output));
    assert_ne!(there(&world), before);
    drop(clone);
    let ended = world.command().args(["umount", mnt]).env("STENCIL_RUNTIME_DIR", &other).output().unwrap();
    assert!(ended.status.success(), "{}", said(&ended));
}

/// A mount that hangs while it begins holds others up for a while only, and is named.
#[test]
fn a_mount_that_does_not_come_to_an_end_is_named() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let records = world.runtime_dir().join("mounts");
    fs::create_dir_all(&records).unwrap();
    let folder = fs::File::open(&records).unwrap();
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let me = format!("{} (", std::process::id());
    let refused = world.mount(&[]).exits(75).says("waiting for the startup of another mount");
    assert!(refused.err.contains(&me), "{}", refused.err);
    drop(folder);
    world.mount(&[]).ok();
    assert!(world.processes().iter().all(ProcessId::is_alive));
}

/// At whatever step of a mount's begin the runtime directory is full, nothing is left of it.
#[test]
fn a_runtime_directory_that_is_full_leaves_no_mount() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let runtime = world.runtime_dir();
    fs::create_dir_all(&runtime).unwrap();
    let mut refused = 0;
    for files in 2..12 {
        let words = format!("size=1M,mode=755,nr_inodes={files}");
        run("mount", &["-t", "tmpfs", "none", "-o", &words, runtime.to_str().unwrap()]);
        let mounted = world.mount(&[]);
        let lines = there(&world);
        if mounted.code == 0 {
            world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
        }
        run("umount", &["-l", runtime.to_str().unwrap()]);
        if mounted.code == 0 {
            break;
        }
        refused += 1;
        assert!(lines.is_empty(), "with {files} files: {lines:?}\n{}", mounted.err);
    }
    assert!((3..10).contains(&refused), "{refused}");
}
