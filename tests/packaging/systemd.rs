//! A mount as a systemd service: the supervisor's notifications, and the descriptor store of the service manager. The
//! manager is `support::notify`; the unit files are checked with systemd-analyze.

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
use crate::support::daemon::notify::Manager;
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::store::random;

const UNIT: &str = "mountd/systemd/stencil@.service";
const CLONES_UNIT: &str = "mountd/systemd/stencil-clones@.service";
const EXPORTER_UNIT: &str = "mountd/systemd/stencil-exporter.service";
const PAGE: u64 = 4096;
const PAGES: u64 = 2048;
const WATCHDOG: Duration = Duration::from_millis(1500);

/// A mount run as a service, with one template.
struct Service {
    // Dropped first: `TestMount` does not know the service's process.
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

    /// Starts a service and a process that has read every third page.
    fn with_clone(serve: &str) -> (Service, Actor) {
        let service = Service::start(serve);
        let mut clone = service.map();
        service.assert_reads(&mut clone, 0, 3);
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

    /// Panics unless every `step`th page from `first` has the right first byte.
    fn assert_reads(&self, actor: &mut Actor, first: u64, step: usize) {
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

    /// Kills the supervisor first, because it would start another server, and then the server.
    fn kill_both(&mut self, server: u32) {
        self.manager.end(Signal::KILL);
        let server = kill(server);
        wait_for("the server's exit", || (!server.is_alive()).then_some(()));
    }

    /// Starts the service again after its process has died.
    fn restart(&mut self) {
        self.manager.start(&self.command);
        self.manager.wait_heard("READY=1");
    }
}

/// Returns a sender; aborts the connection unless the caller sends on it within 30 s. Otherwise a clone that never gets
/// a reply would block a failed test.
fn abort_after_timeout(device: u64) -> mpsc::Sender<()> {
    let (done, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        if receiver.recv_timeout(Duration::from_secs(30)).is_err() {
            let _ = mount::abort_fuse_connection(device);
        }
    });
    done
}

/// Duplicates the stored descriptors of a manager.
fn duplicate(store: &[(String, OwnedFd)]) -> Vec<(String, OwnedFd)> {
    store.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
}

fn kill(pid: u32) -> ProcessId {
    let process = ProcessId::of(pid).unwrap().unwrap();
    process.signal(Signal::KILL).unwrap();
    process
}

#[test]
fn only_the_supervisor_notifies_ready_watchdog_and_stopping() {
    let _host = host::shared();
    let mut service = Service::start("passthrough");
    assert!(
        fs::read(service.world.file(&service.digest, "memory")).unwrap() == service.bytes,
        "the service does not serve"
    );
    service.manager.listen(Duration::from_millis(400));
    let stored = service.manager.stored();
    for name in ["fuse", "ledger", "counters", "program"] {
        assert!(stored.contains(&name), "no {name} in {stored:?}");
    }
    assert!(stored.iter().any(|name| name.starts_with("backing-")), "no backing in {stored:?}");
    let (signs, pause) = service.manager.watch(WATCHDOG * 3);
    assert!(signs >= 5 && pause < WATCHDOG, "{signs} watchdog notifications, longest pause {pause:?}");

    let status = service.world.status();
    assert_eq!(
        status["supervisor_pid"],
        service.manager.pid(),
        "stencil mount -f must become the supervisor"
    );
    let server = service.world.server();
    let environ = fs::read(format!("/proc/{server}/environ")).unwrap();
    for word in ["NOTIFY_SOCKET=", "WATCHDOG_", "LISTEN_"] {
        assert!(!String::from_utf8_lossy(&environ).contains(word), "the server's environment has {word}");
    }
    service.world.kill_server();
    let processes = service.world.processes();
    let ended = service.manager.end(Signal::TERM);
    assert!(ended.success(), "{ended}");
    assert!(service.manager.heard.iter().any(|word| word == "STOPPING=1"), "{:?}", service.manager.heard);
    assert!(service.manager.strangers.is_empty(), "{:?}", service.manager.strangers);
    wait_for("the server's exit", || processes.iter().all(|p| !p.is_alive()).then_some(()));
    service.manager.drop_hung_up();
    assert!(!service.manager.stored().contains(&"fuse"), "the connection is still stored");
}

#[test]
fn a_restarted_supervisor_adopts_the_running_server() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::with_clone(serve);
        let (server, inode) = (service.world.server(), service.inode());
        service.manager.end(Signal::KILL);
        service.assert_reads(&mut clone, 1, 3);
        service.restart();
        assert_eq!((service.world.server(), service.inode()), (server, inode), "{serve}");
        service.assert_reads(&mut clone, 2, 3);
        let (signs, _) = service.manager.watch(WATCHDOG);
        assert!(signs > 0, "no watchdog notification of the new supervisor");
        service.world.kill_server();
        assert!(fs::read(service.world.file(&service.digest, "memory")).unwrap() == service.bytes);
    }
}

#[test]
fn clones_survive_the_death_of_supervisor_and_server() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::with_clone(serve);
        service.manager.listen(Duration::from_millis(400));
        let world = &service.world;
        service.manager.during(|| world.kill_server());
        let restarts = service.world.status()["restarts"].as_u64();
        assert!(restarts >= Some(1));
        let (server, inode) = (service.world.server(), service.inode());
        let device = service.world.status()["device"].as_u64().unwrap();
        service.kill_both(server);
        // A page that is not cached, read while both processes are dead: the read is delayed and does not raise SIGBUS.
        clone.begin("read 0 1");
        let abort = abort_after_timeout(device);
        service.restart();
        assert_eq!(clone.answer(), Ok(service.bytes[PAGE as usize].into()), "{serve}");
        abort.send(()).unwrap();
        service.assert_reads(&mut clone, 4, 3);
        service.assert_reads(&mut clone, 2, 3);
        assert_eq!(service.inode(), inode, "{serve}");
        assert!(service.world.status()["restarts"].as_u64() >= restarts, "the restart count was lost");
        let mut second = service.map();
        service.assert_reads(&mut second, 0, 1);
        drop((clone, second));
        assert!(service.manager.end(Signal::TERM).success());
    }
}

/// The manager may still store descriptors of an earlier mount of the service: the next mount removes them, and a
/// supervisor that takes over recognizes its own descriptors, whatever the order.
#[test]
fn descriptors_of_an_earlier_mount_are_ignored_and_removed() {
    let _host = host::shared();
    let mut service = Service::start("passthrough");
    drop(service.map());
    service.manager.listen(Duration::from_millis(400));
    assert!(service.manager.end(Signal::TERM).success());
    service.manager.drop_hung_up();
    let left = service.manager.stored().iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert!(left.iter().any(|name| name == "ledger") && !left.iter().any(|name| name == "fuse"), "{left:?}");
    let stale = duplicate(&service.manager.store);

    service.restart();
    service.manager.listen(Duration::from_millis(400));
    let stored = service.manager.stored();
    for name in ["fuse", "ledger", "counters", "program"] {
        assert_eq!(stored.iter().filter(|other| **other == name).count(), 1, "{name} in {stored:?}");
    }
    assert!(
        !stored.iter().any(|name| name.starts_with("backing-")),
        "backings of the earlier mount are still stored: {stored:?}"
    );

    for stale_last in [false, true] {
        let mut clone = service.map();
        service.assert_reads(&mut clone, 0, 5);
        let (server, inode) = (service.world.server(), service.inode());
        let opens = service.world.counter("opens_passthrough");
        service.manager.listen(Duration::from_millis(400));
        service.kill_both(server);
        // The result is the same as if the removal of the stale descriptors had been lost.
        let present = std::mem::take(&mut service.manager.store);
        let (first, last) =
            if stale_last { (present, duplicate(&stale)) } else { (duplicate(&stale), present) };
        service.manager.store = first.into_iter().chain(last).collect();
        service.restart();
        service.assert_reads(&mut clone, 1, 5);
        assert_eq!(service.inode(), inode);
        assert!(
            service.world.counter("opens_passthrough") >= opens,
            "the counters are not those of this mount"
        );
        service.manager.listen(Duration::from_millis(400));
    }
    assert!(service.manager.end(Signal::TERM).success());
}

/// Like `systemctl stop` while there is a clone: SIGTERM, and another SIGTERM after `TimeoutStopSec`.
#[test]
fn repeated_sigterm_does_not_disconnect_clones() {
    let _host = host::shared();
    let mut service = Service::start("decode");
    let mut clone = service.map();
    service.assert_reads(&mut clone, 0, 2);
    let before = service.world.processes();
    let log = service.world.dir().join("service.log");
    for message in [
        "served until the last process that uses it exits",
        "ignoring the signal: the mount is already draining",
    ] {
        service.manager.signal(Signal::TERM);
        wait_for(message, || fs::read_to_string(&log).unwrap().contains(message).then_some(()));
    }
    service.assert_reads(&mut clone, 1, 2);
    assert!(before.iter().all(ProcessId::is_alive), "supervisor or server has exited");
    drop(clone);
    assert!(service.manager.wait_end().success(), "the service must end with its last user");
}

/// The service is started again while its old supervisor drains: the old supervisor keeps its mount and server, and the
/// new one gets a separate mount.
#[test]
fn a_draining_mount_stays_with_its_supervisor() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (mut service, mut clone) = Service::with_clone(serve);
        service.manager.listen(Duration::from_millis(400));
        let draining = service.world.processes();
        service.manager.signal(Signal::TERM);
        let mountpoint = service.world.mountpoint().to_owned();
        let is_detached = || mount::at(&mountpoint).unwrap().is_none().then_some(());
        wait_for("the lazy unmount", is_detached);
        service.manager.listen(Duration::from_millis(400));
        let mut old = service.manager.give_up();
        service.restart();
        assert!(draining.iter().all(ProcessId::is_alive), "{serve}: a draining process has exited");
        service.assert_reads(&mut clone, 1, 3);
        let all = service.world.json(&["status"]);
        let mounts = all["mounts"].as_array().unwrap();
        assert_eq!(mounts.iter().filter(|mount| mount["detached"] == true).count(), 1, "{all:#}");
        assert_eq!(mounts.len(), 2, "{all:#}");
        let mut second = service.map();
        service.assert_reads(&mut second, 0, 3);
        drop(clone);
        assert!(old.wait().unwrap().success());
        service.assert_reads(&mut second, 1, 3);
        drop(second);
        assert!(service.manager.end(Signal::TERM).success());
    }
}

/// The service's store was changed while it ran, and both of its processes died: its clones are served to their end,
/// and no path shows the bytes of the old store under the names of the new one.
#[test]
fn a_mount_of_the_previous_store_is_drained_after_a_change() {
    let _host = host::shared();
    for used in [true, false] {
        let mut service = Service::start("decode");
        let clone = used.then(|| {
            let mut clone = service.map();
            service.assert_reads(&mut clone, 0, 3);
            clone
        });
        service.manager.listen(Duration::from_millis(400));
        let server = service.world.server();
        service.kill_both(server);
        let other = service.world.dir().join("other");
        let store = stencilfs::store::Store::open_or_create(&other).unwrap();
        let mut edited = service.world.command();
        edited.args(service.command.get_args()).env("STENCIL_STORE", &other);
        service.manager.start(&edited);
        if let Some(mut clone) = clone {
            let mountpoint = service.world.mountpoint();
            wait_for("the lazy unmount", || mount::at(mountpoint).unwrap().is_none().then_some(()));
            service.assert_reads(&mut clone, 1, 3);
        }
        assert_eq!(
            service.manager.wait_end().code(),
            Some(1),
            "the exit code must make systemd restart the service"
        );
        service.command = edited;
        service.restart();
        assert_eq!(service.world.status()["store"], store.dir().to_str().unwrap());
        assert!(!service.world.file(&service.digest, "memory").exists());
        assert!(service.manager.end(Signal::TERM).success());
    }
}

#[test]
fn a_reload_keeps_the_main_pid() {
    let _host = host::shared();
    let (mut service, mut clone) = Service::with_clone("decode");
    let (pid, inode) = (service.manager.pid(), service.inode());
    let mnt = service.world.mountpoint().to_str().unwrap().to_owned();
    let world = &service.world;
    service.manager.during(|| world.stencil(&["restart", &mnt])).ok();
    assert_eq!(service.world.status()["supervisor_pid"], pid);
    service.assert_reads(&mut clone, 1, 3);
    let (signs, pause) = service.manager.watch(WATCHDOG * 2);
    assert!(
        signs >= 3 && pause < WATCHDOG,
        "{signs} watchdog notifications after a reload, longest pause {pause:?}"
    );
    assert_eq!(service.inode(), inode);
    // The descriptor store still works after the reload.
    let server = service.world.server();
    service.manager.end(Signal::KILL);
    kill(server);
    service.restart();
    service.assert_reads(&mut clone, 2, 3);
}

#[test]
fn a_stopped_supervisor_sends_no_watchdog_notification() {
    let _host = host::shared();
    let mut service = Service::start("decode");
    let mut clone = service.map();
    let supervisor = ProcessId::of(service.manager.pid()).unwrap().unwrap();
    supervisor.signal(Signal::STOP).unwrap();
    // Notifications that were sent before the stop.
    service.manager.listen(Duration::from_millis(50));
    let (signs, _) = service.manager.watch(WATCHDOG);
    assert_eq!(signs, 0);
    service.assert_reads(&mut clone, 0, 2);
    let server = service.world.processes()[1];
    // systemd sends this signal when the watchdog timeout has expired.
    supervisor.signal(Signal::ABORT).unwrap();
    service.manager.end(Signal::KILL);
    service.restart();
    let pid = service.world.server();
    assert_eq!(ProcessId::of(pid).unwrap(), Some(server), "the same server");
    service.assert_reads(&mut clone, 1, 2);
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
fn the_unit_has_the_settings_that_protect_clones() {
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
    // A private mount namespace of the service would hide the mount.
    for key in
        ["PrivateTmp", "ProtectSystem", "ProtectHome", "PrivateMounts", "ReadOnlyPaths", "RootDirectory"]
    {
        assert!(!unit.contains_key(&format!("Service.{key}")), "{key}");
    }
    // Both commands exist in this build.
    for (key, word) in [("ExecStart", "mount"), ("ExecReload", "restart")] {
        let words: Vec<&str> = unit[&format!("Service.{key}")][0].split(' ').collect();
        assert_eq!((words[0], words[1]), ("/usr/local/bin/stencil", word));
        run(STENCIL, &[word, "--help"]);
    }
}

/// Runs `systemd-analyze verify` on a unit with this text and returns its success and messages; `None` if it is not
/// installed.
fn verified(name: &str, text: &str) -> Option<(bool, Vec<String>)> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        let must = std::env::var_os("CI").is_some();
        assert!(!must, "systemd-analyze is not installed: install the package systemd (run `make setup`)");
        eprintln!("SKIPPED: systemd-analyze is not installed (package systemd)");
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
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let messages = messages.lines().filter(|line| line.contains("stencil")).map(str::to_owned).collect();
    Some((output.status.success(), messages))
}

#[test]
fn systemd_analyze_accepts_the_unit() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap();
    let name = "stencil@srv-templates.service";
    let Some((good, messages)) = verified(name, &text) else { return };
    assert!(good && messages.is_empty(), "{messages:?}");
    let messages = verified(name, &text.replace("Type=notify", "Type=notiffy")).unwrap().1;
    assert!(!messages.is_empty(), "systemd-analyze does not report an invalid Type=");
}

#[test]
fn systemd_analyze_accepts_the_clones_unit() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(CLONES_UNIT)).unwrap();
    let Some((good, messages)) = verified("stencil-clones@srv-templates.service", &text) else { return };
    assert!(good && messages.is_empty(), "{messages:?}");
}

#[test]
fn systemd_analyze_accepts_the_exporter_unit() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(EXPORTER_UNIT)).unwrap();
    let Some((good, messages)) = verified("stencil-exporter.service", &text) else { return };
    assert!(good && messages.is_empty(), "{messages:?}");
}

/// Runs the commands of the unit like systemd: with the same substitution of `%i` and the same environment.
#[test]
fn the_clones_unit_starts_and_stops_its_clones() {
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
        // The shell splits the words like systemd, and does not expand the parts in single quotes.
        let mut command = world.command_in("sh");
        command.args(["-c", &line]).env("RUNTIME_DIRECTORY", &runtime);
        command.env("PATH", unit["Service.Environment"][0].replace("PATH=/usr/local/bin", &path.to_string()));
        Run::of(line, &command.output().unwrap())
    };
    let other = world.json(&["clone", "web:1", "--simulate", "read=1%"])["clones"][0]["id"].clone();
    let running = || {
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
    assert_eq!(running(), 4);
    run("ExecStop").ok();
    assert_eq!(running(), 1, "ExecStop must stop exactly the clones of the unit");
    // If a command of the unit fails, the clones that earlier commands have started are stopped.
    let script = "stencil clone web:1 --simulate read=1%\nstencil clone no-such:1\n";
    fs::write(etc.join("srv.clones"), script).unwrap();
    assert_ne!(run("ExecStart").code, 0);
    run("ExecStopPost");
    let left = world.json(&["ps"]);
    assert_eq!(left["clones"].as_array().unwrap().len(), 1, "{left}");
    assert_eq!(left["clones"][0]["id"], other);
}
