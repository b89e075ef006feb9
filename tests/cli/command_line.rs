//! The command line as an interface: exit codes, errors as text and as JSON, man pages, completions, choice of the
//! daemon.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::support::mount::{Run, STENCIL, TestMount, copy_program, daemon, temporary};

/// Runs `stencil` without a store. Returns its exit code, standard output and standard error.
fn stencil(args: &[&str]) -> (i32, String, String) {
    let dir = temporary("cli-");
    let output = Command::new(STENCIL)
        .args(args)
        .env("STENCIL_STORE", dir.path().join("no-store"))
        .env("STENCIL_RUNTIME_DIR", dir.path().join("run"))
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_missing_store_gives_one_error_a_hint_and_exit_code_4() {
    for command in
        [&["ls"][..], &["inspect", "web:1"], &["verify"], &["export", "web:1", "/tmp/x"], &["clone", "web:1"]]
    {
        let (code, out, err) = stencil(command);
        assert_eq!((code, out.as_str()), (4, ""), "{command:?}: {err}");
        let lines: Vec<&str> = err.lines().collect();
        assert_eq!(lines.len(), 2, "{command:?}: {err}");
        let [error, hint] = [("error: ", lines[0]), ("hint: ", lines[1])]
            .map(|(prefix, line)| line.strip_prefix(prefix).unwrap_or_else(|| panic!("{command:?}: {err}")));
        assert!(error.contains("no template store") && hint.contains("stencil import"), "{err}");
    }
}

#[test]
fn json_mode_prints_errors_as_json() {
    let (code, out, err) = stencil(&["--json", "ls"]);
    assert_eq!((code, err.as_str()), (4, ""));
    let reply: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(reply["schema"], 1);
    assert_eq!(reply["error"]["code"], "not-found");
    assert!(reply["error"]["path"].as_str().unwrap().ends_with("no-store"));
    assert!(reply["error"]["remedy"].as_str().unwrap().contains("stencil import"));

    let (code, out, _) = stencil(&["--json", "ls", "--no-such-option"]);
    assert_eq!(code, 2);
    let reply: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(reply["error"]["code"], "usage");
    assert!(reply["error"]["message"].as_str().unwrap().contains("--no-such-option"));
}

/// Details that the parser prints on separate lines: missing arguments, possible values, arguments in conflict, similar
/// names.
#[test]
fn json_usage_errors_have_all_words_of_the_parser() {
    for (command, message, remedy) in [
        (
            &["import"][..],
            "the following required arguments were not provided: <SOURCE>, <NAME[:TAG]>",
            "use: stencil import",
        ),
        (
            &["clone", "web:1", "--ready", "x"],
            "invalid value 'x' for '--ready <READY>' [possible values: mapped, notify]",
            "run 'stencil --help'",
        ),
        (
            &["capture", "sock", "web:1", "--check", "--pause"],
            "the argument '[NAME[:TAG]]' cannot be used with '--check'",
            "use: stencil capture",
        ),
        (&["gc", "--untaged"], "unexpected argument '--untaged' found", "'--untagged'"),
        (&["inspct", "web:1"], "unrecognized subcommand 'inspct'", "'stencil inspect'"),
        (&["tag", "web:1", "a:b:c"], "invalid value 'a:b:c' for '<NAME[:TAG]>': invalid tag", "stencil"),
    ] {
        let (code, out, err) = stencil(&[&["--json"], command].concat());
        assert_eq!((code, err.as_str()), (2, ""), "{command:?}");
        let error = &serde_json::from_str::<Value>(&out).unwrap()["error"];
        let text = |field: &str| error[field].as_str().unwrap().to_owned();
        assert!(text("message").starts_with(message), "{command:?}: {error}");
        assert!(text("remedy").contains(remedy), "{command:?}: {error}");
    }
}

#[test]
fn the_hint_for_a_missing_file_speaks_of_files() {
    let world = TestMount::unmounted();
    world.import_bytes(&[7; 4096], "web:1");
    for command in [
        &["import", "missing", "web:2"][..],
        &["import", "web-1", "web:2", "--state", "missing"],
        &["import", "web-1", "web:2", "--file", "x=missing"],
        &["export", "web:1", "missing/out"],
        &["save", "web:1", "-o", "missing/out"],
        &["load", "-i", "missing"],
        &["recipe", "edit", "web:1", "--from", "missing"],
        &["capture", "missing", "web:2"],
        &["capture", "missing", "--check"],
        &["mount", "missing"],
    ] {
        let run = world.stencil(command).exits(4).says("missing").says("No such file or directory");
        let hint = run.err.lines().find_map(|line| line.strip_prefix("hint: ")).unwrap_or_default();
        assert!(!hint.is_empty() && !hint.contains("stencil ls"), "{run:?}");
    }
}

#[test]
fn invalid_arguments_exit_with_2_and_print_no_result() {
    for command in [
        &["no-such-command"][..],
        &["import", "/dev/null", "../up:1"],
        &["import", "/dev/null", "a/b:1"],
        &["import", "/dev/null", "web:1", "--compression", "gzip"],
        &["clone", "web:1", "-n", "0"],
        &["clone", "web:1", "--simulate", "read=200%"],
        &["density", "--no-such-key"],
        &["explain", "memory-backend-file,id=x,size=4k,mem-path=/dev/null,foo=1"],
    ] {
        let (code, out, err) = stencil(command);
        assert_eq!((code, out.as_str()), (2, ""), "{command:?}: {err}");
        assert!(!err.is_empty() && !err.contains("panicked"), "{command:?}: {err}");
    }
}

#[test]
fn every_command_has_a_man_page_and_completions() {
    let dir = temporary("man-");
    let (code, _, err) = stencil(&["generate", "man", dir.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    let (_, help, _) = stencil(&["--help"]);
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|word| !word.is_empty()))
        .filter(|word| *word != "help")
        .collect();
    assert!(commands.len() >= 20, "{commands:?}");
    let completions: Vec<String> =
        ["bash", "zsh", "fish"].map(|shell| stencil(&["generate", "completions", shell]).1).to_vec();
    for command in commands {
        let page = fs::read_to_string(dir.path().join(format!("stencil-{command}.1")));
        assert!(page.unwrap_or_else(|e| panic!("{command}: {e}")).contains(".SH SYNOPSIS"));
        assert!(completions.iter().all(|text| text.contains(command)), "{command}");
    }
}

#[test]
fn the_variable_stencil_mountd_overrides_the_daemon_path() {
    let world = TestMount::unmounted();
    let mount_with = |program: &str| {
        let mut command = world.command();
        command.args(["mount", world.mountpoint().to_str().unwrap()]).env("STENCIL_MOUNTD", program);
        Run::of(format!("mount with STENCIL_MOUNTD={program}"), &command.output().unwrap())
    };
    let missing = world.dir().join("none");
    mount_with(missing.to_str().unwrap())
        .exits(4)
        .says(&format!("STENCIL_MOUNTD does not name a file: {}", missing.display()));
    mount_with(world.dir().to_str().unwrap()).exits(4).says("STENCIL_MOUNTD does not name a file");
    copy_program(daemon(), world.dir().join("another"));
    // A relative name is looked up in the working directory, not in PATH.
    mount_with("another").ok();
    let program = format!("/proc/{}/exe", world.status()["supervisor_pid"]);
    assert_eq!(fs::read_link(program).unwrap(), world.dir().join("another"));
    let restarted =
        world.command().args(["restart", "--all"]).env("STENCIL_MOUNTD", "none").output().unwrap();
    Run::of("restart".into(), &restarted).exits(4).says("STENCIL_MOUNTD does not name a file");
    world.stencil(&["restart", "--all"]).ok();
    let program = format!("/proc/{}/exe", world.status()["supervisor_pid"]);
    assert_eq!(fs::read_link(program).unwrap(), daemon());
    let text = world.stencil(&["status"]).ok().out;
    let log = world.status()["log"].as_str().unwrap().to_owned();
    assert!(text.contains(&format!("\n  log {log}\n")) && fs::metadata(&log).unwrap().is_file(), "{text}");
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let script = format!("{STENCIL} generate completions bash | head -1; echo ${{PIPESTATUS[0]}}");
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.lines().last() == Some("0"), "{text} {}", String::from_utf8_lossy(&output.stderr));
}
