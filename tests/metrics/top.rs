//! `stencil top`: its figures, its rates, and the terminal that it leaves.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stencilfs::sys::process::ProcessId;
use stencilfs::units::Bytes;

use crate::clones::accounting::{number, world};
use crate::support::actor::Actor;
use crate::support::daemon::drill;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::terminal::Terminal;

/// A running `stencil top --json`. Drop ends it.
pub struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    pub fn start(world: &TestMount, interval: &str) -> Watch {
        let mut command = world.command();
        command.args(["top", "--json", "--interval", interval]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Watch { child, lines }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next sample.
    pub fn sample(&mut self) -> Value {
        let line = self.lines.next().expect("another sample").unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the clone with this process id.
pub fn clone_of(sample: &Value, pid: u32) -> &Value {
    let clones = sample["clones"].as_array().unwrap();
    clones.iter().find(|clone| clone["pid"] == pid).unwrap_or_else(|| panic!("no clone {pid} in {sample:#}"))
}

/// Removes the fields that `density` does not have.
fn as_density(mut sample: Value) -> Value {
    let added =
        ["time", "interval_seconds", "copied_pages_per_second", "templates_age_seconds", "unseen", "problem"];
    let fields = sample.as_object_mut().unwrap();
    for field in added {
        assert!(fields.remove(field).is_some(), "{field}");
    }
    for clone in sample["clones"].as_array_mut().unwrap() {
        let fields = clone.as_object_mut().unwrap();
        assert_eq!(fields.remove("copied_pages_per_second"), Some(Value::Null));
        assert_eq!(fields.remove("blocked"), Some(Value::Bool(false)));
    }
    sample
}

/// Removes what `top` does not have. The available memory of the host changes all the time.
fn without_headroom(mut density: Value) -> Value {
    assert!(density.as_object_mut().unwrap().remove("headroom").is_some(), "{density:#}");
    density
}

#[test]
fn figures_of_once_are_those_of_density_to_the_byte() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let (world, _) = world(serve, 8 << 20);
        world.import_bytes(&[9; 1 << 20], "db:1");
        world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "read=400p,write=60p"]).ok();
        world.stencil(&["clone", "web:1", "-n", "4", "--simulate", "read=100p,write=9p"]).ok();
        for clone in world.json(&["ps"])["clones"].as_array().unwrap() {
            drill::stop(ProcessId::of(number(clone, "pid") as u32).unwrap().unwrap());
        }
        // The page cache of the store and the memory of its processes may change meanwhile.
        let (found, text, wanted) = wait_for("a measurement during which nothing changes", || {
            let before = without_headroom(world.json(&["density"]));
            let (found, text) = (world.json(&["top", "--once"]), world.stencil(&["top", "--once"]).ok().out);
            let after = without_headroom(world.json(&["density"]));
            (before == after).then_some((found, text, before))
        });
        let found = as_density(found);
        assert!(found == wanted, "{found:#}\n{wanted:#}");
        let line = |id: &str| {
            text.lines().find(|line| line.starts_with(id)).unwrap_or_else(|| panic!("no {id} in {text}"))
        };
        for clone in wanted["clones"].as_array().unwrap() {
            let line = line(clone["id"].as_str().unwrap());
            let size = |bytes: u64| Bytes::new(bytes).to_string();
            for bytes in ["mapped_clean_bytes", "page_table_bytes", "overhead_bytes"] {
                assert!(line.contains(&size(number(clone, bytes))), "{bytes}: {line}");
            }
            assert!(line.contains(&size(number(clone, "dirty_pages") * 4096)), "{line}");
        }
        let host = Bytes::new(number(&wanted["totals"], "host_bytes"));
        assert!(text.contains(&format!("\n7 clones, host memory {host}\n")), "{text}");
    }
}

#[test]
fn samples_have_the_rate_of_each_clone() {
    let _host = host::shared();
    let (world, digest) = world("passthrough", 4 << 20);
    let start = || {
        let mut actor = Actor::start();
        actor.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 4 << 20));
        actor
    };
    let (mut active, idle) = (start(), start());
    let mut watch = Watch::start(&world, "0.2");
    let first = watch.sample();
    assert_eq!((&first["schema"], &first["interval_seconds"]), (&Value::from(1), &Value::Null));
    assert_eq!(clone_of(&first, active.pid())["copied_pages_per_second"], Value::Null);
    active.write_pages(0, 0..300);
    let (mut copied, mut all) = (0.0, 0.0);
    let sample = wait_for("the copied pages", || {
        let sample = watch.sample();
        let seconds = sample["interval_seconds"].as_f64().unwrap();
        assert!(seconds > 0.0, "{sample:#}");
        copied += clone_of(&sample, active.pid())["copied_pages_per_second"].as_f64().unwrap() * seconds;
        all += sample["copied_pages_per_second"].as_f64().unwrap() * seconds;
        assert_eq!(clone_of(&sample, idle.pid())["copied_pages_per_second"], 0.0);
        (number(clone_of(&sample, active.pid()), "dirty_pages") == 300).then_some(sample)
    });
    assert_eq!((copied.round(), all.round()), (300.0, 300.0), "{sample:#}");
    // A clone that starts has no rate in its first sample.
    let late = start();
    let (sample, clone) = wait_for("the clone", || {
        let sample = watch.sample();
        let clone =
            sample["clones"].as_array().unwrap().iter().find(|clone| clone["pid"] == late.pid()).cloned();
        clone.map(|clone| (sample, clone))
    });
    assert_eq!(clone["copied_pages_per_second"], Value::Null, "{sample:#}");
    assert_eq!(clone_of(&watch.sample(), late.pid())["copied_pages_per_second"], 0.0);
}

#[test]
fn the_terminal_is_restored_by_keys_and_signals() {
    let _host = host::shared();
    let (world, _) = world("passthrough", 4 << 20);
    world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "read=400p,write=60p"]).ok();
    let ids: Vec<String> = world.json(&["ps"])["clones"]
        .as_array()
        .unwrap()
        .iter()
        .map(|clone| clone["id"].as_str().unwrap().to_owned())
        .collect();
    let start = |has_colours: bool| {
        let mut command = world.command();
        command.args(["top", "--interval", "0.2"]).env_remove("NO_COLOR");
        if !has_colours {
            command.env("NO_COLOR", "1");
        }
        let terminal = Terminal::run(command, 80, 24);
        terminal.wait_for("\x1b[?1049h");
        terminal
    };
    let signal =
        |terminal: &Terminal, signal| kill_process(Pid::from_child(&terminal.child), signal).unwrap();
    type End<'a> = (&'a str, &'a dyn Fn(&Terminal));
    let ends: [End<'_>; 6] = [
        ("q", &|terminal| terminal.press("q")),
        ("Esc", &|terminal| terminal.press("\x1b")),
        ("Ctrl-C", &|terminal| terminal.press("\x03")),
        ("SIGTERM", &|terminal| signal(terminal, Signal::TERM)),
        ("SIGTERM twice", &|terminal| (0..2).for_each(|_| signal(terminal, Signal::TERM))),
        ("SIGHUP", &|terminal| signal(terminal, Signal::HUP)),
    ];
    let settings = Terminal::run(std::process::Command::new("true"), 80, 24).settings();
    for (has_colours, (name, end)) in [true, false, false, true, true, false].into_iter().zip(ends) {
        let mut terminal = start(has_colours);
        for id in &ids {
            terminal.wait_for(&id[..12.min(id.len())]);
        }
        assert_ne!(terminal.settings(), settings, "raw mode");
        // The strip needs a second sample.
        terminal.wait_for(if has_colours { "░" } else { "ccc" });
        terminal.press("?");
        // A word of the help, in a line that was empty: only cells that change are written.
        terminal.wait_for("clean:");
        let footers = || terminal.written().matches("quit").count();
        let before = footers();
        terminal.press("?");
        // A key that is not read before the end would be echoed.
        wait_for("the end of the help", || (footers() > before).then_some(()));
        end(&terminal);
        let status = terminal.end();
        assert_eq!(status.code(), Some(0), "{name}: {status:?}");
        assert_eq!(terminal.settings(), settings, "{name}");
        wait_for("the end of the output", || {
            terminal.written().ends_with("\x1b[?25h\x1b[?1049l").then_some(())
        });
        // A colour other than the default.
        let is_coloured = (1..7).any(|colour| terminal.written().contains(&format!("\x1b[38;5;{colour}m")));
        assert_eq!(is_coloured, has_colours, "{name}: {:?}", terminal.written());
    }
}

#[test]
fn without_a_terminal_the_options_are_named() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.stencil(&["top"]).exits(2).says("not a terminal");
    assert_eq!(world.json(&["top", "--once"])["clones"], Value::Array(vec![]));
}
