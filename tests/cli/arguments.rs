//! Every argument of every command with invalid values. The list of arguments comes from the parser, so that new
//! commands are included.

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

/// Exit codes that docs/reference/exit-codes-and-json.md documents.
const DOCUMENTED_CODES: [i32; 8] = [0, 1, 2, 3, 4, 5, 6, 75];

/// Bytes that are not valid UTF-8.
const NOT_UTF8: &[u8] = b"\xff\xfe/\xc3(";

fn os_string(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

/// Appends the commands without subcommands to `out`, each with its path of command names.
fn leaf_commands(command: &clap::Command, path: &[String], out: &mut Vec<(Vec<String>, clap::Command)>) {
    let mut subcommands = command.get_subcommands().filter(|c| c.get_name() != "help").peekable();
    if subcommands.peek().is_none() {
        return out.push((path.to_vec(), command.clone()));
    }
    for next in subcommands {
        leaf_commands(next, &[path, &[next.get_name().to_owned()]].concat(), out);
    }
}

/// Returns a valid value for a required argument that is not under test.
fn valid_value(arg: &clap::Arg) -> &'static str {
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

/// Returns one call of the command for each of its arguments, with that argument set to `value` and the other required
/// arguments set to valid values.
fn calls(path: &[String], command: &clap::Command, value: &OsStr) -> Vec<Vec<OsString>> {
    let takes = |arg: &&clap::Arg| arg.get_action().takes_values();
    let with = |chosen: &clap::Arg| {
        let mut call: Vec<OsString> = path.iter().map(OsString::from).collect();
        let (mut options, mut positionals) = (Vec::new(), Vec::new());
        for arg in command.get_arguments().filter(takes) {
            let chosen = arg.get_id() == chosen.get_id();
            if !chosen && !arg.is_required_set() {
                continue;
            }
            let value = if chosen { value.to_owned() } else { valid_value(arg).into() };
            match arg.get_long() {
                Some(long) => {
                    let mut option = OsString::from(format!("--{long}="));
                    option.push(value);
                    options.push(option);
                }
                None => match arg.get_short() {
                    Some(short) => options.extend([format!("-{short}").into(), value]),
                    None => positionals.push(value),
                },
            }
        }
        call.extend(options);
        call.extend(positionals);
        call
    };
    command.get_arguments().filter(takes).map(with).collect()
}

/// Runs the command; panics if it does not exit within 60 s.
#[track_caller]
fn run(command: &mut Command, args: &[OsString]) -> Output {
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
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("stencil {args:?} does not exit");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Output { status, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
}

#[track_caller]
fn assert_documented_exit(output: &Output, args: &[OsString]) {
    let err = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| DOCUMENTED_CODES.contains(&code)) && !err.contains("panicked"),
        "stencil {args:?}: exit code {code:?}, signal {:?}\n{err}",
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
fn no_argument_value_makes_a_command_panic() {
    let dir = world();
    let mut commands = Vec::new();
    leaf_commands(&stencilfs::cli::Cli::command(), &[], &mut commands);
    assert!(commands.len() >= 25, "{} commands", commands.len());
    let long = vec![b'a'; 5000];
    let mut all = Vec::new();
    for value in [NOT_UTF8, b"", b"-\xff", &long] {
        for (path, command) in &commands {
            all.extend(calls(path, command, OsStr::from_bytes(value)));
        }
    }
    assert!(all.len() >= 250, "{} calls", all.len());
    // Global options, and words that are not a command.
    for value in [NOT_UTF8, b"", &long] {
        let value = || os_string(value);
        all.extend([vec![value()], vec!["--store".into(), value(), "ls".into()]]);
        all.push(vec!["--json".into(), "--store".into(), value(), "ls".into()]);
        all.push(vec!["ls".into(), "--json".into(), value()]);
    }
    let remaining = Mutex::new(all.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(args) = remaining.lock().unwrap().next() else { return };
                    assert_documented_exit(&run(in_world(dir.path()).args(&args), &args), &args);
                }
            });
        }
    });
}

#[test]
fn no_environment_variable_or_cwd_makes_a_command_panic() {
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
        for value in [NOT_UTF8, b""] {
            for args in commands {
                let mut command = in_world(dir.path());
                command.args(args).env(name, os_string(value));
                let args: Vec<OsString> = args.iter().map(OsString::from).collect();
                assert_documented_exit(&run(&mut command, &args), &args);
                let mut unmount = in_world(dir.path());
                if args[0] == "mount" {
                    unmount.args(["umount", "mnt"]).env(name, os_string(value)).output().unwrap();
                }
            }
        }
    }
    // A working directory that was removed.
    for args in commands {
        let script = format!("mkdir gone && cd gone && rmdir ../gone && exec {STENCIL} \"$@\"");
        let mut command = Command::new("sh");
        command.current_dir(dir.path()).args(["-c", &script, "sh"]).args(args);
        command.env("STENCIL_STORE", "store").env("STENCIL_RUNTIME_DIR", "run").env("EDITOR", "true");
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        assert_documented_exit(&run(&mut command, &args), &args);
    }
}

#[test]
fn non_utf8_paths_are_used_unchanged_or_refused() {
    let world = TestMount::unmounted();
    let non_utf8_path = |name: &str| world.dir().join(os_string(&[name.as_bytes(), b"\xff"].concat()));
    let (source, store, exported) =
        (non_utf8_path("source"), non_utf8_path("store"), non_utf8_path("exported"));
    fs::write(&source, [7; 8192]).unwrap();
    let run = |args: &[&OsStr]| {
        let output = world.command().arg("--json").args(args).output().unwrap();
        let reply: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code().unwrap(), reply)
    };
    fn os_args(args: &'static [&'static str]) -> Vec<&'static OsStr> {
        args.iter().map(OsStr::new).collect()
    }
    let in_store = |rest: &'static [&'static str]| {
        [vec![OsStr::new("--store"), store.as_os_str()], os_args(rest)].concat()
    };
    let imported = run(&[
        vec![OsStr::new("--store"), store.as_os_str(), OsStr::new("import"), source.as_os_str()],
        os_args(&["web:1"]),
    ]
    .concat());
    assert_eq!((imported.0, store.join("templates").is_dir() || store.is_dir()), (0, true), "{}", imported.1);
    assert_eq!(run(&in_store(&["verify"])).0, 0);
    let mut export = in_store(&["export", "web:1"]);
    export.push(exported.as_os_str());
    assert_eq!(run(&export).0, 0);
    assert_eq!(fs::read(&exported).unwrap(), [7; 8192]);
    let saved = non_utf8_path("saved");
    let mut save = in_store(&["save", "web:1", "-o"]);
    save.push(saved.as_os_str());
    let (code, reply) = run(&save);
    assert_eq!(code, 0, "{reply}");
    assert!(reply["output"].as_str().unwrap().ends_with(r"saved\xff"), "{reply}");
    let missing = non_utf8_path("missing");
    let (code, reply) = run(&[OsStr::new("--store"), missing.as_os_str(), OsStr::new("ls")]);
    assert_eq!(code, 4);
    assert!(reply["error"]["path"].as_str().unwrap().ends_with(r"missing\xff"), "{reply}");

    // Records and VMM configurations are JSON, which cannot hold such a path: the mount is refused before it starts.
    let mountpoint = world.mountpoint().as_os_str();
    fs::create_dir(non_utf8_path("mnt")).unwrap();
    fs::create_dir(non_utf8_path("cache")).unwrap();
    let [mnt, cache] = [non_utf8_path("mnt"), non_utf8_path("cache")];
    let mounts: [&[&OsStr]; 3] = [
        &[OsStr::new("mount"), mnt.as_os_str()],
        &[OsStr::new("--store"), store.as_os_str(), OsStr::new("mount"), mountpoint],
        &[OsStr::new("mount"), mountpoint, OsStr::new("--cache-dir"), cache.as_os_str()],
    ];
    for args in mounts {
        let (code, reply) = run(args);
        assert_eq!((code, reply["error"]["code"].as_str()), (2, Some("usage")), "{args:?}: {reply}");
        assert!(reply["error"]["message"].as_str().unwrap().contains("not UTF-8"), "{reply}");
    }
    let mut mount = world.command();
    mount.arg("mount").arg(mountpoint).env("STENCIL_RUNTIME_DIR", non_utf8_path("run"));
    let output = mount.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        fs::read_to_string("/proc/mounts")
            .unwrap()
            .lines()
            .all(|line| !line.contains(world.dir().to_str().unwrap()))
    );
}

/// Returns an argument as `--help` prints it, and its default value.
fn as_documented(arg: &clap::Arg) -> (String, String) {
    let short = match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(_)) => format!("-{short}, "),
        _ => String::new(),
    };
    // A flag has no default value to document.
    let takes_values = arg.get_action().takes_values();
    let defaults = arg.get_default_values().iter().filter(|_| takes_values);
    let defaults: Vec<_> = defaults.map(|value| value.to_str().unwrap()).collect();
    (format!("{short}{arg}"), defaults.join(" "))
}

#[test]
fn documented_commands_match_the_parser() {
    fn visible(command: &clap::Command) -> bool {
        !command.is_hide_set() && command.get_subcommands().all(visible)
    }
    type Arguments = BTreeMap<String, String>;
    let mut cli = stencilfs::cli::Cli::command().disable_help_subcommand(true);
    cli.build();
    let mut commands = Vec::new();
    for command in cli.get_subcommands().filter(|command| visible(command)) {
        leaf_commands(command, &["stencil".to_owned(), command.get_name().to_owned()], &mut commands);
    }
    // Global options are documented once, for the program itself.
    let global =
        |arg: &&clap::Arg| arg.is_global_set() || ["help", "version"].contains(&arg.get_id().as_str());
    let arguments_of = |command: &clap::Command| -> Arguments {
        command.get_arguments().filter(|arg| !arg.is_hide_set() && !global(arg)).map(as_documented).collect()
    };
    let global_options = cli.get_arguments().filter(|arg| arg.is_global_set()).map(as_documented).collect();
    let mut existing: BTreeMap<String, Arguments> =
        commands.iter().map(|(words, command)| (words.join(" "), arguments_of(command))).collect();
    existing.insert("stencil".to_owned(), global_options);
    assert!(existing.len() >= 29, "only {} commands: {:?}", existing.len(), existing.keys());

    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference");
    let pages =
        ["commands.md", "commands-clones.md"].map(|page| fs::read_to_string(reference.join(page)).unwrap());
    let mut documented: BTreeMap<String, Arguments> = BTreeMap::new();
    for section in pages.iter().flat_map(|page| page.split("\n### ").skip(1)) {
        let (command, text) = section.split_once('\n').unwrap();
        let rows = text.lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| {
            let row = row.replace("\\|", "\0");
            let cells: Vec<String> =
                row.split('|').map(|cell| cell.trim().trim_matches('`').replace('\0', "|")).collect();
            assert!(cells.len() == 5 && !cells[3].is_empty(), "{command}: {row}");
            (cells[1].clone(), cells[2].clone())
        });
        let is_new = documented.insert(command.to_owned(), cells.collect()).is_none();
        assert!(is_new, "{command} is documented twice");
    }
    assert_eq!(documented.keys().collect::<Vec<_>>(), existing.keys().collect::<Vec<_>>());
    for (command, arguments) in &existing {
        assert_eq!(
            &documented[command], arguments,
            "{command}: documented (left) and existing (right) arguments differ"
        );
    }
}
