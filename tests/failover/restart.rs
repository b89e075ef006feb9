//! `stencil restart` replaces the program of the server or of the supervisor under readers: no reader gets an error,
//! and mapped files keep their identity.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::{Actor, compile};
use crate::support::daemon::drill::Drill;
use crate::support::daemon::readers::{Image, PAGE, Readers};
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, copy_program, daemon};

pub const IMAGE: Image = Image { salt: 11, pages: 8 << 10 };

const WAYS: [&str; 7] = ["map", "map", "readahead", "pread", "stream", "direct", "direct1m"];

/// A mount under readers, with the state that must not change.
pub struct Load<'a> {
    world: &'a TestMount,
    path: PathBuf,
    readers: Readers,
    clone: Actor,
    inode: (u64, u64),
    next: u64,
}

impl<'a> Load<'a> {
    /// Starts the readers of a template, and a clone of it.
    pub fn on(world: &'a TestMount) -> Load<'a> {
        let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut readers = Readers::new(world.dir(), Duration::from_micros(300));
        readers.apart(&WAYS, IMAGE, &path);
        readers.add("names", IMAGE, &path, 0, IMAGE.pages);
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
        let about = fs::metadata(&path).unwrap();
        readers.wait_progress(20);
        Load { world, path, readers, clone, inode: (about.dev(), about.ino()), next: 0 }
    }

    /// Path of the mountpoint.
    pub fn mountpoint(&self) -> &'a str {
        self.world.mountpoint().to_str().unwrap()
    }

    /// Asserts that all readers make progress, that the clone's next pages are correct, and that the file has the same
    /// inode.
    #[track_caller]
    pub fn goes_on(&mut self) {
        self.readers.wait_progress(20);
        for _ in 0..50 {
            self.next = (self.next + 6151) % IMAGE.pages;
            assert_eq!(self.clone.tell(&format!("hash 0 {}", self.next)), IMAGE.hash(self.next));
        }
        let about = File::open(&self.path).unwrap().metadata().unwrap();
        assert_eq!((about.dev(), about.ino()), self.inode, "the file must keep its inode");
    }

    /// Restarts with another program: for the server alone (`--server`), or, if `whole`, for the supervisor as well,
    /// with the program installed beside `stencil`.
    pub fn restart(&self, program: &Path, whole: bool) -> Run {
        self.timed_restart(program, whole).0
    }

    /// Same as [`Load::restart`], with the duration of the command.
    fn timed_restart(&self, program: &Path, whole: bool) -> (Run, Duration) {
        let mut command = self.world.command();
        if whole {
            let beside = self.world.dir().join("installed");
            fs::create_dir_all(&beside).unwrap();
            copy_program(STENCIL, beside.join("stencil"));
            copy_program(program, beside.join("stencil-mountd"));
            let mut other = Command::new(beside.join("stencil"));
            other.envs(command.get_envs().filter_map(|(k, v)| Some((k, v?)))).arg("restart");
            command = other;
        } else {
            command.arg("restart").arg("--server").arg(program);
        }
        let started = Instant::now();
        let output = command.arg(self.world.mountpoint()).output().unwrap();
        let passed = started.elapsed();
        (Run::of(program.display().to_string(), &output), passed)
    }

    /// Stops the readers and prints the longest read.
    pub fn end(self, what: &str) {
        let finished = self.readers.finish();
        let stalls = finished.iter().flat_map(|r| &r.stalls).map(|s| Duration::from_nanos(s.end - s.begin));
        let pages: u64 = finished.iter().map(|r| r.pages).sum();
        println!(
            "{what}: {pages} pages read without an error, the longest read {:.1?}",
            stalls.max().unwrap_or_default()
        );
    }
}

/// Asserts that a restart with this program fails with `message`, and that the old server continues without any effect
/// on readers. Returns an error if the restart did not take `took` milliseconds.
#[track_caller]
fn is_refused(program: &Path, message: &str, took: std::ops::Range<u64>) -> Result<(), String> {
    let world = TestMount::new("decode");
    let mut load = Load::on(&world);
    let before = world.server();
    let mut times = Vec::new();
    for whole in [false, true] {
        let (run, passed) = load.timed_restart(program, whole);
        let (run, passed) = (run.exits(1), passed.as_millis() as u64);
        println!("{} refused after {passed} ms: {}", program.display(), run.err.trim());
        assert!(whole || run.err.contains(message), "{}", run.err);
        times.push(passed);
        let status = world.status();
        assert_eq!(status["server_pid"], before, "the old server must continue");
        assert_eq!(status["server_program"], daemon().to_str().unwrap());
        load.goes_on();
    }
    // The next server runs the old program again.
    Drill::new(&world).kill();
    load.goes_on();
    assert_eq!(world.status()["server_program"], daemon().to_str().unwrap());
    load.end(&format!("{} refused", program.display()));
    match times.iter().all(|time| took.contains(time)) {
        true => Ok(()),
        false => Err(format!("refused after {times:?} ms, not {took:?}")),
    }
}

#[test]
fn a_new_server_that_exits_leaves_the_old_one_serving() {
    let _host = host::shared();
    host::measured(|| {
        is_refused(Path::new("/bin/false"), "does not serve; the current server continues", 0..2_000)
    });
}

#[test]
fn a_new_server_that_hangs_leaves_the_old_one_serving() {
    let _host = host::shared();
    let hanger = compile("hanger");
    host::measured(|| is_refused(&hanger, "timed out after 5 s waiting for the new server", 4_900..7_000));
}

/// The server sends its pending requests again to the next supervisor, which must execute each once.
#[test]
fn soak_a_first_open_waits_for_the_next_supervisor() {
    let _host = host::shared();
    for serve in ["passthrough", "auto"] {
        let world = TestMount::new(serve);
        for round in 0..host::rounds(3, 20) {
            let bytes: Vec<u8> =
                IMAGE.bytes().iter().map(|byte| byte.wrapping_add(round as u8 + 1)).collect();
            let digest = world.import_bytes(&bytes, &format!("web:{round}"));
            let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
            let process = ProcessId::of(supervisor).unwrap().unwrap();
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap());
            let path = world.file(&digest, "memory");
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| fs::read(&path));
                // By now the server's request is in the socket of the dead supervisor.
                std::thread::sleep(Duration::from_millis(60));
                world.mount(&[]).ok();
                let read = reader.join().unwrap().expect("the open must succeed");
                assert!(read == bytes, "{serve}, round {round}: other bytes than were imported");
            });
        }
        assert_eq!(world.counter("hydrations_failed"), 0);
    }
}

/// Takes the dependencies of the release build, as hard links: cargo does not compile them again.
fn take_dependencies(into: &Path) {
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("release");
    if into.exists() || !built.exists() {
        return;
    }
    fs::create_dir_all(into).unwrap();
    for part in ["deps", "build", ".fingerprint"] {
        let copied = Command::new("cp").arg("-al").arg(built.join(part)).arg(into).status().unwrap();
        assert!(copied.success(), "cannot link {part} of the release build");
    }
}

/// Builds stencil-mountd of another source tree and copies it into `dir`. The build directory is reused by later builds
/// and runs.
fn build(dir: &Path, tree: &Path) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // All trees share one target directory: cargo reuses the previous tree's build unless these files are newer.
    let touched =
        Command::new("find").arg(tree).args(["-type", "f", "-exec", "touch", "{}", "+"]).status().unwrap();
    assert!(touched.success(), "cannot touch the files in {}", tree.display());
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("variants");
    take_dependencies(&target.join("release"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "-q", "--offline", "--release", "--workspace", "--bin", "stencil-mountd"]);
    // Shorter builds of the tree itself.
    for package in ["stencilfs", "stencil-mountd"] {
        cargo.arg("--config").arg(format!("profile.release.package.{package}.opt-level=0"));
    }
    let done = cargo.current_dir(tree).env("CARGO_TARGET_DIR", &target).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let program = dir.join("stencil-mountd");
    copy_program(target.join("release/stencil-mountd"), &program);
    program
}

/// A copy of this source tree, or of a commit.
fn copy_of_tree(into: &Path, commit: Option<&str>) -> PathBuf {
    let tree = into.join("tree");
    fs::create_dir(&tree).unwrap();
    let top = env!("CARGO_MANIFEST_DIR");
    let pack = match commit {
        Some(commit) => format!("git -C {top} archive {commit} | tar -x -C {}", tree.display()),
        None => {
            format!("tar -C {top} --exclude=./target --exclude=./.git -c . | tar -x -C {}", tree.display())
        }
    };
    let done = Command::new("bash").args(["-o", "pipefail", "-c", &pack]).output().unwrap();
    assert!(done.status.success(), "{pack}: {}", String::from_utf8_lossy(&done.stderr));
    tree
}

/// Builds the tree with `from` replaced by `to` in one file, and asserts that a restart with this program is refused.
fn a_soak_build_is_refused(name: &str, file: &str, from: &str, to: &str, message: &str) {
    if !host::soaking() {
        return println!("skipped: the build with {to} needs `make soak`");
    }
    let _host = host::shared();
    let dir = crate::support::mount::temporary(name);
    let tree = copy_of_tree(dir.path(), None);
    let file = tree.join(file);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{} does not contain {from}", file.display());
    fs::write(&file, text.replace(from, to)).unwrap();
    let program = build(dir.path(), &tree);
    host::measured(|| is_refused(&program, message, 0..5_000));
}

#[test]
fn a_soak_build_with_another_max_read_is_refused() {
    let (from, to) = ("MAX_READ: usize = 1 << 20", "MAX_READ: usize = 1 << 19");
    let message = "requests other FUSE features than the first server";
    a_soak_build_is_refused("sizes", "mountd/src/server/read/decode.rs", from, to, message);
}

#[test]
fn a_soak_build_with_another_control_version_is_refused() {
    let from = format!("CONTROL_VERSION: u32 = {}", stencilfs::control::CONTROL_VERSION);
    let message = "the mount uses control version";
    a_soak_build_is_refused(
        "control",
        "src/control/protocol/messages.rs",
        &from,
        "CONTROL_VERSION: u32 = 200",
        message,
    );
}

/// The control protocol version that a program prints with --version: `… (control 4)`.
fn control_version_of(program: &Path) -> String {
    let printed = crate::support::mount::run(program.to_str().unwrap(), &["--version"]);
    let version =
        printed.split_once("(control ").unwrap_or_else(|| panic!("no control version in {printed}")).1;
    version.trim().to_owned()
}

#[test]
fn a_soak_build_of_the_previous_commit_takes_over() {
    if !host::soaking() {
        return println!("skipped: the build of the previous commit needs `make soak`");
    }
    let _host = host::shared();
    let dir = crate::support::mount::temporary("previous-");
    let mut git = Command::new("git");
    let history = git.args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "-q", "--verify", "HEAD~1"]);
    let has_history = history.output().is_ok_and(|o| o.status.success());
    if !has_history {
        // An exported tree or a shallow clone: use another build of the same tree.
        println!("NO GIT HISTORY: building this tree a second time instead of the previous commit");
    }
    let tree = copy_of_tree(dir.path(), has_history.then_some("HEAD~1"));
    let program = build(dir.path(), &tree);
    if control_version_of(&program) != control_version_of(&daemon()) {
        println!("the previous commit has another control protocol version: it must be refused");
        return host::measured(|| is_refused(&program, "the mount uses control version", 0..5_000));
    }
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut load = Load::on(&world);
        for _ in 0..10 {
            load.restart(&program, false).ok();
            load.goes_on();
            load.restart(&daemon(), false).ok();
            load.goes_on();
        }
        load.end(&format!("{serve}: the previous commit and back"));
    }
}
