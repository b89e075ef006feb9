//! Another program takes the place of the server or of the supervisor, under readers: none of them gets an error, and
//! what they have mapped stays the same file.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::{Actor, compile};
use crate::support::drill::Drill;
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, copy_program, daemon};
use crate::support::readers::{Image, PAGE, Readers};

pub const IMAGE: Image = Image { salt: 11, pages: 8 << 10 };

const WAYS: [&str; 7] = ["map", "map", "readahead", "pread", "stream", "direct", "direct1m"];

/// A mount under readers, with what must stay as it is.
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

    /// Of the mount.
    pub fn mountpoint(&self) -> &'a str {
        self.world.mountpoint().to_str().unwrap()
    }

    /// Everybody gets on, the clone's next page is right, and the file is the one that it was.
    #[track_caller]
    pub fn goes_on(&mut self) {
        self.readers.wait_progress(20);
        for _ in 0..50 {
            self.next = (self.next + 6151) % IMAGE.pages;
            assert_eq!(self.clone.tell(&format!("hash 0 {}", self.next)), IMAGE.hash(self.next));
        }
        let about = File::open(&self.path).unwrap().metadata().unwrap();
        assert_eq!((about.dev(), about.ino()), self.inode, "the same file");
    }

    /// With another program for the server alone, or for the supervisor as well: that one lies beside `stencil`.
    pub fn restart(&self, program: &Path, whole: bool) -> Run {
        self.timed_restart(program, whole).0
    }

    /// And how long the command itself took.
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
        let begun = Instant::now();
        let output = command.arg(self.world.mountpoint()).output().unwrap();
        let passed = begun.elapsed();
        (Run::of(program.display().to_string(), &output), passed)
    }

    /// Prints the longest read of all.
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

/// The old server goes on, is the same one, and nobody notices the trial.
#[track_caller]
pub fn is_refused(program: &Path, words: &str, took: std::ops::Range<u64>) {
    let world = TestMount::new("decode");
    let mut load = Load::on(&world);
    let before = world.server();
    for whole in [false, true] {
        let (run, passed) = load.timed_restart(program, whole);
        let (run, passed) = (run.exits(1), passed.as_millis() as u64);
        println!("{} refused after {passed} ms: {}", program.display(), run.err.trim());
        assert!(took.contains(&passed) && (whole || run.err.contains(words)), "{}", run.err);
        let status = world.status();
        assert_eq!(status["server_pid"], before, "the old one goes on");
        assert_eq!(status["server_program"], daemon().to_str().unwrap());
        load.goes_on();
    }
    // Nothing of the trial stays with the mount.
    Drill::new(&world).kill();
    load.goes_on();
    assert_eq!(world.status()["server_program"], daemon().to_str().unwrap());
    load.end(&format!("{} refused", program.display()));
}

#[test]
fn a_program_that_exits_leaves_the_old_server() {
    let _host = host::shared();
    is_refused(Path::new("/bin/false"), "the old one goes on", 0..4_900);
}

#[test]
fn a_program_that_hangs_leaves_the_old_server() {
    let _host = host::shared();
    is_refused(&compile("hanger"), "it did not answer within 5 s", 4_900..u64::MAX);
}

/// What the server asks meanwhile is asked again of the next supervisor, and must be done once.
#[test]
fn soak_a_first_open_while_the_supervisor_is_dead_waits_for_the_next_one() {
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
            assert!(process.wait_gone(Duration::from_secs(10)).unwrap());
            let path = world.file(&digest, "memory");
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| fs::read(&path));
                // Its question lies in the socket of the dead one by now.
                std::thread::sleep(Duration::from_millis(60));
                world.mount(&[]).ok();
                let read = reader.join().unwrap().expect("the open is answered");
                assert!(read == bytes, "{serve}, round {round}: other bytes than were imported");
            });
        }
        assert_eq!(world.counter("hydrations_failed"), 0);
    }
}
