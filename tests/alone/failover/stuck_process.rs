//! A process that waits for a stopped server inside `execve`: scans of all processes skip the process, report it, and
//! treat it as a possible user of the template.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::clones::recording::Recording;
use stencilfs::sys::files::mount;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::holders;

use crate::metrics::top::{Watch, clone_of};
use crate::support::actor::Actor;
use crate::support::daemon::drill;
use crate::support::exporter::{Exporter, OPEN_METRICS, Samples, samples};
use crate::support::host;
use crate::support::mount::{TestMount, UNSEEN, wait_for};

/// Timeout for a command that must not wait for the stuck process.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

/// A stopped server, and a process that waits for it. On drop, both resume.
struct Stuck {
    server: ProcessId,
    device: u64,
    actor: Actor,
}

impl Stuck {
    /// No file of the mount may have been closed before: FUSE sends FLUSH only until the server has answered it with
    /// ENOSYS.
    fn new(world: &TestMount, digest: &str) -> Stuck {
        let status = world.status();
        let server = ProcessId::of(world.server()).unwrap().unwrap();
        let mut actor = Actor::start();
        actor.tell(&format!("open 0 {}", world.file(digest, "memory").display()));
        drill::stop(server);
        // `execve` closes the file under a lock that readers of /proc/PID/maps need.
        actor.begin("exec 0");
        let stuck = Stuck { server, device: status["device"].as_u64().unwrap(), actor };
        wait_for("a blocked read of /proc/PID/maps", || {
            let path = format!("/proc/{}/maps", stuck.actor.pid());
            let status = Command::new("timeout").args(["0.5", "cat", &path]).stdout(Stdio::null()).status();
            (status.unwrap().code() == Some(124)).then_some(())
        });
        stuck
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = mount::abort_fuse_connection(self.device);
        }
        let _ = self.server.signal(Signal::CONT);
    }
}

/// Runs a command that must not wait for the stuck process. Returns its exit code, standard output and standard error.
fn run(world: &TestMount, args: &[&str]) -> (i32, String, String) {
    let mut child = world.command().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + COMMAND_TIMEOUT;
    let has_exited = loop {
        match child.try_wait().unwrap() {
            Some(_) => break true,
            None if Instant::now() > deadline => break false,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if !has_exited {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(has_exited, "{args:?} waited for the stuck process for {COMMAND_TIMEOUT:?}");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_process_stuck_in_exec_delays_no_command_and_is_counted() {
    let _host = host::alone();
    // Without a watchdog the server stays stopped.
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&[7; 1 << 20], "web:1");
    let clones = TestMount::new("decode");
    clones.import_bytes(&[7; 4096], "web:1");
    let mut stuck = Stuck::new(&world, &digest);
    let pid = stuck.actor.pid();
    let start = Instant::now();
    let found = holders::users_of(stuck.device, Duration::from_millis(300)).unwrap();
    assert!(found.unseen.silent.contains(&pid), "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(!holders::name_of(pid).is_empty());
    // The identity of a process is the inode of its pidfd, which can be read without the lock.
    let start = Instant::now();
    let known = ProcessId::of(pid).unwrap().unwrap();
    let other = ProcessId { identity: known.identity - 1, ..known };
    assert!(known.is_alive() && !other.is_alive() && !other.signal(Signal::KILL).unwrap());
    assert!(start.elapsed() < COMMAND_TIMEOUT, "{:?}", start.elapsed());

    let mountpoint = world.mountpoint().to_str().unwrap();
    let commands: [&[&str]; 7] = [
        &["--json", "status"],
        &["--json", "ps"],
        &["rm", "web:1"],
        &["density"],
        &["umount", mountpoint],
        &["doctor"],
        &["--json", "check", "--all"],
    ];
    let world = &world;
    let [status, ps, rm, density, umount, doctor, check] = std::thread::scope(|scope| {
        commands.map(|args| scope.spawn(move || run(world, args))).map(|thread| thread.join().unwrap())
    });
    for (code, out, err) in [status, ps] {
        assert_eq!(code, 0, "{err}");
        let reply: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(reply["unseen"].as_array().is_some_and(|all| all.contains(&pid.into())), "{reply}");
        assert!(err.contains(&pid.to_string()), "{err}");
    }
    for (code, _, err) in [&rm, &density] {
        assert_eq!(*code, 75, "{err}");
        assert!(err.contains(&format!("{pid} (")) && err.contains("stencil doctor"), "{err}");
    }
    assert_eq!(umount.0, 5, "{}", umount.2);
    assert!(
        umount.2.contains("processes that could not be inspected") && umount.2.contains(&pid.to_string()),
        "{}",
        umount.2
    );
    assert!(doctor.1.contains(&format!("{pid} (")), "{}", doctor.1);
    assert_eq!(check.0, 6, "{}", check.2);
    let reply: serde_json::Value = serde_json::from_str(&check.1).unwrap();
    let row = reply["clones"].as_array().unwrap().iter().find(|row| row["pid"] == pid).unwrap();
    assert_eq!((&row["ok"], &row["checks"][0]["name"]), (&false.into(), &"process".into()), "{reply}");
    // The stuck process may belong to any clone that a command has started.
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 1000";
    let launched = clones.json(&["clone", "web:1", "--ready", "notify", "--", "sh", "-c", script]);
    let id = launched["clones"][0]["id"].as_str().unwrap();
    let (code, out, err) = run(&clones, &["check", id]);
    assert_eq!(code, 6, "{err}");
    assert!(out.contains(&format!("{id}, process {pid}: failed\n  process: ")), "{out}");
    clones.stencil(&["stop", id]).ok();

    stuck.server.signal(Signal::CONT).unwrap();
    stuck.actor.tell("anon 0 4096");
    drop(stuck);
    world.stencil(&["rm", "web:1"]).ok();
    world.stencil(&["umount", mountpoint]).ok();
}

#[test]
fn a_scrape_is_answered_while_clones_are_stuck() {
    let _host = host::alone();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&[7; 1 << 20], "web:1");
    let file = world.file(&digest, "memory");
    let exporter = Exporter::start(&world, &["--max-age", "0"]);
    let pending = format!("stencil_mount_pending_requests{{mount=\"{}\"}}", world.mountpoint().display());
    let blocked = "stencil_exporter_blocked{collector=\"clones\"}";
    let scrape = || samples(&exporter.scrape(OPEN_METRICS).body);
    // A clone that has touched one page, and waits in a page fault for another.
    let mut waiting = Actor::start();
    waiting.tell(&format!("map 0 {} 0 {} rw", file.display(), 1 << 20));
    waiting.tell("read 0 0");
    wait_for("figures of one clone", || (scrape().get("stencil_clones") == Some(&1.0)).then_some(()));
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    drill::stop(server);
    waiting.begin("read 0 200");
    wait_for("a pending request", || (scrape()[&pending] == 1.0).then_some(()));
    let found = wait_for("a blocked collector", || Some(scrape()).filter(|all| all[blocked] == 1.0));
    assert_eq!(found["stencil_clones"], 1.0, "the last figures");
    let age = "stencil_exporter_figures_age_seconds{collector=\"clones\"}";
    let first = scrape()[age];
    wait_for("older figures", || (scrape()[age] > first + 1.0).then_some(()));
    host::measured(|| exporter.scrape(OPEN_METRICS).within(Duration::from_secs(1)));
    server.signal(Signal::CONT).unwrap();
    assert_eq!(waiting.answer(), Ok(7));
    let recent = |all: &Samples| all[blocked] == 0.0 && all["stencil_clones"] == 1.0 && all[&pending] == 0.0;
    wait_for("recent figures", || recent(&scrape()).then_some(()));

    // A process that cannot be inspected may be a clone of any mount.
    let other = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let mut stuck = Stuck::new(&other, &other.import_bytes(&[7; 4096], "web:1"));
    let failures = "stencil_exporter_collection_failures_total{collector=\"clones\"}";
    wait_for("failures", || (scrape()[failures] > 2.0).then_some(()));
    let said = |line: &serde_json::Value| line["message"].as_str().unwrap().contains(UNSEEN);
    assert!(exporter.log().iter().any(said), "{:?}", exporter.log());
    for _ in 0..50 {
        let all = scrape();
        assert!(all["stencil_clones"] == 1.0 && all[blocked] == 1.0, "{all:?}");
    }
    // Collections that fail leave nothing behind.
    let threads = std::fs::read_dir(format!("/proc/{}/task", exporter.pid())).unwrap().count();
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", exporter.pid())).unwrap().count();
    assert!(threads <= 36 && descriptors <= 20, "{threads} threads, {descriptors} descriptors");
    stuck.server.signal(Signal::CONT).unwrap();
    stuck.actor.tell("anon 0 4096");
    drop(stuck);
    wait_for("recent figures", || recent(&scrape()).then_some(()));
}

#[test]
fn a_recorder_goes_on_beside_a_stuck_process() {
    let _host = host::alone();
    let world = TestMount::with(&["--serve", "decode"]);
    let file = world.dir().join("web.rec");
    let mut command = world.command();
    command.args(["record", "web.rec", "--interval", "0.2"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut recorder = command.spawn().unwrap();
    let mut messages = BufReader::new(recorder.stderr.take().unwrap()).lines();
    let samples = || Recording::open(&file).map_or(0, |recording| recording.samples().count());
    wait_for("a sample", || (samples() > 0).then_some(()));
    let other = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let mut stuck = Stuck::new(&other, &other.import_bytes(&[7; 4096], "web:1"));
    let message = messages.next().unwrap().unwrap();
    assert!(message.starts_with("no sample: error: ") && message.contains(UNSEEN), "{message}");
    stuck.server.signal(Signal::CONT).unwrap();
    stuck.actor.tell("anon 0 4096");
    drop(stuck);
    let before = samples();
    wait_for("further samples", || (samples() > before + 1).then_some(()));
    ProcessId::of(recorder.id()).unwrap().unwrap().signal(Signal::INT).unwrap();
    let output = recorder.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains(" failed"), "{text}");
}

#[test]
fn top_shows_blocked_clones_and_goes_on() {
    let _host = host::alone();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&[7; 1 << 20], "web:1");
    let start = || {
        let mut actor = Actor::start();
        actor.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 1 << 20));
        actor.tell("read 0 0");
        actor
    };
    // The other clone copies pages that are in RAM already.
    let (mut waiting, mut active) = (start(), start());
    active.read_pages(0, 0..64);
    let mut page = 0;
    let mut watch = Watch::start(&world, "0.2");
    let mut next = |watch: &mut Watch| {
        active.write_pages(0, [page]);
        page = (page + 1) % 64;
        let sample = watch.sample();
        assert_eq!(clone_of(&sample, active.pid())["blocked"], false, "{sample:#}");
        sample
    };
    assert_eq!(next(&mut watch)["unseen"], serde_json::json!([]));

    // A clone that waits in a page fault, for a server that does not answer.
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    drill::stop(server);
    waiting.begin("read 0 200");
    let start_of_wait = Instant::now();
    let waits = waiting.pid();
    let blocked = |sample: &serde_json::Value| clone_of(sample, waits)["blocked"] == true;
    let sample = wait_for("a blocked clone", || Some(next(&mut watch)).filter(blocked));
    let took = start_of_wait.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(sample["totals"].is_object(), "{sample:#}");
    let copied: f64 = (0..5).map(|_| next(&mut watch)["copied_pages_per_second"].as_f64().unwrap()).sum();
    assert!(copied > 0.0, "the other clone copies pages");
    wait_for("old figures of templates", || {
        (next(&mut watch)["templates_age_seconds"].as_f64() > Some(1.5)).then_some(())
    });
    server.signal(Signal::CONT).unwrap();
    assert_eq!(waiting.answer(), Ok(7));
    let is_recent =
        |sample: &serde_json::Value| !blocked(sample) && sample["templates_age_seconds"].as_f64() < Some(1.0);
    wait_for("recent figures", || Some(next(&mut watch)).filter(is_recent));

    // A process that cannot be inspected.
    let other = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let mut stuck = Stuck::new(&other, &other.import_bytes(&[7; 4096], "web:1"));
    let pid = stuck.actor.pid();
    let start_of_wait = Instant::now();
    let is_unseen = |sample: &serde_json::Value| {
        sample["unseen"].as_array().unwrap().iter().any(|process| process["pid"] == pid)
    };
    wait_for("the stuck process", || Some(next(&mut watch)).filter(is_unseen));
    let took = start_of_wait.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    let threads = |watch: &Watch| std::fs::read_dir(format!("/proc/{}/task", watch.pid())).unwrap().count();
    let before = threads(&watch);
    for _ in 0..20 {
        assert!(is_unseen(&next(&mut watch)));
    }
    assert!(threads(&watch) <= before + 1, "{before} threads, then {}", threads(&watch));
    stuck.server.signal(Signal::CONT).unwrap();
    stuck.actor.tell("anon 0 4096");
    drop(stuck);
    wait_for("an inspection of the process", || (!is_unseen(&next(&mut watch))).then_some(()));
}
