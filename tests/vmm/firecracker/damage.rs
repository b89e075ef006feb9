//! Firecrackers on a template with one damaged block, with each choice of `--on-damage`.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::store::BLOCK_SIZE;
use stencilfs::sys::process::{ProcessId, procfs, tasks};

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::damage_one;
use crate::vmm::firecracker_guests::{Clone, ask_all, import_snapshot, launch};

const PAGE: u64 = 4096;

/// Pages in a block.
const IN_BLOCK: u64 = BLOCK_SIZE / PAGE;

/// The second half of the 1024 known pages from 64 MiB, as block numbers. Each command `m` reads 32 pages, from the
/// first one on.
const SECOND_HALF: std::ops::Range<u64> = (66 << 20) / BLOCK_SIZE..(68 << 20) / BLOCK_SIZE;

/// Number of clones; the first half reads the damaged block.
const CLONES: usize = 4;

/// Number of commands `m` that read no page near the damaged block.
const READS: usize = 8;

/// Time in which a guest that has read wrong bytes would answer.
const WITHOUT_SUPERVISOR: Duration = Duration::from_secs(1);

/// A mount with the snapshot of a Firecracker, one block of which is damaged.
struct World {
    world: TestMount,
    digest: String,
    block: u64,
}

impl World {
    fn new(on_damage: &str) -> World {
        let world = TestMount::with(&["--serve", "decode", "--on-damage", on_damage]);
        drop(import_snapshot(&world, &[]));
        let digest = world.json(&["inspect", "fc:1"])["digest"].as_str().unwrap().to_owned();
        let (block, _) = damage_one(&world.store_dir(), &digest, SECOND_HALF);
        World { world, digest, block }
    }

    /// The pages of the damaged block for which the log names a process (`done process PID (NAME)`).
    fn pages(&self, process: &str) -> Vec<u64> {
        let start = format!("template {} file memory offset ", self.digest);
        let log = self.world.log();
        let lines = log.lines().filter(|line| line.contains(process));
        let offsets = lines.map(|line| line.split_once(&start).unwrap().1.split_once(':').unwrap().0);
        offsets.map(|offset| offset.parse::<u64>().unwrap() / PAGE - self.block * IN_BLOCK).collect()
    }

    /// Runs dd(1) on the template's memory.
    fn dd(&self, words: &[&str]) -> Command {
        let mut command = Command::new("dd");
        command.arg(format!("if={}", self.world.file(&self.digest, "memory").display()));
        command.args(["of=/dev/null", "count=1"]).args(words);
        command
    }
}

fn state(pid: u32) -> Option<char> {
    procfs::stat(pid).unwrap().map(|stat| stat.state)
}

/// Returns true if a process has ended.
fn is_over(pid: u32) -> bool {
    state(pid).is_none_or(|state| state == 'Z')
}

/// Returns true if all threads of a process are stopped.
fn is_stopped(pid: u32) -> bool {
    let threads = tasks::threads(pid).unwrap();
    !threads.is_empty() && threads.into_iter().all(|tid| state(tid) == Some('T'))
}

fn send(clone: &Clone, signal: Signal) {
    assert!(ProcessId::of(clone.pid as u32).unwrap().unwrap().signal(signal).unwrap());
}

fn text(clone: &Clone, name: &str) -> String {
    String::from_utf8_lossy(&fs::read(clone.dir.join(name)).unwrap()).into_owned()
}

/// A process that is stopped until this value is dropped.
struct Paused(ProcessId);

impl Paused {
    fn new(pid: u32) -> Paused {
        let process = ProcessId::of(pid).unwrap().unwrap();
        assert!(process.signal(Signal::STOP).unwrap());
        Paused(process)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

/// The clones that do not read the damaged block must run on.
fn run_on(others: &mut [Clone]) {
    for _ in 0..READS {
        ask_all(others, 'm', "K");
    }
    ask_all(others, 'r', "K");
    for clone in others {
        assert!(state(clone.pid as u32).is_some_and(|state| state != 'T'), "clone {}", clone.id);
    }
}

#[test]
fn firecrackers_that_need_a_damaged_block_are_stopped_before_they_read_a_wrong_byte() {
    let _host = host::shared();
    let world = World::new("stop");
    let mut readers = launch(&world.world, CLONES, &[]);
    let mut others = readers.split_off(CLONES / 2);
    // Without a supervisor, the readers of the block wait and the others go on.
    let supervisor = Paused::new(world.world.status()["supervisor_pid"].as_u64().unwrap() as u32);
    readers.iter_mut().for_each(|clone| clone.serial.send('a'));
    wait_for("a READ of the damaged block", || world.world.log().contains("fail with EIO").then_some(()));
    ask_all(&mut others, 'm', "K");
    std::thread::sleep(WITHOUT_SUPERVISOR);
    ask_all(&mut others, 'm', "K");
    for clone in &readers {
        assert_eq!((is_stopped(clone.pid as u32), text(clone, "serial.log").as_str()), (false, ""));
    }
    drop(supervisor);
    for clone in &readers {
        wait_for("a stopped Firecracker", || is_stopped(clone.pid as u32).then_some(()));
    }
    run_on(&mut others);
    for clone in &readers {
        assert!(is_stopped(clone.pid as u32), "clone {}", clone.id);
        assert_eq!(text(clone, "serial.log"), "", "the guest has checked pages of the damaged block");
    }
    // A guest that had read a page of the block would have accessed the next one.
    let pages = |clone: &Clone| world.pages(&format!("stopped process {} (firecracker)", clone.pid));
    assert_eq!(readers.iter().map(pages).collect::<Vec<_>>(), [[0]; CLONES / 2], "{}", world.world.log());
    assert_eq!(world.pages(" process ").len(), CLONES / 2, "{}", world.world.log());
    assert_eq!(world.world.status()["restarts"], 0);

    // The failed access is not repeated, so a stopped guest must not be continued: with KVM inside a virtual machine it
    // reads zeros and is stopped at the next page.
    readers.iter().for_each(|clone| send(clone, Signal::CONT));
    for clone in &readers {
        wait_for("a Firecracker that is stopped again or ends", || {
            (is_over(clone.pid as u32) || is_stopped(clone.pid as u32)).then_some(())
        });
        println!("after SIGCONT: pages {:?}, ended: {}", pages(clone), is_over(clone.pid as u32));
        assert!(is_over(clone.pid as u32) || pages(clone) == [0, 1], "{}", world.world.log());
        assert_eq!(text(clone, "serial.log"), "");
    }

    // A stopped process is ended, also by `stencil stop`.
    world.world.stencil(&["stop", "--all"]).ok();
    for clone in readers.iter().chain(&others) {
        assert!(is_over(clone.pid as u32), "clone {}", clone.id);
    }
}

#[test]
fn firecrackers_that_need_a_damaged_block_are_killed() {
    let _host = host::shared();
    let world = World::new("kill");
    let mut readers = launch(&world.world, CLONES, &[]);
    let processes: Vec<ProcessId> =
        readers.iter().map(|clone| ProcessId::of(clone.pid as u32).unwrap().unwrap()).collect();
    let mut others = readers.split_off(CLONES / 2);
    readers.iter_mut().for_each(|clone| clone.serial.send('a'));
    for (clone, process) in readers.iter().zip(&processes) {
        wait_for("the end of a Firecracker", || (!process.is_alive()).then_some(()));
        assert_eq!(text(clone, "serial.log"), "");
    }
    run_on(&mut others);
    for clone in &readers {
        assert_eq!(world.pages(&format!("killed process {} (firecracker)", clone.pid)), [0]);
    }
    assert_eq!(world.pages(" process ").len(), CLONES / 2, "{}", world.world.log());
}

/// The reason for the option: with KVM inside a virtual machine the guests read zeros and run on.
#[test]
fn firecrackers_that_need_a_damaged_block_run_on_without_the_option() {
    let _host = host::shared();
    let world = World::new("eio");
    let mut readers = launch(&world.world, CLONES, &[]);
    let mut others = readers.split_off(CLONES / 2);
    readers.iter_mut().for_each(|clone| clone.serial.send('a'));
    for clone in &mut readers {
        let pid = clone.pid as u32;
        let end = wait_for("an answer or the end of a Firecracker", || {
            let is_over = is_over(pid);
            (is_over || text(clone, "serial.log").contains('\n')).then_some(is_over)
        });
        println!("{} {}", if end { "ended" } else { "answered" }, text(clone, "log"));
        if !end {
            assert_eq!(clone.serial.answer(), "X", "the guest has read wrong bytes");
        }
    }
    run_on(&mut others);
    assert_eq!(world.pages(" process "), [0; 0], "{}", world.world.log());
}

#[test]
fn a_process_that_reads_a_damaged_page_is_stopped_and_its_neighbours_are_not() {
    let _host = host::shared();
    let world = World::new("stop");
    let first = world.block * IN_BLOCK;
    let run = |words: &[&str]| -> Output { world.dd(words).output().unwrap() };
    // The readahead of these pages includes pages of the damaged block.
    for page in [first - 1, first + IN_BLOCK, first - 2] {
        let skip = format!("skip={page}");
        assert!(run(&["bs=4096", &skip]).status.success(), "page {page}");
    }
    let skip = format!("skip={}", world.block);
    let direct = run(&["bs=64K", &skip, "iflag=direct"]);
    assert!(String::from_utf8_lossy(&direct.stderr).contains("Input/output error"), "{direct:?}");
    assert_eq!(world.pages(" process "), [0; 0]);

    let skip = format!("skip={}", first + 3);
    let mut reader = world.dd(&["bs=4096", &skip]);
    let reader = reader.stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a stopped reader", || is_stopped(reader.id()).then_some(()));
    assert_eq!(world.pages(&format!("stopped process {} (dd)", reader.id())), [3]);
    // The READ was answered with EIO, which read(2) returns when the process goes on.
    assert!(ProcessId::of(reader.id()).unwrap().unwrap().signal(Signal::CONT).unwrap());
    let output = reader.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("Input/output error"), "{output:?}");

    let mut clone = Actor::start();
    let path = world.world.file(&world.digest, "memory");
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), 128 << 20));
    for page in [first - 1, first + IN_BLOCK] {
        clone.tell(&format!("read 0 {page}"));
    }
    clone.begin(&format!("read 0 {}", first + 5));
    wait_for("a stopped process with a mapping", || is_stopped(clone.pid()).then_some(()));
    assert_eq!(world.pages(&format!("stopped process {} (", clone.pid())), [5]);
    assert_eq!(world.pages(" process ").len(), 2, "{}", world.world.log());
}
