//! Disk space: how much `stencil gc` needs while it runs, and how much it reports as freed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use stencilfs::store::BLOCK_SIZE;

use crate::support::daemon::passing::Mounted;
use crate::support::store::{Fixture, random, read_all};

const BLOCK: usize = BLOCK_SIZE as usize;
const PACK: u64 = 64 << 20;

fn digest_of(fixture: &Fixture, tag: &str) -> stencilfs::store::Digest {
    fixture.store().resolve(&tag.parse().unwrap()).unwrap()
}

fn blocks_of(bytes: &[u8], is_live: impl Fn(usize) -> bool) -> Vec<u8> {
    let blocks = bytes.chunks(BLOCK).enumerate().filter(|(number, _)| is_live(*number));
    blocks.flat_map(|(_, block)| block).copied().collect()
}

#[test]
fn gc_and_its_dry_run_report_the_bytes_freed() {
    // First only a pack that must be rewritten; then also a pack that is unreferenced.
    for dead in [false, true] {
        let fixture = Fixture::new();
        let first = random(1, 64 * BLOCK);
        fixture.import("first", &first);
        fixture.import("kept", &first[..24 * BLOCK]);
        if dead {
            fixture.import("dead", &random(2, 8 * BLOCK));
            fixture.run(&["rm", "dead"]).ok();
        }
        fixture.run(&["rm", "first"]).ok();
        let dry = fixture.run(&["--json", "gc", "--dry-run"]).ok().json();
        let before = fixture.disk_usage();
        let done = fixture.run(&["--json", "gc"]).ok().json();
        let freed_on_disk = before - fixture.disk_usage();
        assert!(freed_on_disk >= if dead { 48 } else { 40 } * BLOCK_SIZE - (64 << 10), "{freed_on_disk}");
        for (command, report) in [("the dry run", &dry), ("gc", &done)] {
            let freed = report["freed_bytes"].as_u64().unwrap();
            assert!(
                freed.abs_diff(freed_on_disk) < 64 << 10,
                "{command} reported {freed}, measured {freed_on_disk}"
            );
        }
        assert_eq!(done["removed_packs"], if dead { 2 } else { 1 });
    }
}

/// Blocks that were copied before gc found the damage are discarded: the damaged pack stays in place.
#[test]
fn gc_of_a_damaged_pack_leaves_the_pack_and_no_copies() {
    let fixture = Fixture::new();
    let first = random(1, 40 * BLOCK);
    fixture.import("first", &first);
    // The live blocks are the last ones of the pack.
    fixture.import("kept", &first[28 * BLOCK..]);
    let pack = fixture.files("packs").remove(0);
    fixture.run(&["rm", "first"]).ok();
    let file = File::options().read(true).write(true).open(&pack).unwrap();
    let (place, mut byte) = (39 * BLOCK_SIZE + 1000, [0]);
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[!byte[0]], place).unwrap();
    let before = fixture.disk_usage();
    for _ in 0..2 {
        let done = fixture.run(&["--json", "gc"]).ok();
        assert!(done.stderr.contains("the pack is left unchanged"), "{done:?}");
        let done = done.json();
        assert_eq!((&done["freed_bytes"], &done["new_packs"]), (&0.into(), &0.into()), "{done:#}");
        assert_eq!(fixture.disk_usage(), before);
        assert!(fixture.files("packs") == std::slice::from_ref(&pack));
    }
    assert_eq!(fixture.run(&["verify"]).code, 3);
    // After the repair, gc removes the pack.
    fixture.import("kept", &first[28 * BLOCK..]);
    fixture.run(&["gc"]).ok();
    assert!(!pack.exists());
    fixture.run(&["verify"]).ok();
}

/// A small tmpfs, unmounted when dropped.
struct Disk(Mounted);

impl Disk {
    fn new(path: PathBuf, bytes: u64) -> Disk {
        fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes},mode=0700")).unwrap();
        mount("none", &path, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        Disk(Mounted(path))
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0.0).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Fills the file system until `bytes` are free.
    fn leave(&self, filler: &Path, bytes: u64) {
        let _ = fs::remove_file(filler);
        fs::write(filler, vec![1; (self.free() - bytes) as usize]).unwrap();
        assert!(self.free().abs_diff(bytes) < 16 << 10, "{}", self.free());
    }
}

/// Packs are rewritten one after another if there is no space for all copies: each frees space for the next.
#[test]
fn gc_works_on_a_nearly_full_store() {
    const PACKS: u64 = 8;
    let fixture = Fixture::new();
    let disk = Disk::new(fixture.path("store"), 48 << 20);
    let parts: Vec<Vec<u8>> = (0..PACKS).map(|seed| random(seed, 64 * BLOCK)).collect();
    for (number, part) in parts.iter().enumerate() {
        fixture.import(&format!("part-{number}"), part);
    }
    let kept: Vec<u8> = parts.iter().flat_map(|part| part[..24 * BLOCK].to_vec()).collect();
    fixture.import("kept", &kept);
    for number in 0..PACKS {
        fixture.run(&["rm", &format!("part-{number}")]).ok();
    }
    let filler = disk.0.0.join("filler");
    disk.leave(&filler, 256 << 10);
    let refused = fixture.run(&["gc"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused.stderr.contains("the collection stopped (packs removed: 0): ")
            && refused.stderr.contains("free 64.0 MiB"),
        "{refused:?}"
    );
    assert_eq!(fixture.files("tmp"), Vec::<PathBuf>::new());
    assert!(read_all(&fixture.store(), &digest_of(&fixture, "kept"), 0).unwrap() == kept);
    // Space for two copies of one pack's live blocks (1.5 MiB each); those of all packs take 12 MiB.
    disk.leave(&filler, 3 << 20);
    let free = disk.free();
    let done = fixture.run(&["--json", "gc"]).ok().json();
    assert_eq!(done["repacked_packs"], PACKS, "{done:#}");
    assert_eq!(done["placements"], 1, "{done:#}");
    let freed = done["freed_bytes"].as_u64().unwrap();
    assert!(freed > PACKS * 39 * BLOCK_SIZE, "{freed}");
    assert!(
        freed.abs_diff(disk.free() - free) < 64 << 10,
        "reported {freed}, measured {}",
        disk.free() - free
    );
    assert!(read_all(&fixture.store(), &digest_of(&fixture, "kept"), 0).unwrap() == kept);
    fixture.run(&["verify"]).ok();
}

/// gc of several full packs leaves the live blocks, and unreferenced blocks of at most the size of one pack.
#[test]
fn gc_rewrites_full_packs_into_several() {
    let fixture = Fixture::new();
    // Less than half of the blocks of `less` stay live, and more than half of those of `more`.
    let (less, more) = (random(1, 160 << 20), random(2, 96 << 20));
    fixture.import("less", &less);
    fixture.import("more", &more);
    assert!(fixture.files("packs").len() >= 5);
    let kept_less = blocks_of(&less, |number| number % 20 < 9);
    let kept_more = blocks_of(&more, |number| number % 20 < 11);
    drop((less, more));
    fixture.import("kept-less", &kept_less);
    fixture.import("kept-more", &kept_more);
    let packs = fixture.files("packs");
    fixture.run(&["rm", "less", "more"]).ok();
    let dry = fixture.run(&["--json", "gc", "--dry-run"]).ok().json();
    let done = fixture.run(&["--json", "gc"]).ok().json();
    for field in ["removed_packs", "repacked_packs", "placements", "new_packs", "dead_bytes"] {
        assert_eq!(done[field], dry[field], "{field}: {done:#}");
    }
    assert!(done["new_packs"].as_u64().unwrap() >= 2, "{done:#}");
    assert!(
        done["dead_bytes"].as_u64().unwrap() > PACK / 2,
        "packs that are mostly live must stay: {done:#}"
    );
    assert!(fixture.files("packs").iter().any(|pack| packs.contains(pack)), "{done:#}");
    let printed = fixture.run(&["gc"]).ok().stdout;
    assert!(
        printed.contains(
            " of unreferenced records remain in packs that are in use; 'stencil gc --all' rewrites these packs"
        ),
        "{printed}"
    );
    let live = (kept_less.len() + kept_more.len()) as u64;
    let totals = fixture.run(&["--json", "du"]).ok().json()["totals"].clone();
    assert!(totals["dead_bytes"].as_u64().unwrap() <= PACK, "{totals:#}");
    assert!(
        fixture.disk_usage() < live + PACK + live / 50,
        "{} bytes on disk for {live} live bytes",
        fixture.disk_usage()
    );
    for (tag, kept) in [("kept-less", kept_less), ("kept-more", kept_more)] {
        assert!(read_all(&fixture.store(), &digest_of(&fixture, tag), 0).unwrap() == kept, "{tag}");
    }
    fixture.run(&["verify"]).ok();
    let dead = totals["dead_bytes"].as_u64().unwrap();
    let all = fixture.run(&["--json", "gc", "--all"]).ok().json();
    assert!(all["dead_bytes"] == 0 && all["freed_bytes"].as_u64().unwrap() > dead / 2, "{all:#}");
    assert_eq!(fixture.run(&["--json", "du"]).ok().json()["totals"]["dead_bytes"], 0);
    fixture.run(&["verify"]).ok();
}
