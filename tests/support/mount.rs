//! A private store, runtime directory and mount for one scenario, served by the real binaries.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;
use stencilfs::control::{Channel, socket_path};
use stencilfs::sys::files::mount;
use stencilfs::sys::process::ProcessId;

/// The `stencil` binary.
pub const STENCIL: &str = env!("CARGO_BIN_EXE_stencil");

/// The path of the daemon's binary, which `cargo build --workspace` puts into the same directory.
pub fn daemon() -> PathBuf {
    let path = Path::new(STENCIL).with_file_name("stencil-mountd");
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace` first", path.display());
    path
}

/// Creates a temporary directory on the file system of the build directory, never on a tmpfs.
pub fn temporary(prefix: &str) -> tempfile::TempDir {
    tempfile::Builder::new().prefix(prefix).tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The result of a command.
#[derive(Debug)]
pub struct Run {
    /// The arguments, for messages.
    pub words: String,
    /// The exit code; -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Run {
    /// Collects the result of a command; `words` are its arguments.
    pub fn of(words: String, output: &Output) -> Run {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Run {
            words,
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// Panics unless the exit code is 0.
    #[track_caller]
    pub fn ok(self) -> Run {
        self.exits(0)
    }

    /// Panics unless the exit code is `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Run {
        assert_eq!(self.code, code, "stencil {}\nstdout: {}\nstderr: {}", self.words, self.out, self.err);
        self
    }

    /// Panics unless standard error is one line that contains `words` and a second line with the remedy.
    #[track_caller]
    pub fn says(self, words: &str) -> Run {
        assert!(self.err.contains(words), "stencil {}: '{words}' is not in: {}", self.words, self.err);
        assert_eq!(
            self.err.lines().count(),
            2,
            "stencil {}: expected an error line and a remedy line: {}",
            self.words,
            self.err
        );
        self
    }
}

/// A store with a mount. Drop stops its clones, unmounts, and kills only the processes of this mount.
pub struct TestMount {
    dir: tempfile::TempDir,
    mountpoint: PathBuf,
    runtime_dir: PathBuf,
    /// Set by a scenario that makes its server die of a forbidden system call.
    pub expects_sigsys: bool,
}

/// The name of the signal in the log when a server makes a system call that is not listed in
/// docs/explanation/security.md.
pub const SIGSYS: &str = "SIGSYS";

/// The words of an error about processes that may be clones and cannot be inspected.
pub const UNSEEN: &str = "inspecting processes that may be clones";

impl TestMount {
    /// Opens a connection to the control socket of this mount's supervisor.
    pub fn control(&self) -> Channel {
        let mut records = std::fs::read_dir(self.runtime_dir().join("mounts")).unwrap();
        let directory = std::fs::File::open(records.next().unwrap().unwrap().path()).unwrap();
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(socket_path(directory.as_fd())).unwrap()).unwrap();
        let channel = Channel::new(socket);
        channel.set_timeout(Duration::from_secs(30)).unwrap();
        channel
    }

    /// Creates an empty store and mounts it with `--serve SERVE` (`auto`, `kernel`, `passthrough`, `decode`).
    pub fn new(serve: &str) -> TestMount {
        Self::with(&["--serve", serve])
    }

    /// Creates an empty store and mounts it with these options.
    pub fn with(options: &[&str]) -> TestMount {
        let world = Self::unmounted();
        world.mount(options).ok();
        world
    }

    /// Creates an empty store and a mount point, without a mount.
    pub fn unmounted() -> TestMount {
        daemon();
        let dir = temporary("mount-");
        let mountpoint = dir.path().join("mnt");
        std::fs::create_dir(&mountpoint).unwrap();
        stencilfs::store::Store::open_or_create(&dir.path().join("store")).unwrap();
        let runtime_dir = dir.path().join("run");
        TestMount { dir, mountpoint, runtime_dir, expects_sigsys: false }
    }

    /// Selects another runtime directory, before the mount.
    #[must_use]
    pub fn with_runtime_dir(mut self, runtime_dir: PathBuf) -> TestMount {
        self.runtime_dir = runtime_dir;
        self
    }

    /// Runs `stencil mount` with these options.
    pub fn mount(&self, options: &[&str]) -> Run {
        let mut words = vec!["mount", self.mountpoint.to_str().unwrap()];
        words.extend(options);
        self.stencil(&words)
    }

    /// The scenario's private directory, removed on drop.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes the scenario's directory and its parents searchable for every user.
    pub fn open_to_others(&self) {
        use std::os::unix::fs::PermissionsExt;
        for directory in self.dir().ancestors() {
            let mode = std::fs::metadata(directory).unwrap().permissions().mode();
            if mode & 1 == 0 {
                let ours = directory.starts_with(env!("CARGO_TARGET_TMPDIR"));
                assert!(ours, "{} is not searchable for other users", directory.display());
                std::fs::set_permissions(directory, PermissionsExt::from_mode(mode | 0o011)).unwrap();
            }
        }
    }

    /// The mount point.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The store's directory.
    pub fn store_dir(&self) -> PathBuf {
        self.dir().join("store")
    }

    /// The runtime directory.
    pub fn runtime_dir(&self) -> PathBuf {
        self.runtime_dir.clone()
    }

    /// The path of a template's file in the mount.
    pub fn file(&self, digest: &str, name: &str) -> PathBuf {
        self.mountpoint.join("by-id").join(digest).join(name)
    }

    /// Returns a `stencil` command for this store and runtime directory.
    pub fn command(&self) -> Command {
        self.command_in(STENCIL)
    }

    /// Returns a command for another program with the same environment.
    pub fn command_in(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("STENCIL_STORE", self.store_dir())
            .env("STENCIL_RUNTIME_DIR", self.runtime_dir())
            // A forbidden system call kills the server instead of failing with EPERM.
            .env("STENCIL_SECCOMP", "kill")
            .env_remove("STENCIL_LOG")
            .env_remove("STENCIL_MOUNTD")
            .current_dir(self.dir());
        command
    }

    /// Runs `stencil` in another time namespace, whose clocks are far ahead.
    pub fn in_other_time_namespace(&self, words: &[&str]) -> Run {
        let mut command = self.command_in("unshare");
        command.args(["--time", "--boottime", "1000", "--monotonic", "1000000"]).arg(STENCIL).args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    }

    /// Runs `stencil`, and retries while the error is that a process of another scenario cannot be inspected.
    pub fn stencil(&self, words: &[&str]) -> Run {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let output = self.command().args(words).output().unwrap();
            let run = Run::of(words.join(" "), &output);
            let said = format!("{}{}", run.err, run.out);
            let unseen = said.split_once(UNSEEN).filter(|_| run.code == 75).map(|(_, whom)| whom);
            if unseen.is_none_or(|whom| self.names_one_of_ours(whom)) || Instant::now() > until {
                return run;
            }
        }
    }

    /// Returns true if the text contains the PID of a process of this mount or of one of its clones.
    fn names_one_of_ours(&self, text: &str) -> bool {
        let clones = std::fs::read_dir(self.runtime_dir().join("clones")).into_iter().flatten().flatten();
        let read = |clone: &std::fs::DirEntry, name| std::fs::read_to_string(clone.path().join(name));
        let lines =
            clones.filter_map(|clone| read(&clone, "clone.json").or(read(&clone, "clones.jsonl")).ok());
        let lines: Vec<String> =
            lines.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        let clones = lines.iter().filter_map(|line| {
            let record: Value = serde_json::from_str(line).ok()?;
            record["pid"].as_u64().or(record["clone"]["pid"].as_u64())
        });
        let ours: Vec<u64> = self.processes().iter().map(|p| p.pid.into()).chain(clones).collect();
        text.split(|c: char| !c.is_ascii_digit())
            .any(|word| word.parse().is_ok_and(|pid| ours.contains(&pid)))
    }

    /// Runs `stencil --json`, which must exit with 0, and returns the parsed output.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let run = self.stencil(&[&["--json"], words].concat()).ok();
        serde_json::from_str(&run.out).unwrap_or_else(|e| panic!("{words:?}: {e}: {}", run.out))
    }

    /// Imports a memory image and returns the template's digest.
    pub fn import(&self, source: &Path, tag: &str) -> String {
        let answer = self.json(&["import", source.to_str().unwrap(), tag]);
        answer["digest"].as_str().unwrap_or_else(|| panic!("no digest in {answer}")).to_owned()
    }

    /// Writes `bytes` to a file in the scenario's directory and imports the file.
    pub fn import_bytes(&self, bytes: &[u8], tag: &str) -> String {
        let source = self.dir().join(tag.replace(':', "-"));
        std::fs::write(&source, bytes).unwrap();
        self.import(&source, tag)
    }

    /// Opens the files of a template, and waits until the kernel decodes them; does nothing for a mount with another
    /// value of `--serve`.
    #[track_caller]
    pub fn wait_until_verified(&self, digest: &str) {
        if self.status()["serve"] != "kernel" {
            return;
        }
        for entry in std::fs::read_dir(self.mountpoint.join("by-id").join(digest)).unwrap() {
            drop(std::fs::File::open(entry.unwrap().path()).unwrap());
        }
        wait_for("the verification of a template", || {
            let status = self.status();
            let template = status["templates"].as_array()?.iter().find(|t| t["digest"] == digest)?.clone();
            let is_memory = |file: &&Value| !file["why"].as_str().unwrap_or("").contains("kind blob");
            let files = template["files"].as_array()?.iter().filter(is_memory);
            files.map(|file| file["serving"] == "kernel").reduce(|a, b| a && b)?.then_some(())
        });
    }

    /// Returns the output of `stencil --json status` for the mounts of all stores. Exit code 6 (a mount has lost its
    /// supervisor) is accepted.
    #[track_caller]
    pub fn status_of_all(&self) -> Value {
        let output = self.command().env_remove("STENCIL_STORE").args(["--json", "status"]).output().unwrap();
        let run = Run::of("status".into(), &output);
        assert!([0, 6].contains(&run.code), "{run:?}");
        serde_json::from_str(&run.out).unwrap_or_else(|e| panic!("{e}: {run:?}"))
    }

    /// The object of this mount in `stencil --json status`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let all = self.status_of_all();
        let mounts = all["mounts"].as_array().unwrap();
        assert_eq!(mounts.len(), 1, "{all:#}");
        mounts[0].clone()
    }

    /// The value of one counter of the mount.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.status()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// The PID of the process that serves the mount; waits for a successor if there is none.
    pub fn server(&self) -> u32 {
        wait_for("a server", || self.status()["server_pid"].as_u64()) as u32
    }

    /// The server that the mount's record names, read without a request to the supervisor.
    pub fn recorded_server(&self) -> Option<ProcessId> {
        self.recorded("server").pop()
    }

    /// Kills the server with SIGKILL and waits until its successor serves.
    pub fn kill_server(&self) {
        let before = self.server();
        let process = ProcessId::of(before).unwrap().expect("the server has exited");
        process.signal(rustix::process::Signal::KILL).unwrap();
        wait_for("a successor", || (self.server() != before).then_some(()));
    }

    /// The contents of the daemon's log.
    pub fn log(&self) -> String {
        let mounts = std::fs::read_dir(self.runtime_dir().join("mounts")).into_iter().flatten().flatten();
        mounts.filter_map(|m| std::fs::read_to_string(m.path().join("log")).ok()).collect()
    }

    /// The supervisor and the server, in this order, as far as they are alive.
    pub fn processes(&self) -> Vec<ProcessId> {
        let found = [self.recorded("supervisor"), self.recorded("server")].concat();
        found.into_iter().filter(ProcessId::is_alive).collect()
    }

    /// The processes of this role (`supervisor`, `server`) in the records of the runtime directory.
    fn recorded(&self, role: &str) -> Vec<ProcessId> {
        let mounts = std::fs::read_dir(self.runtime_dir().join("mounts")).into_iter().flatten().flatten();
        let process = |mount: std::fs::DirEntry| {
            let text = std::fs::read(mount.path().join("mount.json")).ok()?;
            let record: Value = serde_json::from_slice(&text).ok()?;
            let number = |field: &str| record[format!("{role}_{field}")].as_u64();
            Some(ProcessId { pid: number("pid")? as u32, identity: number("identity")? })
        };
        mounts.filter_map(process).collect()
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("log of the daemon:\n{log}");
        }
        self.stencil(&["stop", "--all"]);
        let processes = self.processes();
        for _ in 0..8 {
            if self.stencil(&["umount", "--force", self.mountpoint.to_str().unwrap()]).code != 0 {
                break;
            }
        }
        for process in processes {
            let _ = process.signal(rustix::process::Signal::KILL);
        }
        while mount::unmount(&self.mountpoint, true).is_ok() {}
        // The directory of the scenario is removed afterwards: sealed packs must not remain.
        if let Ok(store) = stencilfs::store::Store::open(&self.store_dir()) {
            let _ = store.unseal(&AtomicBool::new(false), || Ok(()));
        }
        assert!(
            std::thread::panicking() || self.expects_sigsys || !log.contains(SIGSYS),
            "a server made a forbidden system call:\n{log}"
        );
    }
}

/// Polls `ask` every 5 ms until it returns a value; panics after 30 s.
#[track_caller]
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < until, "timed out after 30 s waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Shell commands for the start of a private mount namespace: unmount the mounts of other scenarios. Their copies in
/// this namespace would keep those mounts alive. Mounts below `own` stay.
pub fn without_others(own: &Path) -> String {
    // The kernel writes a blank in a path as \040, which printf(1) undoes in a format.
    format!(
        "awk '$3 == \"fuse.stencil\" && index($2, \"{}/\") != 1 {{ print $2 }}' /proc/self/mounts | \
         while read -r place; do umount -l \"$(printf \"$place\")\" || exit; done",
        own.display()
    )
}

/// Copies a program with cp(1). If this process wrote the file, a child that another scenario forks at the same moment
/// could inherit the open descriptor, and execve would fail with ETXTBSY.
#[track_caller]
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    run("cp", &[from.as_ref(), to.as_ref()]);
}

/// Runs another program, which must exit with 0, and returns its standard output.
#[track_caller]
pub fn run(program: &str, args: &[impl AsRef<OsStr>]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; `make setup` installs what the tests need"));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{err}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
