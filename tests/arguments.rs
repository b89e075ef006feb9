//! Every argument of every command, with values that nobody expects: the table is made from the parser's own tree, so that
//! a new command is in it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::CommandFactory;
use serde_json::Value;

use crate::support::mount::{STENCIL, TestMount, temporary};

/// Exit codes that docs/reference/exit-codes-and-json.md promises.
const CODES: [i32; 8] = [0, 1, 2, 3, 4, 5, 6, 75];

/// Not UTF-8.
const BYTES: &[u8] = b"\xff\xfe/\xc3(";

fn odd(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

/// Commands that do something, with the words that lead to them.
fn leaves(command: &clap::Command, words: &[String], out: &mut Vec<(Vec<String>, clap::Command)>) {
    let mut below = command.get_subcommands().filter(|c| c.get_name() != "help").peekable();
    if below.peek().is_none() {
        return out.push((words.to_vec(), command.clone()));
    }
    for next in below {
        leaves(next, &[words, &[next.get_name().to_owned()]].concat(), out);
    }
}

/// A value that another argument has meanwhile.
fn filler(arg: &clap::Arg) -> &'static str {
    match arg.get_id().as_str() {
        "template" | "templates" | "what" | "reference" => "web:1",
        "source" => "source",
        "tag" | "new" => "new:1",
        "vmm" => "qemu",
        "shell" => "bash",
        "mode" => "0444",
        _ => "missing",
    }
}

/// Every argument of the command with that value, the required ones filled in.
fn calls(words: &[String], command: &clap::Command, value: &OsStr) -> Vec<Vec<OsString>> {
    let takes = |arg: &&clap::Arg| arg.get_action().takes_values();
    let with = |chosen: &clap::Arg| {
        let mut call: Vec<OsString> = words.iter().map(OsString::from).collect();
        let (mut named, mut placed) = (Vec::new(), Vec::new());
        for arg in command.get_arguments().filter(takes) {
            let chosen = arg.get_id() == chosen.get_id();
            if !chosen && !arg.is_required_set() {
                continue;
            }
            let value = if chosen { value.to_owned() } else { filler(arg).into() };
            match arg.get_long() {
                Some(long) => {
                    let mut word = OsString::from(format!("--{long}="));
                    word.push(value);
                    named.push(word);
                }
                None => match arg.get_short() {
                    Some(short) => named.extend([format!("-{short}").into(), value]),
                    None => placed.push(value),
                },
            }
        }
        call.extend(named);
        call.extend(placed);
        call
    };
    command.get_arguments().filter(takes).map(with).collect()
}

/// Runs to the end; panics where there is none.
#[track_caller]
fn run(command: &mut Command, words: &[OsString]) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |mut from: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            bytes
        })
    };
    let (out, err) = (read(Box::new(out)), read(Box::new(err)));
    let until = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("stencil {words:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Output { status, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
}

#[track_caller]
fn ended_well(output: &Output, words: &[OsString]) {
    let err = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| CODES.contains(&code)) && !err.contains("panicked"),
        "stencil {words:?}: exit code {code:?}, signal {:?}\n{err}",
        output.status.signal()
    );
}

fn world() -> tempfile::TempDir {
    let dir = temporary("arguments-");
    fs::write(dir.path().join("source"), [7; 4096]).unwrap();
    let output = in_world(dir.path()).args(["import", "source", "web:1"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    dir
}

fn in_world(dir: &Path) -> Command {
    let mut command = Command::new(STENCIL);
    command
        .current_dir(dir)
        .env("STENCIL_STORE", dir.join("store"))
        .env("STENCIL_RUNTIME_DIR", dir.join("run"))
        .env("EDITOR", "true")
        .env_remove("VISUAL")
        .env_remove("STENCIL_LOG")
        .env_remove("STENCIL_MOUNTD");
    command
}

#[test]
fn no_value_of_any_argument_makes_a_command_panic() {
    let dir = world();
    let mut commands = Vec::new();
    leaves(&stencilfs::cli::Cli::command(), &[], &mut commands);
    assert!(commands.len() >= 25, "{} commands", commands.len());
    let long = vec![b'a'; 5000];
    let mut all = Vec::new();
    for value in [BYTES, b"", b"-\xff", &long] {
        for (words, command) in &commands {
            all.extend(calls(words, command, OsStr::from_bytes(value)));
        }
    }
    assert!(all.len() >= 250, "{} calls", all.len());
    // What stands for any command: options of all of them, and words that are none.
    for value in [BYTES, b"", &long] {
        let value = || odd(value);
        all.extend([vec![value()], vec!["--store".into(), value(), "ls".into()]]);
        all.push(vec!["--json".into(), "--store".into(), value(), "ls".into()]);
        all.push(vec!["ls".into(), "--json".into(), value()]);
    }
    let left = Mutex::new(all.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(words) = left.lock().unwrap().next() else { return };
                    ended_well(&run(in_world(dir.path()).args(&words), &words), &words);
                }
            });
        }
    });
}

#[test]
fn no_variable_and_no_folder_makes_a_command_panic() {
    let dir = world();
    let commands: [&[&str]; 9] = [
        &["ls"],
        &["status"],
        &["ps"],
        &["verify"],
        &["import", "source", "new:1"],
        &["mount", "mnt"],
        &["clone", "web:1"],
        &["recipe", "edit", "web:1"],
        &["stop", "--all"],
    ];
    fs::create_dir(dir.path().join("mnt")).unwrap();
    for name in
        ["STENCIL_STORE", "STENCIL_RUNTIME_DIR", "STENCIL_LOG", "STENCIL_MOUNTD", "EDITOR", "TMPDIR", "PATH"]
    {
        for value in [BYTES, b""] {
            for words in commands {
                let mut command = in_world(dir.path());
                command.args(words).env(name, odd(value));
                let words: Vec<OsString> = words.iter().map(OsString::from).collect();
                ended_well(&run(&mut command, &words), &words);
                let mut unmount = in_world(dir.path());
                if words[0] == "mount" {
                    unmount.args(["umount", "mnt"]).env(name, odd(value)).output().unwrap();
                }
            }
        }
    }
    // A working directory that was removed.
    for words in commands {
        let script = format!("mkdir gone && cd gone && rmdir ../gone && exec {STENCIL} \"$@\"");
        let mut command = Command::new("sh");
        command.current_dir(dir.path()).args(["-c", &script, "sh"]).args(words);
        command.env("STENCIL_STORE", "store").env("STENCIL_RUNTIME_DIR", "run").env("EDITOR", "true");
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        ended_well(&run(&mut command, &words), &words);
    }
}

#[test]
fn paths_of_any_bytes_are_used_as_they_are_or_refused() {
    let world = TestMount::unmounted();
    let odd = |name: &str| world.dir().join(odd(&[name.as_bytes(), b"\xff"].concat()));
    let (source, store, exported) = (odd("source"), odd("store"), odd("exported"));
    fs::write(&source, [7; 8192]).unwrap();
    let run = |words: &[&OsStr]| {
        let output = world.command().arg("--json").args(words).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{words:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code().unwrap(), answer)
    };
    fn words(words: &'static [&'static str]) -> Vec<&'static OsStr> {
        words.iter().map(OsStr::new).collect()
    }
    let in_store = |rest: &'static [&'static str]| {
        [vec![OsStr::new("--store"), store.as_os_str()], words(rest)].concat()
    };
    let imported = run(&[
        vec![OsStr::new("--store"), store.as_os_str(), OsStr::new("import"), source.as_os_str()],
        words(&["web:1"]),
    ]
    .concat());
    assert_eq!((imported.0, store.join("templates").is_dir() || store.is_dir()), (0, true), "{}", imported.1);
    assert_eq!(run(&in_store(&["verify"])).0, 0);
    let mut export = in_store(&["export", "web:1"]);
    export.push(exported.as_os_str());
    assert_eq!(run(&export).0, 0);
    assert_eq!(fs::read(&exported).unwrap(), [7; 8192]);
    let saved = odd("saved");
    let mut save = in_store(&["save", "web:1", "-o"]);
    save.push(saved.as_os_str());
    let (code, answer) = run(&save);
    assert_eq!(code, 0, "{answer}");
    assert!(answer["output"].as_str().unwrap().ends_with(r"saved\xff"), "{answer}");
    let missing = odd("missing");
    let (code, answer) = run(&[OsStr::new("--store"), missing.as_os_str(), OsStr::new("ls")]);
    assert_eq!(code, 4);
    assert!(answer["error"]["path"].as_str().unwrap().ends_with(r"missing\xff"), "{answer}");

    // Records, and what is pasted into a VMM's configuration, are JSON: such a path is refused before anything is mounted.
    let plain = world.mountpoint().as_os_str();
    fs::create_dir(odd("mnt")).unwrap();
    fs::create_dir(odd("cache")).unwrap();
    let [mnt, cache] = [odd("mnt"), odd("cache")];
    let mounts: [&[&OsStr]; 3] = [
        &[OsStr::new("mount"), mnt.as_os_str()],
        &[OsStr::new("--store"), store.as_os_str(), OsStr::new("mount"), plain],
        &[OsStr::new("mount"), plain, OsStr::new("--cache-dir"), cache.as_os_str()],
    ];
    for words in mounts {
        let (code, answer) = run(words);
        assert_eq!((code, answer["error"]["code"].as_str()), (2, Some("usage")), "{words:?}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("not UTF-8"), "{answer}");
    }
    let mut elsewhere = world.command();
    elsewhere.arg("mount").arg(plain).env("STENCIL_RUNTIME_DIR", odd("run"));
    let output = elsewhere.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        fs::read_to_string("/proc/mounts")
            .unwrap()
            .lines()
            .all(|line| !line.contains(world.dir().to_str().unwrap()))
    );
}

/// An argument as help prints it, and its default.
fn spelled(arg: &clap::Arg) -> (String, String) {
    let short = match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(_)) => format!("-{short}, "),
        _ => String::new(),
    };
    // A flag's default is that it is absent.
    let takes_values = arg.get_action().takes_values();
    let defaults = arg.get_default_values().iter().filter(|_| takes_values);
    let defaults: Vec<_> = defaults.map(|value| value.to_str().unwrap()).collect();
    (format!("{short}{arg}"), defaults.join(" "))
}

#[test]
fn the_documented_commands_are_those_that_exist() {
    fn visible(command: &clap::Command) -> bool {
        !command.is_hide_set() && command.get_subcommands().all(visible)
    }
    type Arguments = BTreeMap<String, String>;
    let mut cli = stencilfs::cli::Cli::command().disable_help_subcommand(true);
    cli.build();
    let mut commands = Vec::new();
    for below in cli.get_subcommands().filter(|command| visible(command)) {
        leaves(below, &["stencil".to_owned(), below.get_name().to_owned()], &mut commands);
    }
    // Options of every command belong to the program itself.
    let global =
        |arg: &&clap::Arg| arg.is_global_set() || ["help", "version"].contains(&arg.get_id().as_str());
    let own = |command: &clap::Command| -> Arguments {
        command.get_arguments().filter(|arg| !arg.is_hide_set() && !global(arg)).map(spelled).collect()
    };
    let of_every_command = cli.get_arguments().filter(|arg| arg.is_global_set()).map(spelled).collect();
    let mut ours: BTreeMap<String, Arguments> =
        commands.iter().map(|(words, command)| (words.join(" "), own(command))).collect();
    ours.insert("stencil".to_owned(), of_every_command);
    assert!(ours.len() >= 29, "{:?}", ours.keys());

    let page =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/commands.md")).unwrap();
    let mut documented: BTreeMap<String, Arguments> = BTreeMap::new();
    for section in page.split("\n### ").skip(1) {
        let (command, text) = section.split_once('\n').unwrap();
        let rows = text.lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| {
            let row = row.replace("\\|", "\0");
            let cells: Vec<String> =
                row.split('|').map(|cell| cell.trim().trim_matches('`').replace('\0', "|")).collect();
            assert!(cells.len() == 5 && !cells[3].is_empty(), "{command}: {row}");
            (cells[1].clone(), cells[2].clone())
        });
        let once = documented.insert(command.to_owned(), cells.collect()).is_none();
        assert!(once, "{command} is documented twice");
    }
    assert_eq!(documented.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    for (command, arguments) in &ours {
        assert_eq!(
            &documented[command], arguments,
            "{command}: documented on the left, existing on the right"
        );
    }
}
