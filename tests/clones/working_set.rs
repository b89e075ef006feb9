//! Working sets: the pages of a recording, the pages that warming reads, and the storage of sets.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;
use stencilfs::clones::launch::Simulate;
use stencilfs::clones::working_set::drop_unmapped;
use stencilfs::store::{Extents, Store};
use stencilfs::sys::memory::cachestat;
use stencilfs::sys::memory::mapping::{Mapping, Request};
use stencilfs::units::{Bytes, PAGE_SIZE};

use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::guest_like;

const SIZE: usize = 32 << 20;
/// Pages that the kernel maps around a fault (`fault_around_bytes`).
const AROUND: u64 = 16;
const SIMULATED: &str = "read=100p,write=20p,seed=7";

struct World {
    mount: TestMount,
    digest: String,
}

impl World {
    fn new(serve: &str) -> World {
        let mount = TestMount::new(serve);
        let digest = mount.import_bytes(&guest_like(9, SIZE), "web:1");
        if serve == "kernel" {
            mount.wait_until_verified(&digest);
        }
        World { mount, digest }
    }

    fn store(&self) -> Store {
        Store::open(&self.mount.store_dir()).unwrap()
    }

    fn set(&self, name: &str) -> Option<(u32, Extents, Extents)> {
        let mut set = self.store().working_set(&self.digest.parse().unwrap(), name).unwrap()?;
        let memory = set.files.remove("memory").unwrap();
        Some((set.recordings, memory.touched, memory.written))
    }

    /// Drops the memory of the template from the page cache.
    fn drop_pages(&self) {
        let store = self.store();
        let template = store.template(&self.digest.parse().unwrap()).unwrap();
        let file = self.mount.file(&self.digest, "memory");
        let (dir, files) = (file.parent().unwrap(), template.files());
        // A page that was just read is in a list of the processor that read it, from which only that processor drops
        // it.
        std::thread::scope(|scope| {
            let allowed = sched_getaffinity(None).unwrap();
            for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
                let drop_on = move || {
                    let mut set = CpuSet::new();
                    set.set(cpu);
                    sched_setaffinity(None, &set).unwrap();
                    drop_unmapped(dir, files).unwrap();
                };
                scope.spawn(drop_on).join().unwrap();
            }
        });
        assert_eq!(self.cached(), []);
    }

    /// Returns the pages that are in the page cache.
    fn cached(&self) -> Vec<Range<u64>> {
        let file = File::open(self.mount.file(&self.digest, "memory")).unwrap();
        let view = Mapping::new(&Request::view(file.as_fd(), Bytes::new(SIZE as u64))).unwrap();
        let cached = cachestat::in_core(&view).unwrap();
        cached.into_iter().map(|range| range.start / PAGE_SIZE..range.end / PAGE_SIZE).collect()
    }

    fn record(&self, simulated: &str) -> Value {
        let launched =
            self.mount.json(&["clone", "web:1", "--simulate", simulated, "--record-working-set=0"]);
        self.mount.stencil(&["stop", "--all"]).ok();
        launched
    }
}

fn each(ranges: impl IntoIterator<Item = Range<u64>>) -> BTreeSet<u64> {
    ranges.into_iter().flatten().collect()
}

/// Returns the pages that the first simulated clone writes and reads.
fn simulated() -> (BTreeSet<u64>, BTreeSet<u64>) {
    let simulate: Simulate = SIMULATED.parse().unwrap();
    let pages = simulate.pages(Bytes::new(SIZE as u64), 0);
    ((0..20).map(|n| pages.at(n)).collect(), (20..120).map(|n| pages.at(n)).collect())
}

#[test]
fn a_recording_has_the_pages_that_the_clone_touched() {
    let _host = host::shared();
    let (written, read) = simulated();
    for serve in ["passthrough", "decode", "kernel"] {
        let world = World::new(serve);
        let launched = world.record(SIMULATED);
        let (recordings, touched, copied) = world.set("default").unwrap();
        assert_eq!(recordings, 1);
        assert_eq!(each(copied.sorted()), written, "{serve}");
        let pages = each(touched.sorted());
        assert!(pages.is_superset(&written) && pages.is_superset(&read), "{serve}");
        assert!(pages.len() as u64 <= 120 * AROUND, "{serve}: {} pages for 120 touched ones", pages.len());
        assert_eq!(launched["recorded"]["recorded_pages"], pages.len(), "{launched}");
        assert_eq!(launched["recorded"]["recorded_written_pages"], 20, "{launched}");
    }
}

#[test]
fn warming_reads_the_set_and_the_clones_find_their_pages() {
    let _host = host::shared();
    for serve in ["passthrough", "decode", "kernel"] {
        let world = World::new(serve);
        world.record(SIMULATED);
        let (_, touched, _) = world.set("default").unwrap();
        let pages = each(touched.sorted());
        world.drop_pages();
        let warm = world.mount.json(&["warm", "web:1"]);
        assert_eq!(warm["pages"], pages.len(), "{serve} {warm}");
        assert_eq!(warm["warmed"]["cached_pages"], 0, "{serve} {warm}");
        assert_eq!(warm["warmed"]["read_pages"], pages.len(), "{serve} {warm}");
        assert_eq!(warm["comparison"], Value::Null);
        let cached = each(world.cached());
        assert!(cached.is_superset(&pages), "{serve}");
        // The kernel's decoder fills whole blocks.
        let blocks: BTreeSet<u64> = pages.iter().map(|page| page / AROUND).collect();
        let set = if serve == "kernel" { blocks.len() * AROUND as usize } else { pages.len() };
        let found = cached.len();
        assert!(10 * found <= 13 * set, "{serve}: {found} pages for a set of {set}");
        let again = world.mount.json(&["warm", "web:1"]);
        assert_eq!(again["warmed"]["cached_pages"], pages.len(), "{serve} {again}");
        assert_eq!(again["warmed"]["read_pages"], 0, "{serve} {again}");
        let before = world.mount.counter("reads");
        world.mount.json(&["clone", "web:1", "-n", "2", "--simulate", SIMULATED, "--no-warm"]);
        let compared = world.mount.json(&["warm", "web:1", "--dry-run"]);
        let comparison = &compared["comparison"];
        assert_eq!(comparison["clones"], 2, "{compared}");
        // The first clone touches the same pages as the recorded one.
        let hits = comparison["hits"].as_u64().unwrap();
        assert!(hits >= pages.len() as u64 * 9 / 10, "{serve} {compared}");
        assert!(comparison["touched_pages"].as_u64().unwrap() > hits, "the second clone has others");
        assert_eq!(compared["warmed"], Value::Null);
        world.mount.stencil(&["stop", "--all"]).ok();
        if serve != "decode" {
            assert_eq!(world.mount.counter("reads"), before, "{serve}: no READ");
        }
    }
}

#[test]
fn a_clone_of_a_warmed_template_causes_no_read() {
    let _host = host::shared();
    let world = World::new("decode");
    world.record(SIMULATED);
    world.drop_pages();
    let launched = world.mount.json(&["clone", "web:1", "--simulate", SIMULATED]);
    assert!(launched["warmed"]["pages"].as_u64().unwrap() > 0, "{launched}");
    world.mount.stencil(&["stop", "--all"]).ok();
    let before = world.mount.counter("reads");
    let launched = world.mount.json(&["clone", "web:1", "--simulate", SIMULATED]);
    let warmed = &launched["warmed"];
    assert_eq!(warmed["cached_pages"], warmed["pages"], "{launched}");
    assert_eq!(world.mount.counter("reads"), before);
    let unwarmed = world.mount.json(&["clone", "web:1", "--simulate", SIMULATED, "--no-warm"]);
    assert_eq!(unwarmed["warmed"], Value::Null);
}

#[test]
fn a_recording_of_a_living_clone_has_first_pages_first() {
    let _host = host::shared();
    let world = World::new("decode");
    let path = world.mount.file(&world.digest, "memory");
    let file = File::open(path).unwrap();
    let view = Mapping::new(&Request::view(file.as_fd(), Bytes::new(SIZE as u64))).unwrap();
    let touch = |page: u64| view.load(stencilfs::units::MemoryOffset::new(page * PAGE_SIZE)).unwrap();
    touch(4000);
    let own = std::process::id().to_string();
    let record = world.mount.command().args(["working-set", "record", &own, "--for", "3600"]).spawn();
    let mut record = Recorder(record.unwrap());
    // The page must be touched after the first scan. The recorder opens /proc/PID/pagemap for that scan, and a later
    // system call belongs to the next scan.
    wait_for("the recording to begin", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", record.0.id())).ok()?;
        let links = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.map(|link| link.display().to_string()).find(|link| link.ends_with("/pagemap"))
    });
    wait_for("the next look", || {
        let before = syscalls(record.0.id());
        std::thread::sleep(std::time::Duration::from_millis(100));
        (syscalls(record.0.id()) > before).then_some(())
    });
    touch(100);
    let before = syscalls(record.0.id());
    wait_for("looks at both pages", || (syscalls(record.0.id()) > before + 2).then_some(()));
    record.interrupt();
    let (_, touched, written) = world.set("default").unwrap();
    let order: Vec<u64> = touched.iter().map(|extent| extent.pages.start).collect();
    let place = |page: u64| touched.iter().position(|extent| extent.pages.contains(&page)).unwrap();
    assert!(place(4000) < place(100), "{order:?}");
    assert_eq!(written.pages().get(), 0);
}

/// Returns how often a process has read a file: `/proc/PID/maps` once in each scan.
fn syscalls(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap().parse().unwrap()
}

/// A running command, which is interrupted at the end.
struct Recorder(Child);

impl Recorder {
    fn interrupt(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::INT).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn recordings_are_merged_and_transferred_with_the_template() {
    let _host = host::shared();
    let world = World::new("decode");
    world.record(SIMULATED);
    let (_, first, _) = world.set("default").unwrap();
    world.record("read=0p,write=1p,seed=8");
    let (recordings, both, _) = world.set("default").unwrap();
    assert_eq!(recordings, 2);
    assert!(each(both.sorted()).is_superset(&each(first.sorted())));
    let listed = world.mount.json(&["working-set", "ls", "web:1"]);
    assert_eq!(listed["working_sets"][0]["set"], "default", "{listed}");
    assert_eq!(listed["working_sets"][0]["pages"], both.pages().get(), "{listed}");
    let stream = world.mount.dir().join("stream");
    world.mount.stencil(&["save", "web:1", "-o", stream.to_str().unwrap()]).ok();
    let other = TestMount::new("decode");
    other.stencil(&["load", "-i", stream.to_str().unwrap()]).ok();
    assert_eq!(other.json(&["working-set", "ls", "web:1"]), listed);
    assert_eq!(other.json(&["warm", "web:1"])["warmed"]["read_pages"], both.pages().get());
    other.stencil(&["working-set", "rm", "web:1"]).ok();
    assert_eq!(other.json(&["working-set", "ls", "web:1"])["working_sets"], Value::Array(vec![]));
    other.stencil(&["working-set", "rm", "web:1"]).exits(4).says("no working set 'default'");
}

#[test]
fn pages_that_every_recording_has_written_are_copied_at_the_launch() {
    let _host = host::shared();
    let world = World::new("passthrough");
    world.record(SIMULATED);
    let prefault = "read=0p,write=0p,prefault=written";
    let dirty = || {
        let launched = world.mount.json(&["clone", "web:1", "--simulate", prefault]);
        let pid = launched["clones"][0]["pid"].to_string();
        let found = world.mount.json(&["dirty", "--ranges", &pid]);
        world.mount.stencil(&["stop", "--all"]).ok();
        let range = |range: &Value| {
            let first = range["first_page"].as_u64().unwrap();
            first..first + range["pages"].as_u64().unwrap()
        };
        each(found["ranges"].as_array().unwrap().iter().map(range))
    };
    assert_eq!(dirty(), simulated().0);
    // Another recording has not written these pages.
    world.record("read=0p,write=1p,seed=8");
    assert_eq!(dirty(), BTreeSet::new());
    world.mount.stencil(&["working-set", "rm", "web:1"]).ok();
    let clone = ["clone", "web:1", "--simulate", prefault];
    world.mount.stencil(&clone).exits(4).says("no working set 'default'");
}

#[test]
fn a_set_of_pages_outside_of_the_file_reads_only_the_file() {
    let _host = host::shared();
    let world = World::new("decode");
    let used = |touched: Vec<Range<u64>>| stencilfs::store::Used { touched, written: vec![] };
    let last = SIZE as u64 / PAGE_SIZE - 1;
    let files = [
        ("memory".to_owned(), used(vec![last..last + 1000, 1 << 34..1 << 35])),
        ("missing".to_owned(), used(vec![0..1, 2..3])),
    ];
    world.store().add_recording(&world.digest.parse().unwrap(), "bad", &files.into()).unwrap();
    let warm = world.mount.json(&["warm", "web:1", "--set", "bad"]);
    assert_eq!(warm["warmed"]["pages"], 1, "{warm}");
    assert_eq!(each(world.cached()), BTreeSet::from([last]));
}

#[test]
fn impossible_recordings_and_unknown_sets_are_refused() {
    let _host = host::shared();
    let world = World::new("decode");
    let mount = &world.mount;
    mount.stencil(&["warm", "web:1"]).exits(4).says("template web:1 has no working set 'default'");
    let simulated = ["clone", "web:1", "--simulate", SIMULATED];
    let with = |more: &[&str]| mount.stencil(&[&simulated[..], more].concat());
    // The default set is only advice, a named set is a request.
    with(&["--working-set", "login"]).exits(4).says("no working set 'login'");
    with(&["-n", "2", "--record-working-set"]).exits(2).says("several clones");
    assert!(with(&["--working-set", "a/b"]).exits(2).err.contains("contains '/'"));
    mount.stencil(&["working-set", "record", "1"]).exits(4).says("process 1 maps no template");
    mount.stencil(&["working-set", "ls", "nothing"]).exits(4).says("nothing");
    assert_eq!(mount.json(&["ps"])["clones"], Value::Array(vec![]));
    assert!(world.set("default").is_none());
}

#[test]
fn pinned_pages_are_locked_until_the_command_is_interrupted() {
    let _host = host::shared();
    let world = World::new("passthrough");
    let launched = world.record(SIMULATED);
    let pages = launched["recorded"]["pages"].as_u64().unwrap();
    world.drop_pages();
    let pin = world.mount.command().args(["warm", "web:1", "--pin"]).stdout(Stdio::null()).spawn();
    let mut pin = Recorder(pin.unwrap());
    let locked = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().trim().to_owned();
        line.trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    wait_for("the pages to be locked", || (locked(pin.0.id()) == pages * 4).then_some(()));
    pin.interrupt();
    world.drop_pages();
}
