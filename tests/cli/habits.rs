//! Commands and options of other tools: each works, or the error names the command to use.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, wait_for};

/// Runs `stencil` with these variables set in addition.
fn with(variables: &[(&str, &str)], words: &[&str]) -> Run {
    let mut command = Command::new(STENCIL);
    command.args(words).env_remove("STENCIL_STORE").envs(variables.iter().copied());
    Run::of(words.join(" "), &command.output().unwrap())
}

#[test]
fn a_command_alone_prints_its_help_whatever_variables_are_set() {
    for words in [&[][..], &["recipe"]] {
        let plain = with(&[], words).exits(2);
        assert!(plain.err.contains("Usage: stencil") && plain.err.contains("Commands:"), "{plain:?}");
        let set = with(&[("STENCIL_STORE", "/srv/store")], words).exits(2);
        let same = |text: &str| text.replace("[env: STENCIL_STORE=/srv/store]", "[env: STENCIL_STORE=]");
        assert_eq!(same(&set.err), plain.err);
        assert_eq!((set.out.as_str(), plain.out.as_str()), ("", ""));
    }
    // A call with arguments and without a command is an error.
    for variables in [&[][..], &[("STENCIL_STORE", "/srv/store")]] {
        let run = with(variables, &["--store", "/srv/store"]).exits(2);
        assert!(run.err.starts_with("error: ") && !run.err.contains("Commands:"), "{run:?}");
    }
}

#[test]
fn an_unknown_command_is_an_error_with_the_command_to_use() {
    for (word, hint) in [
        ("run", "use 'stencil clone'"),
        ("push", "use 'stencil save' and 'stencil load' on the other host"),
        ("inspct", "use 'stencil inspect', or run 'stencil --help' to list the commands"),
        ("frobnicate", "run 'stencil --help' to list the commands"),
    ] {
        let expected = format!("error: unrecognized subcommand '{word}'\nhint: {hint}\n");
        let run = with(&[], &[word, "web:1"]).exits(2);
        assert_eq!((run.err.as_str(), run.out.as_str()), (expected.as_str(), ""));
        let run = with(&[], &["--json", word, "web:1"]).exits(2);
        let reply: Value = serde_json::from_str(&run.out).unwrap();
        assert_eq!(reply["error"]["remedy"], hint, "{reply:#}");
    }
    // A command of another tool is recognized only where a command is expected.
    for (word, hint) in [("edti", "use 'stencil recipe edit'"), ("create", "run 'stencil recipe --help'")] {
        let run = with(&[], &["recipe", word, "web:1"]).exits(2);
        assert!(run.err.contains(&format!("hint: {hint}")), "{}", run.err);
    }
}

#[test]
fn names_and_options_of_other_tools_work() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&[7; 1 << 20], "web:1");
    for other in ["images", "list"] {
        assert_eq!(world.stencil(&[other]).ok().out, world.stencil(&["ls"]).ok().out);
    }
    let version = world.stencil(&["--version"]).ok().out;
    assert_eq!(world.stencil(&["version"]).ok().out, version);
    assert_eq!(world.json(&["version"])["version"], version.trim().trim_start_matches("stencil "));

    let launched = world.json(&["clone", "web:1", "-n", "2", "--simulate", "write=1p"]);
    let pid = launched["clones"][0]["pid"].as_u64().unwrap();
    let mut ids: Vec<&str> =
        launched["clones"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    let listed = world.stencil(&["ps", "-q"]).ok().out;
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    assert_eq!(listed, ids);
    Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap();
    let all = wait_for("the end of a clone", || {
        let all = world.stencil(&["ps", "-a"]).ok().out;
        all.contains("SIGKILL at").then_some(all)
    });
    assert!(ids.iter().all(|id| all.contains(id)), "{all}");
    world.stencil(&[&["kill"], &ids[..]].concat()).ok();
    assert_eq!(world.stencil(&["ps", "-q"]).ok().out, "");
    world.stencil(&["rmi", "web:1"]).ok();
    world.stencil(&["unmount", world.mountpoint().to_str().unwrap()]).ok();
}

#[test]
fn logs_are_followed_until_the_clone_has_ended() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&[7; 1 << 20], "web:1");
    let go = world.dir().join("go");
    let script = format!(
        "echo first; echo ready >&$STENCIL_NOTIFY; while [ ! -e {} ]; do sleep 0.1; done; echo last",
        go.display()
    );
    let launched = world.json(&["clone", "web:1", "--ready", "notify", "--", "sh", "-c", &script]);
    let id = launched["clones"][0]["id"].as_str().unwrap();
    world.stencil(&["--json", "logs", "-f", id]).exits(2);
    let mut follow = world.command();
    let mut follow = follow.args(["logs", "-f", id]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("first"));
    assert!(follow.try_wait().unwrap().is_none(), "the clone has not ended");
    std::fs::write(&go, "").unwrap();
    assert_eq!(lines.collect::<Vec<_>>(), ["last"]);
    assert!(follow.wait().unwrap().success());
    assert_eq!(world.stencil(&["logs", id, "--follow"]).ok().out, "first\nlast\n");
}
