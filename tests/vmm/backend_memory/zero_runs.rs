//! Long runs of zeros of a template, which Stencil's own mappings map as anonymous memory: the same bytes, no page
//! cache, and figures exact to the page.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use stencilfs::clones::launch::Simulate;
use stencilfs::memory::{Backend, observe};
use stencilfs::sys::process::procfs;
use stencilfs::units::{Bytes, MemoryOffset, PAGE_SIZE, PageIndex};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;
use crate::vmm::kvm_guest::{Machine, scattered, write_template};

const MIB: usize = 1 << 20;
const SIZE: usize = 64 * MIB;

/// Data of the template, in MiB; the rest, 60 % of it, is zero.
const DATA: [(usize, usize); 3] = [(3, 13), (21, 22), (50, 64)];

/// The zero runs: whole 2 MiB pages without data, in MiB. The first 2 MiB are in none because of their first page.
const RUNS: [(usize, usize); 2] = [(14, 20), (22, 50)];

fn image() -> Vec<u8> {
    let mut image = vec![0; SIZE];
    for (start, end) in DATA {
        image[start * MIB..end * MIB].copy_from_slice(&guest_like(start as u64, (end - start) * MIB));
    }
    image
}

struct World {
    mount: TestMount,
    digest: String,
}

impl World {
    fn new(serve: &str, image: &[u8]) -> World {
        let mount = TestMount::new(serve);
        let digest = mount.import_bytes(image, "web:1");
        mount.wait_until_verified(&digest);
        World { mount, digest }
    }

    fn map(&self, options: &str) -> Backend {
        let path = self.mount.file(&self.digest, "memory");
        let size = path.metadata().unwrap().len();
        let file = format!("memory-backend-file,id=m,size={size},mem-path={}", path.display());
        Backend::from_text(&format!("{file},readonly=on,rom=off{options}")).unwrap()
    }

    /// Bytes of the template in the page cache.
    fn cached(&self) -> u64 {
        self.mount.json(&["density"])["templates"][0]["resident_bytes"].as_u64().unwrap()
    }

    /// The row of a process in `stencil density --audit`, after the counts of page frames were compared.
    fn audited(&self, pid: u32) -> Value {
        let density = self.mount.json(&["density", "--audit"]);
        let frames = &density["audit"]["frames"];
        assert_eq!(frames["private_bytes"], frames["private_accounted"], "{frames:#}");
        assert_eq!(density["totals"]["private_bytes"], frames["private_accounted"], "{density:#}");
        let rows = density["clones"].as_array().unwrap();
        rows.iter().find(|row| row["pid"] == pid).unwrap_or_else(|| panic!("no {pid} in {density:#}")).clone()
    }

    fn dirty(&self, pid: u32) -> (BTreeSet<u64>, Value) {
        let report = self.mount.json(&["dirty", &pid.to_string(), "--ranges"]);
        assert_eq!(report["replaced_pages"], 0, "{report:#}");
        let number = |range: &Value, field: &str| range[field].as_u64().unwrap();
        let ranges = report["ranges"].as_array().unwrap().iter();
        let pages =
            ranges.flat_map(|r| number(r, "first_page")..number(r, "first_page") + number(r, "pages"));
        (pages.collect(), report["ranges"].clone())
    }
}

/// Returns the mappings of a process in the address range of a backend.
fn mappings(backend: &Backend) -> Vec<procfs::MapLine> {
    let range = backend.address_range();
    let lines = procfs::maps(std::process::id(), |_, _| true).unwrap().unwrap();
    lines.into_iter().filter(|line| range.contains(&line.start)).collect()
}

fn read_all(backend: &Backend) -> Vec<u8> {
    let mut bytes = vec![0; backend.len().as_usize()];
    backend.read_at(MemoryOffset::new(0), &mut bytes).unwrap();
    bytes
}

fn library_dirty(backend: &Backend) -> BTreeSet<u64> {
    backend.dirty().unwrap().iter().flat_map(|range| range.pages()).collect()
}

#[test]
fn zero_runs_take_no_page_cache_and_are_copied_page_by_page() {
    let _host = host::shared();
    let image = image();
    for serve in ["decode", "passthrough", "kernel"] {
        let world = World::new(serve, &image);
        let own = std::process::id();
        for options in ["", ",reserve=off,merge=off,dump=off", ",prefault=on"] {
            let memory = world.map(options);
            let lines = mappings(&memory);
            let anonymous = lines.iter().filter(|line| line.ino == 0);
            let start = memory.address_range().start;
            let places: BTreeSet<_> = anonymous
                .clone()
                .map(|line| ((line.start - start) as usize / MIB, (line.end - start) as usize / MIB))
                .collect();
            assert_eq!(places, BTreeSet::from(RUNS), "{serve}{options}");

            for line in anonymous {
                let flags = observe(line.start).unwrap().vm_flags;
                assert!(flags.iter().any(|flag| flag == "nh"), "huge pages are off: {flags:?}");
            }
            assert!(read_all(&memory) == image, "{serve}{options}");
            // Readahead at the borders of a run reads zero pages too, as many as the disk's readahead has.
            let cached = world.cached() as usize;
            let in_runs = RUNS.iter().map(|(start, end)| (end - start) * MIB).sum::<usize>();
            assert!(cached <= SIZE - in_runs / 2, "{serve}{options}: {cached} bytes in the page cache");
            assert_eq!(library_dirty(&memory), BTreeSet::new());
            assert_eq!(world.dirty(own).0, BTreeSet::new());
            let row = world.audited(own);
            for (field, value) in [("dirty_pages", 0), ("replaced_pages", 0), ("private_bytes", 0)] {
                assert_eq!(row[field], value, "{serve}{options} {row:#}");
            }
            assert_eq!(row["mapped_bytes"], SIZE, "{serve}{options}");

            // The first and last page of a run, pages inside, a page of data, and zero pages outside of the runs.
            let pages: BTreeSet<u64> =
                [0, 22 * 256, 22 * 256 + 1, 30 * 256 + 77, 50 * 256 - 1, 15 * 256, 4 * 256 + 3, 20 * 256 + 9]
                    .into();
            let mut expected = image.clone();
            for &page in &pages {
                memory.write_at(MemoryOffset::new(page * PAGE_SIZE + 8), &[9; 16]).unwrap();
                expected[(page * PAGE_SIZE) as usize + 8..][..16].fill(9);
            }
            // A write of zeros is a write.
            memory.poke(MemoryOffset::new(31 * MIB as u64), 0).unwrap();
            let pages: BTreeSet<u64> = pages.into_iter().chain([31 * 256]).collect();
            assert_eq!(library_dirty(&memory), pages, "{serve}{options}");
            assert_eq!(world.dirty(own).0, pages, "{serve}{options}");
            let row = world.audited(own);
            assert_eq!(row["dirty_pages"], pages.len(), "{serve}{options} {row:#}");
            assert_eq!(row["private_bytes"], pages.len() as u64 * PAGE_SIZE, "{serve}{options} {row:#}");
            assert!(read_all(&memory) == expected, "{serve}{options}");
            let populated = PageIndex::new(40 * 256)..PageIndex::new(40 * 256 + 5);
            memory.prefault_writes(populated).unwrap();
            assert_eq!(library_dirty(&memory).len(), pages.len() + 5, "{serve}{options}");
        }
        assert!(std::fs::read(world.mount.file(&world.digest, "memory")).unwrap() == image, "{serve}");
    }
}

#[test]
fn other_mappings_have_all_pages_from_the_file() {
    let _host = host::shared();
    let image = image();
    let world = World::new("decode", &image);
    let is_file = |memory: &Backend| mappings(memory).iter().all(|line| line.ino != 0);
    assert!(is_file(&world.map(",anonymous-zeros=off")));
    assert!(is_file(&world.map(",rom=on")));
    assert!(is_file(&world.map(",rom=on,share=on")));
    // A sparse file outside of a mount can be written by others.
    let sparse = world.mount.dir().join("sparse");
    File::create(&sparse).unwrap().set_len(SIZE as u64).unwrap();
    let memory = Backend::template(&sparse).unwrap();
    File::options().write(true).open(&sparse).unwrap().write_all_at(b"new", 30 * MIB as u64).unwrap();
    let mut bytes = [0; 3];
    memory.read_at(MemoryOffset::new(30 * MIB as u64), &mut bytes).unwrap();
    assert_eq!(&bytes, b"new");
    // Half of the file, not aligned to 2 MiB.
    let (offset, size) = (19 * MIB, 32 * MIB);
    let path = world.mount.file(&world.digest, "memory");
    let object = format!("memory-backend-file,id=m,size={size},offset={offset},mem-path={}", path.display());
    let part = Backend::from_text(&format!("{object},readonly=on,rom=off")).unwrap();
    assert_eq!(mappings(&part).iter().filter(|line| line.ino == 0).count(), 1);
    assert!(read_all(&part) == image[offset..offset + size]);
    part.poke(MemoryOffset::new(10 * MIB as u64), 1).unwrap();
    assert_eq!(world.dirty(std::process::id()).0, BTreeSet::from([29 * 256]));
}

/// A guest with many short runs.
#[test]
fn the_number_of_mappings_is_bounded() {
    const PERIOD: u64 = 4 << 20;
    const COUNT: u64 = 100;
    let _host = host::shared();
    let source = |world: &TestMount| {
        let path = world.dir().join("source");
        let file = File::create(&path).unwrap();
        file.set_len(COUNT * PERIOD).unwrap();
        (0..COUNT).for_each(|n| file.write_all_at(&[n as u8 + 1; 4096], n * PERIOD).unwrap());
        path
    };
    let mount = TestMount::new("decode");
    let digest = mount.import(&source(&mount), "web:1");
    let world = World { mount, digest };
    let memory = world.map(",reserve=off");
    let lines = mappings(&memory);
    assert_eq!(lines.iter().filter(|line| line.ino == 0).count(), 32);
    assert_eq!(lines.len(), 65);
    let pages: BTreeSet<u64> = (0..COUNT).flat_map(|n| [n * 1024, n * 1024 + 600]).collect();
    for &page in &pages {
        let byte = memory.touch(PageIndex::new(page)).unwrap();
        assert_eq!(u64::from(byte), if page % 1024 == 0 { page / 1024 + 1 } else { 0 });
        memory.poke(MemoryOffset::new(page * PAGE_SIZE), 7).unwrap();
    }
    assert_eq!(library_dirty(&memory), pages);
    assert_eq!(world.dirty(std::process::id()).0, pages);
    assert_eq!(world.audited(std::process::id())["mapped_bytes"], COUNT * PERIOD);
}

/// Writes a diff of the process: its dirty pages, and holes.
fn write_diff(pid: u32, ranges: &Value, diff: &Path) {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let file = File::create(diff).unwrap();
    file.set_len(SIZE as u64).unwrap();
    for range in ranges.as_array().unwrap() {
        let number = |field: &str| range[field].as_u64().unwrap();
        let mut bytes = vec![0; (number("pages") * PAGE_SIZE) as usize];
        memory.read_exact_at(&mut bytes, number("address")).unwrap();
        file.write_all_at(&bytes, number("first_page") * PAGE_SIZE).unwrap();
    }
}

/// Reads the memory of a simulated clone.
fn memory_of(pid: u32) -> Vec<u8> {
    let lines = procfs::maps(pid, |_, _| true).unwrap().unwrap();
    let first = lines.iter().find(|line| line.path.ends_with("/memory")).unwrap();
    let mut bytes = vec![0; SIZE];
    File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut bytes, first.start).unwrap();
    bytes
}

#[test]
fn a_diff_of_a_clone_with_zero_runs_is_its_memory() {
    const SIMULATED: &str = "read=50%,write=700p,seed=3";
    let _host = host::shared();
    let image = image();
    let simulate: Simulate = SIMULATED.parse().unwrap();
    for serve in ["decode", "passthrough", "kernel"] {
        let world = World::new(serve, &image);
        let launched = world.mount.json(&["clone", "web:1", "-n", "2", "--simulate", SIMULATED]);
        for clone in launched["clones"].as_array().unwrap() {
            let pid = clone["pid"].as_u64().unwrap() as u32;
            let scatter = simulate.pages(Bytes::new(SIZE as u64), clone["index"].as_u64().unwrap() as u32);
            let written: BTreeSet<u64> = (0..700).map(|n| scatter.at(n)).collect();
            let in_runs = written.iter().filter(|page| (22 * 256..50 * 256).contains(*page)).count();
            assert!(in_runs > 200, "{in_runs} written pages in the longest run");
            let (pages, ranges) = world.dirty(pid);
            assert_eq!(pages, written, "{serve}");
            assert_eq!(world.audited(pid)["private_bytes"], 700 * PAGE_SIZE, "{serve}");

            let diff = world.mount.dir().join(format!("diff-{pid}"));
            write_diff(pid, &ranges, &diff);
            let (tag, back) = (format!("diff:{pid}"), world.mount.dir().join(format!("back-{pid}")));
            world.mount.stencil(&["import", diff.to_str().unwrap(), &tag, "--base", "web:1"]).ok();
            world.mount.stencil(&["export", &tag, back.to_str().unwrap()]).ok();
            let memory = memory_of(pid);
            assert!(memory != image, "{serve}");
            assert!(std::fs::read(&back).unwrap() == memory, "{serve}");
        }
        world.mount.stencil(&["stop", "--all"]).ok();
        // The recorded written pages include those of the zero runs, and a later launch copies them first.
        let record = ["clone", "web:1", "--simulate", SIMULATED, "--record-working-set=0"];
        let recorded = world.mount.json(&record);
        assert_eq!(recorded["recorded"]["recorded_written_pages"], 700, "{serve} {recorded}");
        world.mount.stencil(&["stop", "--all"]).ok();
        let launched =
            world.mount.json(&["clone", "web:1", "--simulate", "read=0p,write=0p,prefault=written"]);
        let pid = launched["clones"][0]["pid"].as_u64().unwrap() as u32;
        assert_eq!(world.dirty(pid).0.len(), 700, "{serve}");
        world.mount.stencil(&["stop", "--all"]).ok();
    }
}

/// The second window of the guest lies in a zero run.
#[test]
fn a_kvm_guest_copies_exactly_the_zero_pages_that_it_writes() {
    const ZEROS: std::ops::Range<usize> = 4 * MIB..14 * MIB;
    let _host = host::shared();
    for serve in ["decode", "passthrough", "kernel"] {
        let mount = TestMount::new(serve);
        let (write_list, writes) = scattered(120, 29, &[]);
        let (read_list, _) = scattered(60, 31, &writes);
        let in_run = writes.iter().filter(|page| ZEROS.contains(&((**page * PAGE_SIZE) as usize))).count();
        assert!(in_run > 20, "{in_run} written pages in the run");
        let source = mount.dir().join("source");
        write_template(&source, &read_list, &write_list);
        let mut image = std::fs::read(&source).unwrap();
        image[ZEROS].fill(0);
        let digest = mount.import_bytes(&image, "guest:1");
        mount.wait_until_verified(&digest);
        let world = World { mount, digest };
        let memory = world.map("");
        assert_eq!(mappings(&memory).iter().filter(|line| line.ino == 0).count(), 1);
        let mut machine = Machine::new(memory.clone(), 0);
        assert_eq!(machine.run().unwrap(), 0);
        let expected = BTreeSet::from_iter(writes.iter().copied());
        assert_eq!(library_dirty(&memory), expected, "{serve}");
        assert_eq!(world.dirty(std::process::id()).0, expected, "{serve}");
        // The guest stores the loop counter.
        for (n, &page) in writes.iter().enumerate() {
            image[(page * PAGE_SIZE) as usize] = (writes.len() - n) as u8;
        }
        assert!(read_all(&memory) == image, "{serve}");
    }
}
