//! Clones that run a user's command: a clone is ready once it maps the template or notifies the launcher, a launch
//! starts all clones or none, and no process or directory is left whenever the launcher exits.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::patiently;

const READY_THEN_SLEEP: &str =
    "echo ready {index}; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 1000";

fn world() -> TestMount {
    let world = TestMount::new("auto");
    world.import_bytes(&vec![7; 1 << 20], "web");
    world
}

/// Returns the processes whose environment has this runtime directory, except supervisor and server of the mount. Each
/// is one line: PID and command line.
pub fn processes_of(world: &TestMount) -> Vec<String> {
    let daemons: Vec<u32> = world.processes().iter().map(|p| p.pid).collect();
    let variable = format!("STENCIL_RUNTIME_DIR={}", world.runtime_dir().display());
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !daemons.contains(pid))
        .filter(|pid| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|b| *b == 0).any(|entry| entry == variable.as_bytes())
        })
        .map(|pid| {
            let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            format!("{pid} {}", cmdline.replace('\0', " "))
        })
        .collect()
}

/// Asserts that no clone, launch or process of a launch is left.
#[track_caller]
pub fn nothing_is_left(world: &TestMount) {
    for dir in ["clones", "launches"] {
        let left: Vec<_> =
            fs::read_dir(world.runtime_dir().join(dir)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "left in {dir}: {left:?}");
    }
    assert_eq!(processes_of(world), Vec::<String>::new());
}

#[test]
fn each_clone_gets_its_own_placeholders_and_variables() {
    let _host = host::shared();
    let world = world();
    let script = "echo {id} {index} {dir} {memory} = $STENCIL_ID $STENCIL_INDEX $STENCIL_DIR $STENCIL_MEMORY; \
                  echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 1000";
    let launched = world.json(&["clone", "web", "-n", "3", "--ready", "notify", "--", "sh", "-c", script]);
    for (index, clone) in launched["clones"].as_array().unwrap().iter().enumerate() {
        let id = clone["id"].as_str().unwrap();
        assert_eq!(clone["index"], index);
        assert_eq!(clone["kind"], "command");
        let log = world.stencil(&["logs", id]).ok().out;
        let (filled, variables) = log.trim_end().split_once(" = ").unwrap();
        assert_eq!(filled, variables);
        assert!(filled.starts_with(&format!("{id} {index} ")), "{log}");
        let memory = Path::new(filled.rsplit_once(' ').unwrap().1);
        assert!(
            memory.starts_with(world.mountpoint().join("by-id")),
            "{} is not a path by digest",
            memory.display()
        );
    }
    let one = launched["clones"][1]["id"].as_str().unwrap();
    world.stencil(&["stop", one]).ok();
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 2);
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn a_command_is_ready_when_it_maps_the_template() {
    let _host = host::shared();
    let world = world();
    // Any program that maps the template works, and so does a process that the program starts.
    let qemu = "qemu-system-x86_64 -M none -nodefaults -display none \
                -object memory-backend-file,id=m,size=1M,mem-path={memory},share=off,readonly=on,rom=off";
    let detached = format!("setsid {qemu} & sleep 0.2");
    for script in [format!("exec {qemu}"), detached] {
        let launched = world.json(&["clone", "web", "-n", "2", "--", "sh", "-c", &script]);
        for clone in launched["clones"].as_array().unwrap() {
            let maps = fs::read_to_string(format!("/proc/{}/maps", clone["pid"])).unwrap();
            assert!(maps.contains("/by-id/"), "{maps}");
        }
        let ps = world.json(&["ps"]);
        assert_eq!(ps["clones"].as_array().unwrap().len(), 2, "{ps:#}");
        world.stencil(&["stop", "--all"]).ok();
        nothing_is_left(&world);
    }
    let run = world.stencil(&["clone", "web", "--", "sh", "-c", "echo failure of the VMM; exit 3"]).exits(1);
    assert!(run.err.contains("exited before it mapped the template (exit status: 3)"), "{}", run.err);
    assert!(run.err.contains("failure of the VMM"), "no log of the clone: {}", run.err);
    let run = world.stencil(&["clone", "web", "--timeout", "1", "--", "sleep", "1000"]).exits(1);
    assert!(run.err.contains("timed out after 1 s waiting for the clone"), "{}", run.err);
    world.stencil(&["clone", "web", "--", "/nonexistent/vmm"]).exits(1);
    nothing_is_left(&world);
}

/// `stencil ps` cannot wait for a clone, which is not its child: the launch records the exit status.
#[test]
fn ps_shows_how_and_when_each_clone_ended() {
    let _host = host::shared();
    let world = world();
    let end_file = world.dir().join("end");
    let script = format!(
        "until [ -e {} ]; do sleep 0.05; done; case {{index}} in 0) exit 7 ;; 1) kill -SEGV $$ ;; esac; \
         exec sleep 1000",
        end_file.display()
    );
    let script = format!("ulimit -c 0; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; {script}");
    world.json(&["clone", "web", "-n", "3", "--ready", "notify", "--", "sh", "-c", &script]);
    world.json(&["clone", "web", "--simulate", "read=1%,write=1%"]);
    // `stencil ps` sorts by launch time in seconds, so that the simulated clone may have any place: put it last.
    let rows = || {
        let mut rows = world.json(&["ps"])["clones"].as_array().unwrap().clone();
        rows.sort_by_key(|row| row["kind"] == "simulated");
        rows
    };
    assert!(rows().iter().all(|row| row["state"] == "running" && row.get("ended").is_none()));
    let before = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    let pids: Vec<u64> = rows().iter().map(|row| row["pid"].as_u64().unwrap()).collect();
    fs::write(end_file, "").unwrap();
    kill_process(Pid::from_raw(pids[3] as i32).unwrap(), Signal::KILL).unwrap();
    let rows = patiently("three recorded exits", Duration::from_secs(10), || {
        let rows = rows();
        [0, 1, 3].iter().all(|&at: &usize| rows[at].get("ended").is_some()).then_some(rows)
    });
    let ended = |at: usize| (rows[at]["ended"]["exit_code"].clone(), rows[at]["ended"]["signal"].clone());
    assert_eq!(ended(0), (7.into(), Value::Null));
    assert_eq!(ended(1), (Value::Null, "SIGSEGV".into()));
    assert_eq!(ended(3), (Value::Null, "SIGKILL".into()));
    assert_eq!(rows[2]["state"], "running");
    assert!(rows[2].get("ended").is_none());
    let at = rows[0]["ended"]["at"].as_str().unwrap();
    let date = std::process::Command::new("date").args(["-u", "-d", at, "+%s"]).output().unwrap();
    let at: i64 = String::from_utf8_lossy(&date.stdout).trim().parse().unwrap();
    assert!((before..before + 60).contains(&at), "{at} is not within 60 s after {before}");
    let table = world.stencil(&["ps"]).ok().out;
    assert!(table.contains("exit 7 at 20") && table.contains("SIGSEGV at 20"), "{table}");
    // A launch has one process as long as one of its clones runs, and none after that.
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

/// Each clone has one line: its ID, a tab, and its host ports in the format of `stencil ps`.
#[test]
fn clone_prints_the_ports_of_each_clone() {
    let _host = host::shared();
    let world = world();
    let script = format!("# {{port:web}} {{port:ssh}}\n{READY_THEN_SLEEP}");
    let launched =
        world.stencil(&["clone", "web", "-n", "2", "--ready", "notify", "--", "sh", "-c", &script]).ok().out;
    let rows = world.json(&["ps"])["clones"].as_array().unwrap().clone();
    let expected: Vec<String> = rows
        .iter()
        .map(|row| {
            let ports = &row["ports"];
            format!("{}\t{}->ssh,{}->web", row["id"].as_str().unwrap(), ports["ssh"], ports["web"])
        })
        .collect();
    assert_eq!(launched.lines().collect::<Vec<_>>(), expected);
    let table = world.stencil(&["ps"]).ok().out;
    assert!(expected.iter().all(|line| table.contains(line.split_once('\t').unwrap().1)), "{table}");
    let without_ports =
        world.stencil(&["clone", "web", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP]).ok();
    assert!(!without_ports.out.contains('\t') && without_ports.out.lines().count() == 1, "{without_ports:?}");
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

/// The pipes of the caller are closed when `stencil clone` exits, although the clones run on.
#[test]
fn clones_do_not_hold_the_pipes_of_the_caller() {
    let _host = host::shared();
    let world = world();
    let mut command = world.command();
    command
        .args(["clone", "web", "--simulate", "read=1%,write=1%"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let out = command.spawn().unwrap().wait_with_output().unwrap();
    assert!(out.status.success());
    assert_eq!(world.json(&["ps"])["clones"][0]["state"], "running");
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn a_failed_clone_ends_the_launch_unless_keep_going_is_set() {
    let _host = host::shared();
    let world = world();
    let script = format!("test {{index}} != 5 || exit 9; {READY_THEN_SLEEP}");
    let args = ["clone", "web", "-n", "8", "--ready", "notify"];
    let clone_command = ["--", "sh", "-c", &script];

    let run = world.stencil(&[&args[..], &clone_command[..]].concat()).exits(1);
    run.says("clone 5 of 8 did not become ready");
    nothing_is_left(&world);

    let run =
        world.stencil(&[&["--json"], &args[..], &["--keep-going"], &clone_command[..]].concat()).exits(1);
    let launched: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(launched["clones"].as_array().unwrap().len(), 7);
    assert_eq!(launched["failures"][0]["index"], 5);
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 7);
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn stop_kills_clones_that_ignore_sigterm_and_reports_ended_ones() {
    let _host = host::shared();
    let world = world();
    let ignores_term =
        "trap '' TERM; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; while :; do sleep 1000; done";
    world.json(&["clone", "web", "--ready", "notify", "--", "sh", "-c", ignores_term]);
    let stopped = world.json(&["stop", "--all", "--grace", "1"]);
    assert_eq!(stopped["stopped"][0]["how"], "killed", "{stopped}");
    nothing_is_left(&world);

    let launched = world.json(&["clone", "web", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP]);
    let pid = launched["clones"][0]["pid"].as_i64().unwrap() as i32;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    patiently("an ended clone", Duration::from_secs(5), || {
        (world.json(&["ps"])["clones"][0]["state"] == "ended").then_some(())
    });
    assert_eq!(world.json(&["stop", "--all"])["stopped"][0]["how"], "gone");
    nothing_is_left(&world);
}

#[test]
fn clone_wait_returns_the_exit_code_of_the_command() {
    let _host = host::shared();
    let world = world();
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; sleep 0.2; exit 7";
    world.stencil(&["clone", "web", "--wait", "--ready", "notify", "--", "sh", "-c", script]).exits(7);
    nothing_is_left(&world);
}

/// Sends the signal to a launcher of 20 clones after various delays: either all clones run afterwards, or nothing is
/// left.
fn signal_launcher(signal: Signal, clone_args: &[&str]) {
    let _host = host::shared();
    let world = world();
    let rounds = host::rounds(12, 60);
    let mut completed = 0;
    for round in 0..rounds {
        let mut launcher =
            world.command().args(clone_args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The delays range from the start of the process to long after the last clone is ready.
        std::thread::sleep(Duration::from_micros(500 * round * round % 150_000 + round * 1500));
        let pid = Pid::from_raw(launcher.id() as i32).unwrap();
        let _ = kill_process(pid, signal);
        let status = launcher.wait().unwrap();
        if status.success() {
            completed += 1;
            let clones = world.json(&["ps"])["clones"].as_array().unwrap().clone();
            assert_eq!(clones.len(), 20, "a successful launch has all clones");
            assert!(clones.iter().all(|c| c["state"] == "running"), "{clones:#?}");
            world.stencil(&["stop", "--all"]).ok();
        }
        // The launch ends without another command: with no clone, or with all if it had just completed.
        let is_launching =
            || fs::read_dir(world.runtime_dir().join("launches")).map_or(0, Iterator::count) > 0;
        patiently("the end of the launch", Duration::from_secs(10), || (!is_launching()).then_some(()));
        // A worker that was forked just before the launch ended exits by itself.
        let clones = patiently("all clones or none", Duration::from_secs(10), || {
            Some(world.json(&["ps"])["clones"].as_array().unwrap().len())
                .filter(|count| [0, 20].contains(count))
        });
        if clones > 0 {
            world.stencil(&["stop", "--all"]).ok();
        }
        patiently("the exit of all processes", Duration::from_secs(10), || {
            processes_of(&world).is_empty().then_some(())
        });
        nothing_is_left(&world);
    }
    println!("{rounds} launches, {completed} of them completed before the signal");
}

#[test]
fn the_next_command_removes_an_abandoned_launch() {
    let _host = host::shared();
    let world = world();
    let script = "sleep 1000";
    let mut command = world.command();
    command.args(["clone", "web", "-n", "3", "--ready", "notify", "--", "sh", "-c", script]);
    let mut launcher = command.stderr(Stdio::null()).spawn().unwrap();
    patiently("clones", Duration::from_secs(20), || {
        (processes_of(&world).iter().filter(|p| p.contains("sleep 1000")).count() >= 3).then_some(())
    });
    // Launcher and watchdog are killed together.
    for process in processes_of(&world).iter().filter(|p| p.contains("launch-watchdog")) {
        let pid = process.split_once(' ').unwrap().0.parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    assert!(
        processes_of(&world).iter().any(|p| p.contains("sleep 1000")),
        "the clones do not run on without launcher and watchdog"
    );
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
    nothing_is_left(&world);
}

#[test]
fn soak_an_interrupted_simulated_launch_is_all_or_none() {
    signal_launcher(Signal::INT, &["clone", "web", "-n", "20", "--simulate", "read=50%,write=10%"]);
}

#[test]
fn soak_a_killed_simulated_launch_is_all_or_none() {
    signal_launcher(Signal::KILL, &["clone", "web", "-n", "20", "--simulate", "read=50%,write=10%"]);
}

#[test]
fn soak_an_interrupted_command_launch_is_all_or_none() {
    signal_launcher(
        Signal::TERM,
        &["clone", "web", "-n", "20", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP],
    );
}

#[test]
fn soak_a_killed_command_launch_is_all_or_none() {
    signal_launcher(
        Signal::KILL,
        &["clone", "web", "-n", "20", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP],
    );
}
