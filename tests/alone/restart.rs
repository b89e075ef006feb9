//! Another program takes the place of the server or of the supervisor, under readers.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::restart::{IMAGE, Load, is_refused};
use crate::support::actor::Actor;
use crate::support::drill::Drill;
use crate::support::host;
use crate::support::mount::{TestMount, copy_program, daemon, wait_for};
use crate::support::readers::PAGE;

#[test]
fn a_soak_of_new_servers_under_readers() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut load = Load::on(&world);
        let other = world.dir().join("another-mountd");
        copy_program(daemon(), &other);
        let supervisor = world.status()["supervisor_pid"].clone();
        for round in 0..host::rounds(4, 50) {
            let before = world.server();
            let program = if round % 2 == 0 { other.clone() } else { daemon() };
            load.restart(&program, false).ok();
            let status = world.status();
            assert_ne!(status["server_pid"], before);
            assert_eq!(status["supervisor_pid"], supervisor);
            assert_eq!(status["server_program"], program.to_str().unwrap());
            load.goes_on();
        }
        load.end(&format!("{serve}: other servers"));
    }
}

#[test]
fn a_soak_of_supervisors_that_become_another_program() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut load = Load::on(&world);
        let supervisor = world.status()["supervisor_pid"].clone();
        for _ in 0..host::rounds(4, 50) {
            let before = world.server();
            world.stencil(&["restart", load.mountpoint()]).ok();
            let status = world.status();
            assert_ne!(status["server_pid"], before);
            assert_eq!(status["supervisor_pid"], supervisor, "exec keeps the process");
            load.goes_on();
            // The new one sees to its servers as the old one did.
            Drill::new(&world).kill();
            load.goes_on();
        }
        load.end(&format!("{serve}: re-exec, then a kill"));
    }
}

#[test]
fn a_soak_of_supervisors_that_are_killed_and_replaced() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::with(&["--serve", serve]);
        let mut load = Load::on(&world);
        for _ in 0..host::rounds(4, 50) {
            let server = world.server();
            let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
            let process = ProcessId::of(supervisor).unwrap().unwrap();
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_gone(Duration::from_secs(10)).unwrap());
            load.goes_on();
            world.mount(&["--serve", serve]).ok();
            assert_eq!(world.server(), server, "the same server");
            assert_ne!(world.status()["supervisor_pid"], supervisor);
            load.goes_on();
            Drill::new(&world).kill();
            load.goes_on();
            assert_ne!(world.server(), server);
        }
        load.end(&format!("{serve}: supervisor killed, adopted, then a kill"));
    }
}

#[test]
fn a_mount_whose_processes_were_both_killed_is_recovered() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
        clone.tell("hash 0 3");
        for process in world.processes() {
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_gone(Duration::from_secs(10)).unwrap());
        }
        assert_eq!(File::open(&path).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        world.mount(&["--serve", serve]).ok();
        assert!(fs::read(&path).unwrap() == IMAGE.bytes(), "new opens are served");
        assert_eq!(world.json(&["status"])["mounts"].as_array().unwrap().len(), 1);
        // The old connection is gone for good: what it has mapped by passthrough is not.
        assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
        if serve == "passthrough" {
            for page in 0..IMAGE.pages {
                assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page));
            }
        }
        wait_for("one server", || (world.processes().len() == 2).then_some(()));
    }
}

/// Builds stencil-mountd of another tree in `dir`. What does not differ is kept for the next build and the next run.
fn build(dir: &Path, tree: &Path) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("variants");
    let done = Command::new(env!("CARGO"))
        .args(["build", "-q", "--offline", "-p", "stencil-mountd"])
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", &target)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let program = dir.join("stencil-mountd");
    copy_program(target.join("debug/stencil-mountd"), &program);
    program
}

/// A copy of this tree, or of the commit before it where the history is there.
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
    // Newer than what was built last, or cargo takes another tree's build for this one's.
    let pack = format!("{pack} && find {} -type f -exec touch {{}} +", tree.display());
    let done = Command::new("bash").args(["-o", "pipefail", "-c", &pack]).output().unwrap();
    assert!(done.status.success(), "{pack}: {}", String::from_utf8_lossy(&done.stderr));
    tree
}

/// In a build of its own, one line of the source is another.
fn a_soak_build_is_refused(name: &str, file: &str, from: &str, to: &str, words: &str) {
    if !host::soaking() {
        return println!("a build with {to} is made in `make soak` only");
    }
    let _host = host::alone();
    let dir = crate::support::mount::temporary(name);
    let tree = copy_of_tree(dir.path(), None);
    let file = tree.join(file);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{} has no {from}", file.display());
    fs::write(&file, text.replace(from, to)).unwrap();
    is_refused(&build(dir.path(), &tree), words, 0..5_000);
}

#[test]
fn a_soak_build_of_other_sizes_leaves_the_old_server() {
    let (from, to) = ("MAX_READ: usize = 1 << 20", "MAX_READ: usize = 1 << 19");
    a_soak_build_is_refused("sizes", "mountd/src/decode.rs", from, to, "other things than the first one");
}

#[test]
fn a_soak_build_of_another_control_version_leaves_the_old_server() {
    let from = format!("CONTROL_VERSION: u32 = {}", stencilfs::control::CONTROL_VERSION);
    let words = "the mount speaks version";
    a_soak_build_is_refused("control", "src/control/protocol.rs", &from, "CONTROL_VERSION: u32 = 200", words);
}

/// The version of the words between processes, as a program prints it: `… (control 3)`.
fn words_of(program: &Path) -> String {
    let printed = crate::support::mount::run(program.to_str().unwrap(), &["--version"]);
    let words =
        printed.split_once("(control ").unwrap_or_else(|| panic!("no control version in {printed}")).1;
    words.trim().to_owned()
}

#[test]
fn a_soak_build_of_the_previous_commit_takes_over() {
    if !host::soaking() {
        return println!("the previous commit is built in `make soak` only");
    }
    let _host = host::alone();
    let dir = crate::support::mount::temporary("previous-");
    let mut git = Command::new("git");
    let history = git.args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "-q", "--verify", "HEAD~1"]);
    let has_history = history.output().is_ok_and(|o| o.status.success());
    if !has_history {
        // An exported tree or a shallow checkout: another build all the same.
        println!("NO HISTORY HERE: the tree itself is built a second time instead of the previous commit");
    }
    let tree = copy_of_tree(dir.path(), has_history.then_some("HEAD~1"));
    let program = build(dir.path(), &tree);
    if words_of(&program) != words_of(&daemon()) {
        println!("the previous commit speaks other words between processes: it must be refused");
        return is_refused(&program, "the mount speaks version", 0..5_000);
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
