//! Hostile runtime directories: other users cannot influence root's commands, and a file of another type in place of a
//! record, socket or log neither blocks a command nor redirects its writes.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
use serde_json::{Value, json};
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run};
use crate::support::store::guest_like;

const OTHER_USER: u32 = 12345;

/// Exit codes of docs/reference/exit-codes-and-json.md.
const CODES: [i32; 8] = [0, 1, 2, 3, 4, 5, 6, 75];

/// Longest duration of a command, whatever the runtime directory contains.
const LIMIT: Duration = Duration::from_secs(5);

/// Runs `stencil` with this umask.
fn under(world: &TestMount, umask: &str, args: &[&str]) -> Run {
    let mut command = world.command_in("sh");
    command.args(["-c", "umask $0; exec \"$@\"", umask, STENCIL]).args(args);
    Run::of(format!("{args:?} with umask {umask}"), &command.output().unwrap())
}

/// Launches a clone with a port, and a simulated one.
fn launch_clones(world: &TestMount, umask: &str) {
    let args = ["clone", "web:1", "--ready", "notify", "--", "sh", "-c"];
    let script = "echo {port:80}; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 3000";
    under(world, umask, &[&args[..], &[script]].concat()).ok();
    under(world, umask, &["clone", "web:1", "--simulate", "read=10%"]).ok();
}

/// Output of root's commands on mounts and clones, without values that change by themselves.
fn root_view(world: &TestMount) -> Value {
    let ps = world.json(&["ps"]);
    let ids: Vec<&Value> = ps["clones"].as_array().unwrap().iter().map(|c| &c["id"]).collect();
    let states: Vec<&Value> = ps["clones"].as_array().unwrap().iter().map(|c| &c["state"]).collect();
    let status = world.status();
    let density = world.json(&["density"]);
    json!({
        "ids": ids, "states": states, "supervisor": status["supervisor_pid"], "clones": density["totals"]["clones"],
        "leases": world.json(&["inspect", "web:1"])["leases"],
    })
}

fn all_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.clone());
        if path.symlink_metadata().unwrap().is_dir() {
            found.extend(all_below(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn other_users_cannot_change_the_runtime_directory() {
    let _host = host::shared();
    for umask in ["0", "077", "0777"] {
        let world = TestMount::unmounted();
        world.open_to_others();
        world.import_bytes(&guest_like(1, 1 << 20), "web:1");
        world.import_bytes(&guest_like(2, 1 << 20), "other");
        under(&world, umask, &["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"]).ok();
        launch_clones(&world, umask);
        // A lease leaves its directory behind.
        under(&world, umask, &["export", "web:1", world.dir().join("out").to_str().unwrap()]).ok();
        let runtime = world.runtime_dir();
        let metadata = |path: &Path| path.symlink_metadata().unwrap();
        assert_eq!(metadata(&runtime).mode() & 0o7777, 0o755, "{umask}");
        for path in all_below(&runtime) {
            let found = metadata(&path);
            let depth = path.strip_prefix(&runtime).unwrap().components().count();
            let expected = if found.is_dir() { 0o700 } else { 0o600 };
            if !found.is_symlink() && (depth == 1 || path.file_name().unwrap() != "qmp.sock") {
                assert_eq!(found.mode() & 0o7777, expected, "{umask}: {}", path.display());
            }
        }

        let before = root_view(&world);
        let directories = ["mounts", "clones", "launches", "ports", "leases"];
        for name in directories {
            let path = runtime.join(name);
            let directory = path.to_str().unwrap();
            let inside = all_below(&path).into_iter().next().unwrap_or(path.join("x"));
            for attempt in [
                "echo '{}' >$0/c0000001",
                "mkdir $0/c0000001",
                "mkfifo $0/c0000001",
                "ln -s /etc $0/c0000001",
                "mv $0 $0.old",
                "mv $1 $1.old",
                "rm -rf $1 && ! test -e $1",
                "ln $1 $0/../x",
                "chmod 777 $0",
                "ls $0",
                "flock -n -x $0 true",
                "flock -n -s $0 true",
                "flock -n -x $1 true",
                "python3 -c 'import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1]+\"/s\")' $0",
            ] {
                let tried = Command::new("setpriv")
                    .args([
                        "--reuid=12345",
                        "--regid=12345",
                        "--clear-groups",
                        "sh",
                        "-c",
                        attempt,
                        directory,
                    ])
                    .arg(&inside)
                    .stderr(Stdio::null())
                    .stdout(Stdio::null())
                    .status()
                    .unwrap();
                assert!(
                    !tried.success(),
                    "umask {umask}: another user succeeded with: {attempt} in {directory}"
                );
            }
        }
        assert_eq!(root_view(&world), before, "{umask}");
        world.stencil(&["rm", "other"]).ok();
        launch_clones(&world, umask);
        let mnt = world.mountpoint().to_str().unwrap();
        world.stencil(&["mount", mnt]).exits(5);
        world.stencil(&["umount", mnt]).exits(5);
        assert!(world.stencil(&["stop", "--all"]).ok().out.contains("4 clones stopped"));
        world.stencil(&["umount", mnt]).ok();
        assert_eq!(all_below(&runtime.join("mounts")), Vec::<PathBuf>::new());
    }
}

/// A process that Stencil has not started.
struct Victim(Child);

impl Victim {
    fn start() -> Victim {
        Victim(Command::new("sleep").arg("3000").spawn().unwrap())
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A clone record that names this process.
fn record_of(victim: &Victim, dir: &Path) -> Value {
    let process = ProcessId::of(victim.0.id()).unwrap().unwrap();
    json!({
        "pid": process.pid, "identity": process.identity,
        "id": dir.file_name().unwrap().to_str().unwrap(), "reference": "web:1", "digest": "ab".repeat(32),
        "kind": "command", "dir": dir, "created": 1, "index": 0, "launch": "c1234567.1.1",
        "store": {"path": "/store", "id": "ab".repeat(16)}, "ports": {}, "disks": [], "jail_bytes": 0,
    })
}

fn plant(dir: &Path, record: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::set_permissions(dir, Permissions::from_mode(0o700)).unwrap();
    fs::write(dir.join("clone.json"), record.to_string()).unwrap();
}

#[test]
fn refuses_a_runtime_directory_of_another_user() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let mnt = world.mountpoint().to_str().unwrap();
    let mut victim = Victim::start();
    // Owned by the other user; owned by root, below a directory of the other user; writable by all; reached
    // through a symlink of the other user.
    let theirs = world.dir().join("theirs");
    for name in ["theirs", "theirs/below", "open", "roots"] {
        let runtime = world.dir().join(name);
        let clone = runtime.join("clones/c0000001");
        plant(&clone, &record_of(&victim, &clone));
    }
    chown(&theirs, Some(OTHER_USER), None).unwrap();
    fs::set_permissions(world.dir().join("open"), Permissions::from_mode(0o777)).unwrap();
    symlink(world.dir().join("roots"), world.dir().join("link")).unwrap();
    std::os::unix::fs::lchown(world.dir().join("link"), Some(OTHER_USER), None).unwrap();
    for (name, why) in [
        ("theirs", "owned by user 12345"),
        ("theirs/below", "owned by user 12345"),
        ("link", "owned by user 12345"),
        ("open", "mode 0777"),
    ] {
        let runtime = world.dir().join(name);
        let before = all_below(&runtime);
        let commands: [&[&str]; 9] = [
            &["ps"],
            &["status"],
            &["stop", "--all"],
            &["stop", "c0000001"],
            &["density"],
            &["mount", mnt],
            &["rm", "web:1"],
            &["clone", "web:1", "--simulate", "read=1%"],
            &["umount", mnt],
        ];
        for args in commands {
            let output = world.command().args(args).env("STENCIL_RUNTIME_DIR", &runtime).output().unwrap();
            let refused = Run::of(format!("{args:?} in {name}"), &output).exits(1);
            assert!(refused.err.contains(why), "{refused:?}");
            assert!(refused.err.contains("STENCIL_RUNTIME_DIR"), "{refused:?}");
        }
        assert!(victim.is_alive(), "{name}");
        assert_eq!(all_below(&runtime), before, "{name}");
    }
    world.stencil(&["inspect", "web:1"]).ok();
}

/// A record that another user owns or can write, or with invalid fields, is reported and never acted upon.
#[test]
fn planted_records_end_no_process_and_remove_no_file() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let mut victim = Victim::start();
    let dir = world.runtime_dir().join("clones/c0000001");
    // The target of names with `../`.
    let outside = world.dir().join("outside");
    fs::create_dir_all(outside.join("disk-")).unwrap();
    let disk = outside.join("guest.qcow2");
    fs::write(&disk, "a guest's").unwrap();
    let valid = record_of(&victim, &dir);
    let with = |field: &str, value: Value| {
        let mut record = valid.clone();
        record[field] = value;
        record
    };
    let up = format!("/../..{}", outside.join("guest").display());
    let disks = json!([format!("x{up}"), "../guest", "guest"]);
    let cases = [
        ("id", with("id", json!("../mounts"))),
        ("id", with("id", json!("c0000002"))),
        ("pid", with("pid", json!(1 << 30))),
        ("launch", with("launch", json!("../../x"))),
        ("disks", with("disks", disks)),
        ("disk_dir", with("disk_dir", json!("../outside"))),
        ("jail", with("jail", json!(outside))),
        ("jail", with("jail", json!("../c0000001"))),
        ("digest", with("digest", json!("../x"))),
    ];
    for (field, record) in &cases {
        plant(&dir, record);
        let stopped = world.stencil(&["stop", "--all"]).exits(1);
        assert!(stopped.err.contains(&format!("invalid {field}")), "{stopped:?}");
        world.stencil(&["stop", "c0000001"]).exits(1);
        assert!(world.stencil(&["ps"]).ok().err.contains("c0000001"));
        assert!(victim.is_alive() && disk.exists() && dir.join("clone.json").exists(), "{field}");
    }
    for (reason, change) in [
        ("owned by user 12345", (|dir| chown(dir, Some(OTHER_USER), None).unwrap()) as fn(&Path)),
        ("owned by user 12345", |dir| chown(dir.join("clone.json"), Some(OTHER_USER), None).unwrap()),
        ("writable by other users", |dir| fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap()),
        ("writable by other users", |dir| {
            fs::set_permissions(dir.join("clone.json"), Permissions::from_mode(0o666)).unwrap();
        }),
    ] {
        fs::remove_dir_all(&dir).unwrap();
        plant(&dir, &valid);
        change(&dir);
        let stopped = world.stencil(&["stop", "--all"]).exits(1);
        assert!(stopped.err.contains(reason), "{stopped:?}");
        assert!(victim.is_alive(), "{reason}");
    }
    fs::remove_dir_all(&dir).unwrap();
    // The record of simulated clones.
    let shared = |common: &Value, pid: &Value| {
        let mut common = common.clone();
        (common["kind"], common["pid"]) = (json!("simulated"), json!(0));
        let clone = json!({"clone": {"index": 0, "pid": pid, "identity": valid["identity"]}});
        let common = json!({"common": {"entry": common, "mapped": "", "touched": ""}});
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        fs::write(dir.join("clones.jsonl"), format!("{common}\n{clone}\n")).unwrap();
    };
    for (reason, common, pid, mode) in [
        ("invalid id", with("id", json!("c0000002")), &valid["pid"], 0o600),
        ("invalid launch", with("launch", json!("../../x")), &valid["pid"], 0o600),
        ("invalid pid", valid.clone(), &json!(1 << 30), 0o600),
        ("writable by other users", valid.clone(), &valid["pid"], 0o666),
    ] {
        shared(&common, pid);
        fs::set_permissions(dir.join("clones.jsonl"), Permissions::from_mode(mode)).unwrap();
        let stopped = world.stencil(&["stop", "--all"]).exits(1);
        assert!(stopped.err.contains(reason), "{stopped:?}");
        world.stencil(&["stop", "c0000001-0"]).exits(1);
        assert!(victim.is_alive(), "{reason}");
        fs::remove_dir_all(&dir).unwrap();
    }
    // A reused process ID belongs to another process.
    plant(&dir, &with("identity", json!(valid["identity"].as_u64().unwrap() + 1)));
    world.stencil(&["stop", "--all"]).ok();
    assert!(victim.is_alive());
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Link,
    Fifo,
    Socket,
    Device,
    Directory,
    Endless,
    Garbage,
}

const KINDS: [Kind; 7] =
    [Kind::Link, Kind::Fifo, Kind::Socket, Kind::Device, Kind::Directory, Kind::Endless, Kind::Garbage];

/// Moves the file at `path` to `aside` and creates a file of another kind at `path`.
fn replace(path: &Path, aside: &Path, kind: Kind) -> Option<rustix::fd::OwnedFd> {
    fs::rename(path, aside).unwrap();
    let mode = Mode::RUSR | Mode::WUSR;
    match kind {
        Kind::Link => symlink(aside, path).unwrap(),
        Kind::Fifo => mknodat(CWD, path, FileType::Fifo, mode, 0).unwrap(),
        Kind::Device => mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(1, 5)).unwrap(),
        Kind::Directory => fs::create_dir(path).unwrap(),
        Kind::Endless => fs::File::create(path).unwrap().set_len(1 << 40).unwrap(),
        Kind::Garbage => fs::write(path, b"{\"id\":\"../..\",\"pid\":1}\xff").unwrap(),
        Kind::Socket => {
            // Accepts connections and never responds.
            let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
            let directory = fs::File::open(path.parent().unwrap()).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            let short = format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&directory));
            bind(&listener, &SocketAddrUnix::new(short).unwrap()).unwrap();
            listen(&listener, 8).unwrap();
            return Some(listener);
        }
    }
    None
}

/// All paths below a directory: files with their contents, symlinks with their targets, others with their mode.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let read = |path: &Path| match fs::symlink_metadata(path).unwrap() {
        found if found.is_file() && found.len() < 1 << 20 => fs::read(path).unwrap(),
        found if found.is_symlink() => fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec(),
        found => format!("{:o}", found.mode()).into_bytes(),
    };
    all_below(directory).into_iter().map(|path| (path.clone(), read(&path))).collect()
}

/// Runs a command and asserts that it ends within [`LIMIT`]; on a slow host, at the second attempt.
fn in_time(world: &TestMount, args: &[&str], what: &str) -> Run {
    let run = |args: &[&str]| {
        let start = Instant::now();
        let output =
            world.command_in("timeout").args(["-s", "KILL", "30", STENCIL]).args(args).output().unwrap();
        (Run::of(format!("{args:?} with {what}"), &output), start.elapsed())
    };
    let (mut ran, mut took) = run(args);
    if took > LIMIT {
        (ran, took) = run(args);
    }
    assert!(took <= LIMIT, "{args:?} with {what} took {took:?}: {ran:?}");
    assert!(CODES.contains(&ran.code), "{ran:?}");
    ran
}

#[test]
fn soak_replaced_runtime_files_neither_block_nor_redirect() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    launch_clones(&world, "022");
    let runtime = world.runtime_dir();
    let mnt = world.mountpoint().to_str().unwrap().to_owned();
    let ids: Vec<String> = world.stencil(&["ps", "--ids"]).ok().out.lines().map(str::to_owned).collect();
    let paths = all_below(&runtime);
    assert!(paths.len() > 12, "{paths:?}");
    let outside = world.dir().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("guest.qcow2"), "a guest's").unwrap();
    let aside = outside.join("aside");

    let others: [&[&str]; 7] = [
        &["logs", &ids[0]],
        &["density"],
        &["dirty", &ids[1]],
        &["umount", &mnt],
        &["rm", "web:1"],
        &["mount", &mnt],
        &["inspect", "web:1"],
    ];
    let mut turn = 0;
    for path in &paths {
        for kind in KINDS {
            let what = format!("{kind:?} at {}", path.strip_prefix(&runtime).unwrap().display());
            let _listener = replace(path, &aside, kind);
            let before = contents(&outside);
            let first: &[&str] = if turn % 2 == 0 { &["status"] } else { &["ps"] };
            let commands = [first, others[turn % others.len()]];
            turn += 1;
            let all = if host::rounds("", "all") == "all" { &others[..] } else { &commands[..] };
            for args in all {
                in_time(&world, args, &what);
            }
            // The supervisor may have written to its log meanwhile.
            let mut after = contents(&outside);
            let mut before = before;
            for found in [&mut before, &mut after] {
                found.retain(|path, _| !path.ends_with("log") && path != &aside || kind == Kind::Link);
            }
            assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{what}");
            match path.symlink_metadata() {
                Ok(found) if found.is_dir() => fs::remove_dir_all(path).unwrap(),
                Ok(_) => fs::remove_file(path).unwrap(),
                Err(_) => {}
            }
            fs::rename(&aside, path).unwrap();
        }
    }
    assert_eq!(fs::read(outside.join("guest.qcow2")).unwrap(), b"a guest's");

    // With each kind in place of a record: `stop` ends the other clone, and the clone of the record stays alive.
    let directory = |id: &str| runtime.join("clones").join(id.split('-').next().unwrap());
    let [mut first, mut second] = [directory(&ids[0]), directory(&ids[1])];
    if !first.join("clone.json").exists() {
        // Simulated clones have a record of another name.
        std::mem::swap(&mut first, &mut second);
    }
    let record: Value = serde_json::from_slice(&fs::read(first.join("clone.json")).unwrap()).unwrap();
    for kind in KINDS {
        let what = format!("{kind:?} in place of a record");
        let _listener = replace(&first.join("clone.json"), &aside, kind);
        in_time(&world, &["stop", "--all"], &what).exits(1);
        assert!(!second.exists() && first.exists(), "{what}");
        let path = first.join("clone.json");
        if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) }.unwrap();
        fs::rename(&aside, &path).unwrap();
        assert!(Path::new(&format!("/proc/{}", record["pid"])).exists(), "{what}");
    }
    in_time(&world, &["stop", "--all"], "nothing").ok();
    in_time(&world, &["umount", &mnt], "nothing").ok();
    run("test", &["!", "-e", first.to_str().unwrap()]);
}

/// A launch that waits for the lock on the ports, which another process holds, ends on SIGTERM.
#[test]
fn a_launch_that_waits_for_a_held_lock_ends_on_a_signal() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let ports = world.runtime_dir().join("ports");
    fs::create_dir(&ports).unwrap();
    let holder = fs::File::open(&ports).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let args = ["clone", "web:1", "--ready", "notify", "--", "sh", "-c", "sleep 3000 {port:80}"];
    let launcher = world.command().args(args).stderr(Stdio::piped()).spawn().unwrap();
    let record = || fs::read_dir(world.runtime_dir().join("clones")).ok()?.next();
    crate::support::mount::wait_for("the record of the clone", record).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&launcher), rustix::process::Signal::TERM)
        .unwrap();
    let started = Instant::now();
    let ended = launcher.wait_with_output().unwrap();
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert_eq!(fs::read_dir(world.runtime_dir().join("clones")).unwrap().count(), 0);
}

/// With cgroup v1, a clone in a frozen cgroup cannot be killed: the error says how to thaw the cgroup.
#[test]
fn stop_explains_how_to_thaw_a_frozen_clone() {
    let _host = host::shared();
    let Some(group) = Some(Path::new("/sys/fs/cgroup/freezer")).filter(|path| path.is_dir()) else {
        println!("skipped: no cgroup v1 freezer is mounted");
        return;
    };
    let group = group.join(format!("stencil-test-{}", std::process::id()));
    let world = TestMount::new("decode");
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let launched = world.json(&["clone", "web:1", "--simulate", "read=10%"]);
    fs::create_dir(&group).unwrap();
    let write = |file: &str, text: &str| fs::write(group.join(file), text).unwrap();
    write("tasks", &launched["clones"][0]["pid"].to_string());
    write("freezer.state", "FROZEN");
    let stopped = world.stencil(&["stop", "--all", "--grace", "0"]);
    write("freezer.state", "THAWED");
    let refused = stopped.exits(75);
    let state = group.join("freezer.state");
    assert!(refused.err.contains("is frozen by its cgroup"), "{refused:?}");
    assert!(refused.err.contains(&format!("echo THAWED > {}", state.display())), "{refused:?}");
    world.stencil(&["stop", "--all"]).ok();
    crate::support::mount::wait_for("the cgroup to be empty", || fs::remove_dir(&group).ok());
}
