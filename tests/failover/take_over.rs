//! Takeovers at difficult moments: while a server starts, after a request was sent twice, while a mount starts, and
//! with servers that were ended but do not exit.

use std::fs::{self, File};
use std::io::Seek;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::{Value, json};
use stencilfs::control::{self, Request, Snapshot};
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::daemon::passing::Running;
use crate::support::daemon::readers::{Image, PAGE};
use crate::support::mount::{TestMount, daemon, run, wait_for};
use crate::support::{daemon::link, host};

pub const IMAGE: Image = Image { salt: 12, pages: 2 << 10 };

fn map(path: &Path) -> Actor {
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
    clone
}

/// Kills the supervisor and waits until it is gone.
fn kill_supervisor(world: &TestMount) {
    let process = world.processes()[0];
    process.signal(Signal::KILL).unwrap();
    assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap());
}

/// A store outage: the store is moved away until drop.
struct Away(PathBuf, PathBuf);

impl Away {
    fn take(store: &Path) -> Away {
        let aside = store.with_file_name("aside");
        fs::rename(store, &aside).unwrap();
        Away(aside, store.to_owned())
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let _ = fs::rename(&self.0, &self.1);
    }
}

/// Returns the server that the supervisor has recorded as serving. `stencil status` cannot be used because it needs the
/// store.
fn serving(world: &TestMount) -> Option<u32> {
    let record = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap();
    let (_, file) = control::ask(&record.path(), &Request::Snapshot).unwrap();
    let mut file = File::from(file.expect("no snapshot in the reply"));
    file.rewind().unwrap();
    let snapshot: Snapshot = serde_json::from_reader(file).unwrap();
    snapshot.server.map(|row| row.process.pid)
}

/// A server that waits for its store at startup is adopted: the mount answers as soon as the server does, and is not
/// given up although no server serves yet.
#[test]
fn a_starting_server_is_adopted_as_starting() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = map(&world.file(&digest, "memory"));
    assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
    let first = world.recorded_server().unwrap();
    let away = Away::take(&world.store_dir());
    first.signal(Signal::KILL).unwrap();
    let second = wait_for("a successor", || world.recorded_server().filter(|s| *s != first && s.is_alive()));
    clone.begin("hash 0 900");
    kill_supervisor(&world);
    world.mount(&["--serve", "decode", "--watchdog", "0"]).ok();
    assert_eq!(world.recorded_server(), Some(second), "the same server");
    assert_eq!(serving(&world), None, "the server is recorded as serving before it has reported that");
    drop(away);
    assert_eq!(clone.answer(), Ok(IMAGE.hash(900)));
    assert_eq!(world.server(), second.pid);
    assert_eq!(world.status()["restarts"], 1);
    world.kill_server();
    assert_eq!(clone.tell("hash 0 1700"), IMAGE.hash(1700));
}

/// The server's request is still in the socket of the dead supervisor, and is sent again to its successor.
#[test]
fn a_reservation_sent_twice_is_made_once() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "auto", "--cache-size", "64M"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    let link = link::link_of(server.pid);
    link.set_timeout(Duration::from_secs(10)).unwrap();
    server.signal(Signal::STOP).unwrap();
    kill_supervisor(&world);
    // When the supervisor dies, the kernel sends SIGHUP and SIGCONT to the stopped server, whose process group becomes
    // orphaned.
    std::thread::sleep(Duration::from_millis(100));
    assert!(server.is_alive(), "the server has died of SIGHUP");
    let bytes = 8u64 << 20;
    let reserve = json!({ "reserve": { "key": link::absent_key(1), "size": bytes, "data_bytes": bytes } });
    for _ in 0..2 {
        link.send(&link::request(1_000_000, &reserve), None).unwrap();
    }
    world.mount(&[]).ok();
    let mut files = 0;
    let mut replies = Vec::new();
    while files == 0 {
        let (reply, file) = link.receive::<Value>().unwrap().expect("the supervisor has exited");
        files += u32::from(file.is_some());
        replies.push(reply);
    }
    // A reply to the second reservation would arrive before the reply to the next request.
    let next = json!({ "progress": { "key": link::absent_key(1), "bytes": 4096 } });
    link.send(&link::request(1_000_001, &next), None).unwrap();
    while replies.last().unwrap()["number"] != 1_000_001 {
        let (reply, file) = link.receive::<Value>().unwrap().expect("the supervisor has exited");
        files += u32::from(file.is_some());
        replies.push(reply);
    }
    let answers = |number: u64| replies.iter().filter(|reply| reply["number"] == number).count();
    assert_eq!((answers(0), answers(1_000_000), files), (1, 1, 1), "{replies:#?}");
    assert_eq!(replies[0]["body"], "ask_again");
    assert_eq!(world.status()["cache_used"], bytes, "expected exactly one reservation");
    server.signal(Signal::KILL).unwrap();
    wait_for("a successor", || (world.server() != server.pid).then_some(()));
    assert_eq!(world.status()["cache_used"], 0, "the reservation of the dead server was not released");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == IMAGE.bytes());
}

/// A frozen control group (freezer, v1): its processes do not run, and not even SIGKILL ends them before drop thaws
/// them.
struct Frozen(PathBuf, Option<PathBuf>);

impl Frozen {
    fn new(dir: &Path) -> Frozen {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let there = text.lines().find(|line| line.contains(" - cgroup ") && line.ends_with("freezer"));
        let (top, own) = match there.and_then(|line| line.split(' ').nth(4)) {
            Some(top) => (PathBuf::from(top), None),
            None => {
                let top = dir.join("freezer");
                fs::create_dir(&top).unwrap();
                let flags = rustix::mount::MountFlags::empty();
                rustix::mount::mount("none", &top, "cgroup", flags, Some(c"freezer"))
                    .expect("cannot mount the freezer of cgroup v1");
                (top.clone(), Some(top))
            }
        };
        let group = top.join(format!("stencil-{}", dir.file_name().unwrap().display()));
        fs::create_dir(&group).unwrap();
        fs::write(group.join("freezer.state"), "FROZEN").unwrap();
        Frozen(group, own)
    }

    fn add(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        let until = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        if let Some(top) = &self.1 {
            let _ = rustix::mount::unmount(top, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Many servers are ended and do not exit: the exit of each is noticed, also by the next supervisor.
#[test]
fn the_late_exit_of_every_replaced_server_is_noticed() {
    const SERVERS: usize = 11;
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = map(&world.file(&digest, "memory"));
    let frozen = Frozen::new(world.dir());
    let program = daemon();
    let mut replaced = Vec::new();
    for round in 0..SERVERS {
        let server = ProcessId::of(world.server()).unwrap().unwrap();
        frozen.add(server.pid);
        let restart =
            ["restart", "--server", program.to_str().unwrap(), world.mountpoint().to_str().unwrap()];
        world.stencil(&restart).ok();
        replaced.push(server);
        let page = round as u64 * 100;
        assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page));
    }
    assert!(replaced.iter().all(ProcessId::is_alive), "a frozen server has exited");
    kill_supervisor(&world);
    world.mount(&[]).ok();
    let noticed = |pid: u32| world.log().contains(&format!("server {pid} exited"));
    assert!(replaced.iter().all(|server| !noticed(server.pid)));
    drop(frozen);
    for server in &replaced {
        wait_for("the log of a server's exit", || noticed(server.pid).then_some(()));
    }
    for page in (50..IMAGE.pages).step_by(100) {
        assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page));
    }
    drop(File::open(world.file(&digest, "memory")).unwrap());
}

/// A child of the supervisor that cannot exit, as if its disk did not answer, must not block the next supervisor.
#[test]
fn a_stuck_job_of_a_dead_supervisor_does_not_block_takeover() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = map(&world.file(&digest, "memory"));
    assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
    let [supervisor, server] = world.processes()[..] else { panic!("expected supervisor and server") };
    let frozen = Frozen::new(world.dir());
    let link = link::link_of(server.pid);
    let children = format!("/proc/{0}/task/{0}/children", supervisor.pid);
    // The job scans for users of the backing for at least 200 ms.
    let evict = json!({ "evict": { "keys": [link::absent_key(1)] } });
    link.send(&link::request(1_000_000, &evict), None).unwrap();
    let job = wait_for("a job", || {
        let text = fs::read_to_string(&children).unwrap();
        let pid = text.split_whitespace().map(|word| word.parse().unwrap()).find(|pid| *pid != server.pid)?;
        frozen.add(pid);
        ProcessId::of(pid).unwrap()
    });
    kill_supervisor(&world);
    assert!(job.is_alive(), "the frozen job has exited");
    world.mount(&[]).ok();
    assert_eq!(world.recorded_server(), Some(server), "the same server");
    assert!(job.is_alive());
    assert_eq!(clone.tell("hash 0 900"), IMAGE.hash(900));
    drop(frozen);
    wait_for("the exit of the job", || (!job.is_alive()).then_some(()));
    world.kill_server();
    assert_eq!(clone.tell("hash 0 1700"), IMAGE.hash(1700));
}

/// Changes the ledger of a dead supervisor; its layout is documented in `mountd/src/protocol/ledger.rs`.
fn amend_ledger(server: u32, change: impl FnOnce(&mut Value)) {
    const HALF: u64 = 16 << 20;
    let ledger = link::descriptor_of(server, "ledger");
    let path = format!("/proc/self/fd/{}", ledger.as_raw_fd());
    let ledger = File::options().read(true).write(true).open(path).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        ledger.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let turn = number(0).max(number(HALF));
    let mut text = vec![0; number(turn % 2 * HALF + 8) as usize];
    ledger.read_exact_at(&mut text, turn % 2 * HALF + 48).unwrap();
    let mut snapshot = serde_json::from_slice(&text).unwrap();
    change(&mut snapshot);
    let text = snapshot.to_string().into_bytes();
    let (turn, length) = ((turn + 1).to_le_bytes(), (text.len() as u64).to_le_bytes());
    let record = [&turn[..], &length, blake3::hash(&text).as_bytes(), &text].concat();
    ledger.write_all_at(&record, u64::from_le_bytes(turn) % 2 * HALF).unwrap();
}

/// A removal waits for replaced servers that have not exited, but not for a process that has reused the PID of such a
/// server.
#[test]
fn rm_does_not_wait_for_a_process_with_a_reused_pid() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode"]);
    world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut unrelated = Running(std::process::Command::new("sleep").arg("1000").spawn().unwrap());
    let pid = unrelated.0.id();
    let identity = ProcessId::of(pid).unwrap().unwrap().identity;
    kill_supervisor(&world);
    amend_ledger(world.recorded_server().unwrap().pid, |snapshot| {
        assert!(snapshot["leaving"].is_array(), "{snapshot:#}");
        snapshot["leaving"] = json!([{ "pid": pid, "identity": identity - 1 }]);
    });
    world.mount(&[]).ok();
    let begun = Instant::now();
    world.stencil(&["rm", "web:1"]).ok();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());

    // With the right identity, the process counts as a replaced server.
    kill_supervisor(&world);
    amend_ledger(world.recorded_server().unwrap().pid, |snapshot| {
        snapshot["leaving"] = json!([{ "pid": pid, "identity": identity }]);
    });
    world.mount(&[]).ok();
    unrelated.0.kill().unwrap();
    unrelated.0.wait().unwrap();
    let message = format!("server {pid} exited");
    wait_for("the log of the exit", || world.log().contains(&message).then_some(()));
}

/// After a failed takeover the server still serves and the record is unchanged, so that a later takeover succeeds.
#[test]
fn a_failed_takeover_leaves_the_mount_as_it_was() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = map(&world.file(&digest, "memory"));
    assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
    kill_supervisor(&world);
    let record = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap().path();
    let original = fs::read(record.join("mount.json")).unwrap();
    let mut other: Value = serde_json::from_slice(&original).unwrap();
    other["ledger"] = json!([1, 2]);
    fs::write(record.join("mount.json"), other.to_string()).unwrap();
    world.mount(&["--serve", "decode"]).says("cannot take over the mount").says("serves its clones until");
    assert_eq!(clone.tell("hash 0 900"), IMAGE.hash(900));
    let restart = ["restart", world.mountpoint().to_str().unwrap()];
    world.stencil(&restart).exits(1).says("the mount has lost its supervisor");
    fs::write(record.join("mount.json"), original).unwrap();
    world.mount(&["--serve", "decode"]).ok();
    assert_eq!(clone.tell("hash 0 1700"), IMAGE.hash(1700));
}

/// A mount of another store is not taken over; the same store by another path is accepted. Requested options that
/// differ from the mount's options are reported.
#[test]
fn takeover_requires_the_same_store() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "decode"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = map(&world.file(&digest, "memory"));
    assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
    let server = world.recorded_server();
    kill_supervisor(&world);
    let [other, copy, bound] = ["other", "copy", "bound"].map(|name| world.dir().join(name));
    stencilfs::store::Store::open_or_create(&other).unwrap();
    run("cp", &[Path::new("-a"), &world.store_dir(), &copy]);
    fs::create_dir(&bound).unwrap();
    let mnt = world.mountpoint().to_str().unwrap();
    let mount = |store: &Path, words: &[&str]| {
        world.stencil(&[&["--store", store.to_str().unwrap(), "mount", mnt], words].concat())
    };
    for store in [&other, &copy] {
        let refused = mount(store, &[]).exits(5).says("a mount of the store");
        assert!(refused.err.contains(world.store_dir().to_str().unwrap()), "{}", refused.err);
    }
    assert_eq!(world.recorded_server(), server);
    assert!(world.processes().iter().all(|process| Some(*process) == server), "there is a new process");
    assert_eq!(clone.tell("hash 0 900"), IMAGE.hash(900));
    run("mount", &[Path::new("--bind"), &world.store_dir(), &bound]);
    let taken = mount(&bound, &["--serve", "decode", "--cache-size", "64M", "--watchdog", "7"]);
    run("umount", &[&bound]);
    let taken = taken.ok();
    assert!(
        taken.err.contains(
            "with its previous options; the requested values of cache-size, watchdog are ignored\n"
        ),
        "{}",
        taken.err
    );
    assert_eq!(world.server(), server.unwrap().pid);
    assert_eq!(clone.tell("hash 0 1700"), IMAGE.hash(1700));
}

/// The record of a dead mount is not removed while another process takes the mount over.
#[test]
fn the_record_of_a_dead_mount_is_removed_unless_locked() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let record = world.runtime_dir().join("mounts/1-1");
    fs::create_dir_all(&record).unwrap();
    let dead = json!({
        "mountpoint": world.mountpoint(), "store": world.store_dir(), "store_id": "0", "device": 1, "supervisor_pid": 1,
        "supervisor_identity": 7, "server_pid": 1, "server_identity": 7, "version": "0", "ledger": [1, 1],
        "program": [1, 1],
    });
    fs::write(record.join("mount.json"), dead.to_string()).unwrap();
    let folder = File::open(&record).unwrap();
    flock(&folder, FlockOperation::LockExclusive).unwrap();
    world.stencil(&["ps"]).ok();
    assert!(record.exists());
    flock(&folder, FlockOperation::Unlock).unwrap();
    world.stencil(&["ps"]).ok();
    assert!(!record.exists());
}
