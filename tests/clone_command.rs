//! Clones that are any command: ready when they map the template or say so; all or none; nothing left behind,
//! whenever and however their launcher ends.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::guest::patiently;
use crate::support::host;
use crate::support::mount::TestMount;

const READY_THEN_SLEEP: &str =
    "echo ready {index}; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 1000";

fn world() -> TestMount {
    let world = TestMount::new("auto");
    world.import_bytes(&vec![7; 1 << 20], "web");
    world
}

/// Processes whose environment names this runtime directory, but for the mount's own.
pub fn processes_of(world: &TestMount) -> Vec<String> {
    let own: Vec<u32> = world.processes().iter().map(|p| p.pid).collect();
    let wanted = format!("STENCIL_RUNTIME_DIR={}", world.runtime_dir().display());
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !own.contains(pid))
        .filter(|pid| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|b| *b == 0).any(|word| word == wanted.as_bytes())
        })
        .map(|pid| {
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            format!("{pid} {}", words.replace('\0', " "))
        })
        .collect()
}

#[track_caller]
pub fn nothing_is_left(world: &TestMount) {
    for folder in ["clones", "launches"] {
        let left: Vec<_> =
            fs::read_dir(world.runtime_dir().join(folder)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    assert_eq!(processes_of(world), Vec::<String>::new());
}

#[test]
fn placeholders_and_variables_are_the_clones_own() {
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
        assert!(memory.starts_with(world.mountpoint().join("by-id")), "resolved once: {}", memory.display());
    }
    let some = launched["clones"][1]["id"].as_str().unwrap();
    world.stencil(&["stop", some]).ok();
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 2);
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn a_command_is_ready_when_it_maps_the_template() {
    let _host = host::shared();
    let world = world();
    // Any program that maps the file will do; it may start another one that does.
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
    let run = world.stencil(&["clone", "web", "--", "sh", "-c", "echo no such luck; exit 3"]).exits(1);
    assert!(run.err.contains("exited before it mapped the template (exit status: 3)"), "{}", run.err);
    assert!(run.err.contains("no such luck"), "its log: {}", run.err);
    let run = world.stencil(&["clone", "web", "--timeout", "1", "--", "sleep", "1000"]).exits(1);
    assert!(run.err.contains("timed out after 1 s waiting for the clone"), "{}", run.err);
    world.stencil(&["clone", "web", "--", "/nonexistent/vmm"]).exits(1);
    nothing_is_left(&world);
}

/// The process of a clone is no child of the command that asks.
#[test]
fn ps_tells_how_and_when_each_clone_ended() {
    let _host = host::shared();
    let world = world();
    let gate = world.dir().join("end");
    let script = format!(
        "until [ -e {} ]; do sleep 0.05; done; case {{index}} in 0) exit 7 ;; 1) kill -SEGV $$ ;; esac; \
         exec sleep 1000",
        gate.display()
    );
    let script = format!("ulimit -c 0; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; {script}");
    world.json(&["clone", "web", "-n", "3", "--ready", "notify", "--", "sh", "-c", &script]);
    world.json(&["clone", "web", "--simulate", "read=1%,write=1%"]);
    // The simulated clone last, whatever the second in which it was launched.
    let rows = || {
        let mut rows = world.json(&["ps"])["clones"].as_array().unwrap().clone();
        rows.sort_by_key(|row| row["kind"] == "simulated");
        rows
    };
    assert!(rows().iter().all(|row| row["state"] == "running" && row.get("ended").is_none()));
    let before = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    let pids: Vec<u64> = rows().iter().map(|row| row["pid"].as_u64().unwrap()).collect();
    fs::write(gate, "").unwrap();
    kill_process(Pid::from_raw(pids[3] as i32).unwrap(), Signal::KILL).unwrap();
    let rows = patiently("all noted", Duration::from_secs(10), || {
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
    assert!((before..before + 60).contains(&at), "{at} after {before}");
    let table = world.stencil(&["ps"]).ok().out;
    assert!(table.contains("exit 7 at 20") && table.contains("SIGSEGV at 20"), "{table}");
    // A launch keeps one process while a clone of it lives, and nothing after that.
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

/// A line each: the id, and after a tab the ports of the host, as `ps` shows them.
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
    let plain =
        world.stencil(&["clone", "web", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP]).ok();
    assert!(!plain.out.contains('\t') && plain.out.lines().count() == 1, "{plain:?}");
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

/// The caller's pipes are closed when the command ends, not when the clones do.
#[test]
fn a_launch_holds_no_output_of_its_caller() {
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
fn one_that_fails_takes_all_along_unless_told_otherwise() {
    let _host = host::shared();
    let world = world();
    let script = format!("test {{index}} != 5 || exit 9; {READY_THEN_SLEEP}");
    let words = ["clone", "web", "-n", "8", "--ready", "notify"];
    let rest = ["--", "sh", "-c", &script];

    let run = world.stencil(&[&words[..], &rest[..]].concat()).exits(1);
    run.says("clone 5 of 8 did not become ready");
    nothing_is_left(&world);

    let run = world.stencil(&[&["--json"], &words[..], &["--keep-going"], &rest[..]].concat()).exits(1);
    let launched: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(launched["clones"].as_array().unwrap().len(), 7);
    assert_eq!(launched["failures"][0]["index"], 5);
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 7);
    world.stencil(&["stop", "--all"]).ok();
    nothing_is_left(&world);
}

#[test]
fn one_that_does_not_heed_is_killed_and_one_that_ended_is_shown_so() {
    let _host = host::shared();
    let world = world();
    let stubborn = "trap '' TERM; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; while :; do sleep 1000; done";
    world.json(&["clone", "web", "--ready", "notify", "--", "sh", "-c", stubborn]);
    let stopped = world.json(&["stop", "--all", "--grace", "1"]);
    assert_eq!(stopped["stopped"][0]["how"], "killed", "{stopped}");
    nothing_is_left(&world);

    let launched = world.json(&["clone", "web", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP]);
    let pid = launched["clones"][0]["pid"].as_i64().unwrap() as i32;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    patiently("end", Duration::from_secs(5), || {
        (world.json(&["ps"])["clones"][0]["state"] == "ended").then_some(())
    });
    assert_eq!(world.json(&["stop", "--all"])["stopped"][0]["how"], "gone");
    nothing_is_left(&world);
}

#[test]
fn wait_gives_the_commands_exit_code() {
    let _host = host::shared();
    let world = world();
    let script = "echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; sleep 0.2; exit 7";
    world.stencil(&["clone", "web", "--wait", "--ready", "notify", "--", "sh", "-c", script]).exits(7);
    nothing_is_left(&world);
}

/// The launcher gets a signal after each of many moments: whatever it was doing, nothing stays, or everything
/// that it had let go.
fn interrupted(signal: Signal, words: &[&str]) {
    let _host = host::shared();
    let world = world();
    let rounds = host::rounds(12, 100);
    let mut survived = 0;
    for round in 0..rounds {
        let mut launcher =
            world.command().args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // From the first moments of the process to long after the last clone is ready.
        std::thread::sleep(Duration::from_micros(500 * round * round % 150_000 + round * 1500));
        let pid = Pid::from_raw(launcher.id() as i32).unwrap();
        let _ = kill_process(pid, signal);
        let status = launcher.wait().unwrap();
        if status.success() {
            survived += 1;
            let clones = world.json(&["ps"])["clones"].as_array().unwrap().clone();
            assert_eq!(clones.len(), 20, "all of them");
            assert!(clones.iter().all(|c| c["state"] == "running"), "{clones:#?}");
            world.stencil(&["stop", "--all"]).ok();
        }
        // Without any further command nothing stays, or (let go in that very moment) all of them.
        let held = || fs::read_dir(world.runtime_dir().join("launches")).map_or(0, Iterator::count) > 0;
        patiently("end of the launch", Duration::from_secs(10), || (!held()).then_some(()));
        let clones = world.json(&["ps"])["clones"].as_array().unwrap().len();
        if clones > 0 {
            assert_eq!(clones, 20, "all or none");
            world.stencil(&["stop", "--all"]).ok();
        }
        patiently("end of all processes", Duration::from_secs(10), || {
            processes_of(&world).is_empty().then_some(())
        });
        nothing_is_left(&world);
    }
    println!("{rounds} rounds, {survived} launches were faster than the signal");
}

#[test]
fn the_next_command_clears_up_what_nobody_else_could() {
    let _host = host::shared();
    let world = world();
    let script = "sleep 1000";
    let mut command = world.command();
    command.args(["clone", "web", "-n", "3", "--ready", "notify", "--", "sh", "-c", script]);
    let mut launcher = command.stderr(Stdio::null()).spawn().unwrap();
    patiently("clones", Duration::from_secs(20), || {
        (processes_of(&world).iter().filter(|p| p.contains("sleep 1000")).count() >= 3).then_some(())
    });
    // Launcher and watchdog die at one time.
    for process in processes_of(&world).iter().filter(|p| p.contains("launch-watchdog")) {
        let pid = process.split_once(' ').unwrap().0.parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    assert!(processes_of(&world).iter().any(|p| p.contains("sleep 1000")), "nobody was there to end them");
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
    nothing_is_left(&world);
}

#[test]
fn soak_interrupted_launch_of_simulated_clones() {
    interrupted(Signal::INT, &["clone", "web", "-n", "20", "--simulate", "read=50%,write=10%"]);
}

#[test]
fn soak_killed_launch_of_simulated_clones() {
    interrupted(Signal::KILL, &["clone", "web", "-n", "20", "--simulate", "read=50%,write=10%"]);
}

#[test]
fn soak_interrupted_launch_of_commands() {
    interrupted(
        Signal::TERM,
        &["clone", "web", "-n", "20", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP],
    );
}

#[test]
fn soak_killed_launch_of_commands() {
    interrupted(
        Signal::KILL,
        &["clone", "web", "-n", "20", "--ready", "notify", "--", "sh", "-c", READY_THEN_SLEEP],
    );
}
