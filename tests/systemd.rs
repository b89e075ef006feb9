//! A mount as a service: what the supervisor tells its manager, and what the manager's second home of descriptors is
//! good for. The manager is `support::notify`; the unit file is checked as systemd reads it.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::sys::files::mount;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::notify::Manager;
use crate::support::store::random;

const UNIT: &str = "mountd/systemd/stencil@.service";
const CLONES_UNIT: &str = "mountd/systemd/stencil-clones@.service";
const PAGE: u64 = 4096;
const PAGES: u64 = 2048;
const WATCHDOG: Duration = Duration::from_millis(1500);

/// A mount that is a service, with one template and a process that maps it.
struct Service {
    // Dropped first: its process is none of the world's children.
    manager: Manager,
    world: TestMount,
    command: Command,
    bytes: Vec<u8>,
    digest: String,
}

impl Service {
    fn start(serve: &str) -> Service {
        let world = TestMount::unmounted();
        let bytes = random(11, (PAGES * PAGE) as usize);
        let digest = world.import_bytes(&bytes, "web:1");
        let mut command = world.command();
        command.args(["mount", "-f", "--serve", serve]).arg(world.mountpoint());
        let mut manager = Manager::new(world.dir(), WATCHDOG);
        manager.start(&command);
        manager.wait_heard("READY=1");
        Service { manager, world, command, bytes, digest }
    }

    /// With a process that has read every third page.
    fn used(serve: &str) -> (Service, Actor) {
        let service = Service::start(serve);
        let mut clone = service.map();
        service.reads(&mut clone, 0, 3);
        (service, clone)
    }

    fn map(&self) -> Actor {
        let mut actor = Actor::start();
        actor.tell(&format!(
            "map 0 {} 0 {} rw",
            self.world.file(&self.digest, "memory").display(),
            PAGES * PAGE
        ));
        actor
    }

    /// Every `step`th page from `first` has its bytes.
    fn reads(&self, actor: &mut Actor, first: u64, step: usize) {
        for page in (first..PAGES).step_by(step) {
            assert_eq!(
                actor.tell(&format!("read 0 {page}")) as u8,
                self.bytes[(page * PAGE) as usize],
                "page {page}"
            );
        }
    }

    fn inode(&self) -> u64 {
        fs::metadata(self.world.file(&self.digest, "memory")).unwrap().ino()
    }

    /// Kills the supervisor, which would start another server, and then that.
    fn both_die(&mut self, server: u32) {
        self.manager.end(Signal::KILL);
        let server = kill(server);
        wait_for("the server's end", || (!server.is_alive()).then_some(()));
    }

    /// Starts the service again after it has died.
    fn again(&mut self) {
        self.manager.start(&self.command);
        self.manager.wait_heard("READY=1");
    }
}

/// A clone that waits for an answer that nobody will give would hold up the test: its connection is aborted when the
/// test fails, and after half a minute.
fn abort_unless_told(device: u64) -> mpsc::Sender<()> {
    let (told, hear) = mpsc::channel();
    std::thread::spawn(move || {
        if hear.recv_timeout(Duration::from_secs(30)).is_err() {
            let _ = mount::abort_fuse_connection(device);
        }
    });
    told
}

/// What a manager keeps, once more.
fn copy(store: &[(String, OwnedFd)]) -> Vec<(String, OwnedFd)> {
    store.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
}

fn kill(pid: u32) -> ProcessId {
    let process = ProcessId::of(pid).unwrap().unwrap();
    process.signal(Signal::KILL).unwrap();
    process
}

#[test]
fn a_service_says_that_it_is_ready_lives_and_stops_and_its_server_says_nothing() {
    let _host = host::shared();
    let mut service = Service::start("passthrough");
    assert!(fs::read(service.world.file(&service.digest, "memory")).unwrap() == service.bytes, "it serves");
    service.manager.listen(Duration::from_millis(400));
    let stored = service.manager.stored();
    for name in ["fuse", "ledger", "counters", "program"] {
        assert!(stored.contains(&name), "no {name} in {stored:?}");
    }
    assert!(stored.iter().any(|name| name.starts_with("backing-")), "no backing in {stored:?}");
    let (signs, pause) = service.manager.watch(WATCHDOG * 3);
    assert!(signs >= 5 && pause < WATCHDOG, "{signs} signs of life, once none for {pause:?}");

    let status = service.world.status();
    assert_eq!(status["supervisor_pid"], service.manager.pid(), "stencil mount -f becomes the supervisor");
    let server = service.world.server();
    let environ = fs::read(format!("/proc/{server}/environ")).unwrap();
    for word in ["NOTIFY_SOCKET=", "WATCHDOG_", "LISTEN_"] {
        assert!(!String::from_utf8_lossy(&environ).contains(word), "the server knows {word}");
    }
    service.world.kill_server();
    let processes = service.world.processes();
    let ended = service.manager.end(Signal::TERM);
    assert!(ended.success(), "{ended}");
    assert!(service.manager.heard.iter().any(|word| word == "STOPPING=1"), "{:?}", service.manager.heard);
    assert!(service.manager.strangers.is_empty(), "{:?}", service.manager.strangers);
    wait_for("the server's end", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    service.manager.drop_hung_up();
    assert!(!service.manager.stored().contains(&"fuse"), "the connection is over");
}

#[test]
fn a_supervisor_that_its_manager_starts_again_finds_its_server() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::used(serve);
        let (server, inode) = (service.world.server(), service.inode());
        service.manager.end(Signal::KILL);
        service.reads(&mut clone, 1, 3);
        service.again();
        assert_eq!((service.world.server(), service.inode()), (server, inode), "{serve}");
        service.reads(&mut clone, 2, 3);
        let (signs, _) = service.manager.watch(WATCHDOG);
        assert!(signs > 0, "no sign of life of the new one");
        service.world.kill_server();
        assert!(fs::read(service.world.file(&service.digest, "memory")).unwrap() == service.bytes);
    }
}

#[test]
fn with_supervisor_and_server_dead_the_manager_has_everything() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::used(serve);
        service.manager.listen(Duration::from_millis(400));
        let world = &service.world;
        service.manager.during(|| world.kill_server());
        let restarts = service.world.status()["restarts"].as_u64();
        assert!(restarts >= Some(1));
        let (server, inode) = (service.world.server(), service.inode());
        let device = service.world.status()["device"].as_u64().unwrap();
        service.both_die(server);
        // A page that nobody has, asked for while nobody lives to answer: it comes late, and is no SIGBUS.
        clone.begin("read 0 1");
        let late = abort_unless_told(device);
        service.again();
        assert_eq!(clone.answer(), Ok(service.bytes[PAGE as usize].into()), "{serve}");
        late.send(()).unwrap();
        service.reads(&mut clone, 4, 3);
        service.reads(&mut clone, 2, 3);
        assert_eq!(service.inode(), inode, "{serve}");
        assert!(service.world.status()["restarts"].as_u64() >= restarts, "the count goes on");
        let mut second = service.map();
        service.reads(&mut second, 0, 1);
        drop((clone, second));
        assert!(service.manager.end(Signal::TERM).success());
    }
}

/// A manager may hold on to what an earlier mount of the service gave it: the next mount says what is to go, and whoever
/// takes over tells its own from it, in whatever order it comes.
#[test]
fn what_is_left_of_an_earlier_mount_is_told_from_the_present_one() {
    let _host = host::shared();
    let mut service = Service::start("passthrough");
    drop(service.map());
    service.manager.listen(Duration::from_millis(400));
    assert!(service.manager.end(Signal::TERM).success());
    service.manager.drop_hung_up();
    let kept = service.manager.stored().iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert!(kept.iter().any(|name| name == "ledger") && !kept.iter().any(|name| name == "fuse"), "{kept:?}");
    let stale = copy(&service.manager.store);

    service.again();
    service.manager.listen(Duration::from_millis(400));
    let stored = service.manager.stored();
    for name in ["fuse", "ledger", "counters", "program"] {
        assert_eq!(stored.iter().filter(|other| **other == name).count(), 1, "{name} in {stored:?}");
    }
    assert!(!stored.iter().any(|name| name.starts_with("backing-")), "the earlier mount's: {stored:?}");

    for stale_last in [false, true] {
        let mut clone = service.map();
        service.reads(&mut clone, 0, 5);
        let (server, inode) = (service.world.server(), service.inode());
        let opens = service.world.counter("opens_passthrough");
        service.manager.listen(Duration::from_millis(400));
        service.both_die(server);
        // As if it had never been told.
        let present = std::mem::take(&mut service.manager.store);
        let (first, last) = if stale_last { (present, copy(&stale)) } else { (copy(&stale), present) };
        service.manager.store = first.into_iter().chain(last).collect();
        service.again();
        service.reads(&mut clone, 1, 5);
        assert_eq!(service.inode(), inode);
        assert!(service.world.counter("opens_passthrough") >= opens, "the counters are those of this mount");
        service.manager.listen(Duration::from_millis(400));
    }
    assert!(service.manager.end(Signal::TERM).success());
}

/// As `systemctl stop` with a clone: SIGTERM, and another one after `TimeoutStopSec`.
#[test]
fn a_stop_cuts_no_clone_off_however_often_it_is_asked_for() {
    let _host = host::shared();
    let mut service = Service::start("decode");
    let mut clone = service.map();
    service.reads(&mut clone, 0, 2);
    let before = service.world.processes();
    let log = service.world.dir().join("service.log");
    for said in ["served until its last use ends", "termination signal ignored"] {
        service.manager.signal(Signal::TERM);
        wait_for(said, || fs::read_to_string(&log).unwrap().contains(said).then_some(()));
    }
    service.reads(&mut clone, 1, 2);
    assert!(before.iter().all(ProcessId::is_alive), "the same two serve it");
    drop(clone);
    assert!(service.manager.wait_end().success(), "it ends with its last user");
}

/// The service is started again while its old supervisor still drains: the old one keeps its mount and its server, and
/// the new one has a mount of its own.
#[test]
fn a_mount_that_drains_is_left_to_its_supervisor() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::used(serve);
        service.manager.listen(Duration::from_millis(400));
        let draining = service.world.processes();
        service.manager.signal(Signal::TERM);
        let mountpoint = service.world.mountpoint().to_owned();
        let detached = || mount::at(&mountpoint).unwrap().is_none().then_some(());
        wait_for("the detaching", detached);
        service.manager.listen(Duration::from_millis(400));
        let mut old = service.manager.give_up();
        service.again();
        assert!(draining.iter().all(ProcessId::is_alive), "{serve}: both of them");
        service.reads(&mut clone, 1, 3);
        let all = service.world.json(&["status"]);
        let mounts = all["mounts"].as_array().unwrap();
        assert_eq!(mounts.iter().filter(|mount| mount["detached"] == true).count(), 1, "{all:#}");
        assert_eq!(mounts.len(), 2, "{all:#}");
        let mut second = service.map();
        service.reads(&mut second, 0, 3);
        drop(clone);
        assert!(old.wait().unwrap().success());
        service.reads(&mut second, 1, 3);
        drop(second);
        assert!(service.manager.end(Signal::TERM).success());
    }
}

/// The store of the service was changed while it ran, and both of its processes died: its clones are served to their end,
/// and nobody gets the bytes of the old store under the names of the new one.
#[test]
fn what_the_manager_kept_of_another_store_is_served_and_leaves_the_tree() {
    let _host = host::shared();
    for used in [true, false] {
        let mut service = Service::start("decode");
        let clone = used.then(|| {
            let mut clone = service.map();
            service.reads(&mut clone, 0, 3);
            clone
        });
        service.manager.listen(Duration::from_millis(400));
        let server = service.world.server();
        service.both_die(server);
        let other = service.world.dir().join("other");
        let store = stencilfs::store::Store::open_or_create(&other).unwrap();
        let mut edited = service.world.command();
        edited.args(service.command.get_args()).env("STENCIL_STORE", &other);
        service.manager.start(&edited);
        if let Some(mut clone) = clone {
            let mountpoint = service.world.mountpoint();
            wait_for("the detaching", || mount::at(mountpoint).unwrap().is_none().then_some(()));
            service.reads(&mut clone, 1, 3);
        }
        assert_eq!(service.manager.wait_end().code(), Some(1), "it is to be started again");
        service.command = edited;
        service.again();
        assert_eq!(service.world.status()["store"], store.dir().to_str().unwrap());
        assert!(!service.world.file(&service.digest, "memory").exists());
        assert!(service.manager.end(Signal::TERM).success());
    }
}

#[test]
fn a_reload_keeps_the_process_that_the_manager_knows() {
    let _host = host::shared();
    let (mut service, mut clone) = Service::used("decode");
    let (pid, inode) = (service.manager.pid(), service.inode());
    let mnt = service.world.mountpoint().to_str().unwrap().to_owned();
    let world = &service.world;
    service.manager.during(|| world.stencil(&["restart", &mnt])).ok();
    assert_eq!(service.world.status()["supervisor_pid"], pid);
    service.reads(&mut clone, 1, 3);
    let (signs, pause) = service.manager.watch(WATCHDOG * 2);
    assert!(signs >= 3 && pause < WATCHDOG, "{signs} signs of life after a reload, once none for {pause:?}");
    assert_eq!(service.inode(), inode);
    // The second home is as good as before.
    let server = service.world.server();
    service.manager.end(Signal::KILL);
    kill(server);
    service.again();
    service.reads(&mut clone, 2, 3);
}

#[test]
fn a_supervisor_that_stands_still_gives_no_sign_of_life() {
    let _host = host::shared();
    let mut service = Service::start("decode");
    let mut clone = service.map();
    let supervisor = ProcessId::of(service.manager.pid()).unwrap().unwrap();
    supervisor.signal(Signal::STOP).unwrap();
    // What was said before it stood still.
    service.manager.listen(Duration::from_millis(50));
    let (signs, _) = service.manager.watch(WATCHDOG);
    assert_eq!(signs, 0);
    service.reads(&mut clone, 0, 2);
    let server = service.world.processes()[1];
    // As systemd ends a service whose watchdog has run out.
    supervisor.signal(Signal::ABORT).unwrap();
    service.manager.end(Signal::KILL);
    service.again();
    let pid = service.world.server();
    assert_eq!(ProcessId::of(pid).unwrap(), Some(server), "the same server");
    service.reads(&mut clone, 1, 2);
}

fn unit(name: &str) -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let (mut section, mut found) = (String::new(), BTreeMap::<String, Vec<String>>::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[') {
            name.trim_end_matches(']').clone_into(&mut section);
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{line}"));
        found.entry(format!("{section}.{key}")).or_default().push(value.to_owned());
    }
    found
}

#[test]
fn the_unit_says_what_the_promise_needs() {
    let unit = unit(UNIT);
    for (key, value) in [
        ("Service.Type", "notify"),
        ("Service.NotifyAccess", "main"),
        ("Service.KillMode", "process"),
        ("Service.SendSIGKILL", "no"),
        ("Service.Restart", "on-failure"),
        ("Service.OOMScoreAdjust", "-900"),
    ] {
        assert_eq!(unit.get(key).map(Vec::as_slice), Some(&[value.to_owned()][..]), "{key}");
    }
    let number = |key: &str| unit[key][0].parse::<u64>().unwrap();
    assert!(number("Service.WatchdogSec") >= 10);
    assert!(number("Service.FileDescriptorStoreMax") >= 1024);
    // A namespace of the service's own would hide the mount.
    for key in
        ["PrivateTmp", "ProtectSystem", "ProtectHome", "PrivateMounts", "ReadOnlyPaths", "RootDirectory"]
    {
        assert!(!unit.contains_key(&format!("Service.{key}")), "{key}");
    }
    // Both commands are ones that this build has.
    for (key, word) in [("ExecStart", "mount"), ("ExecReload", "restart")] {
        let words: Vec<&str> = unit[&format!("Service.{key}")][0].split(' ').collect();
        assert_eq!((words[0], words[1]), ("/usr/local/bin/stencil", word));
        run(STENCIL, &[word, "--help"]);
    }
}

/// What `systemd-analyze verify` says about a unit with this text; nothing where it is not installed.
fn verified(name: &str, text: &str) -> Option<(bool, Vec<String>)> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        let must = std::env::var_os("CI").is_some();
        assert!(!must, "systemd-analyze is not here: install Debian's package systemd (`make setup` does)");
        eprintln!("SKIPPED: systemd-analyze is not here; the package systemd has it");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap();
    let file = dir.path().join(name);
    for (path, text) in
        [(dir.path().join("stencil@srv-templates.service"), mount.as_str()), (file.clone(), text)]
    {
        fs::write(path, text.replace("/usr/local/bin/stencil", STENCIL)).unwrap();
    }
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = said.lines().filter(|line| line.contains("stencil")).map(str::to_owned).collect();
    Some((output.status.success(), said))
}

#[test]
fn systemd_understands_the_unit() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap();
    let name = "stencil@srv-templates.service";
    let Some((good, said)) = verified(name, &text) else { return };
    assert!(good && said.is_empty(), "{said:?}");
    let said = verified(name, &text.replace("Type=notify", "Type=notiffy")).unwrap().1;
    assert!(!said.is_empty(), "a mistake would be seen");
}

#[test]
fn systemd_understands_the_unit_of_clones() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(CLONES_UNIT)).unwrap();
    let Some((good, said)) = verified("stencil-clones@srv-templates.service", &text) else { return };
    assert!(good && said.is_empty(), "{said:?}");
}

/// The lines of the unit, as systemd would run them: what it puts in for `%i`, and the environment that it makes.
#[test]
fn the_clones_of_a_unit_start_and_stop() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&[3; 65536], "web:1");
    let (etc, runtime) = (world.dir().join("etc"), world.dir().join("ids"));
    for dir in [&etc, &runtime] {
        fs::create_dir(dir).unwrap();
    }
    let unit = unit(CLONES_UNIT);
    for (key, value) in [("Unit.Requires", "stencil@%i.service"), ("Service.RemainAfterExit", "yes")] {
        assert_eq!(unit[key], [value], "{key}");
    }
    let path = Path::new(STENCIL).parent().unwrap().display();
    let run = |key: &str| {
        let line = unit[&format!("Service.{key}")][0].trim_start_matches('-').replace("%i", "srv");
        let line = line.replace("/etc/stencil", etc.to_str().unwrap());
        // The shell takes the words apart as systemd does; it puts nothing into what is in single quotes.
        let mut command = world.command_in("sh");
        command.args(["-c", &line]).env("RUNTIME_DIRECTORY", &runtime);
        command.env("PATH", unit["Service.Environment"][0].replace("PATH=/usr/local/bin", &path.to_string()));
        Run::of(line, &command.output().unwrap())
    };
    let other = world.json(&["clone", "web:1", "--simulate", "read=1%"])["clones"][0]["id"].clone();
    let living = || {
        let all = world.json(&["ps"]);
        let clones = all["clones"].as_array().unwrap();
        clones.iter().filter(|clone| clone["state"] == "running").count()
    };
    fs::write(
        etc.join("srv.clones"),
        "stencil clone web:1 -n 2 --simulate read=1%\nstencil clone web:1 --simulate read=1%\n",
    )
    .unwrap();
    run("ExecStart").ok();
    assert_eq!(living(), 4);
    run("ExecStop").ok();
    assert_eq!(living(), 1, "those of the unit, and no other");
    // A set that fails: what the others have started is stopped.
    let script = "stencil clone web:1 --simulate read=1%\nstencil clone no-such:1\n";
    fs::write(etc.join("srv.clones"), script).unwrap();
    assert_ne!(run("ExecStart").code, 0);
    run("ExecStopPost");
    let left = world.json(&["ps"]);
    assert_eq!(left["clones"].as_array().unwrap().len(), 1, "{left}");
    assert_eq!(left["clones"][0]["id"], other);
}
