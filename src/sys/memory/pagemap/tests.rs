//! Tests with mappings in which the state of every page is known.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::AsFd;

use crate::sys::memory::mapping::{Advice, Mapping, Protection, Request, Sharing};
use crate::sys::memory::pagemap::*;
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset};

fn private_map(file: &File, length: u64, align: u64) -> Mapping {
    Mapping::new(&Request {
        length: Bytes::new(length),
        align: Bytes::new(align),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: false,
        sync: false,
    })
    .unwrap()
}

fn template(length: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let page: Vec<u8> = (0..PAGE_SIZE).map(|n| n as u8).collect();
    for _ in 0..length / PAGE_SIZE {
        file.write_all(&page).unwrap();
    }
    file
}

fn pages(map: &Mapping, found: &[DirtyRange]) -> Vec<u64> {
    let page = |address: u64| (address - map.range().start) / PAGE_SIZE;
    found.iter().flat_map(|r| page(r.range.start)..page(r.range.end)).collect()
}

/// Returns pseudo-random numbers, the same in every run.
fn scattered(count: u64, below: u64, seed: u64) -> BTreeSet<u64> {
    let mut state = seed;
    let mut set = BTreeSet::new();
    while (set.len() as u64) < count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        set.insert((state >> 33) % below);
    }
    set
}

fn write_page(map: &Mapping, page: u64) {
    map.store(MemoryOffset::new(page * PAGE_SIZE + page % PAGE_SIZE), 0xee).unwrap();
}

#[test]
fn written_pages_are_dirty() {
    let length = 16 << 20;
    let file = template(length);
    let map = private_map(&file, length, HUGE_PAGE_SIZE);
    let pagemap = Pagemap::this_process().unwrap();
    assert!(pagemap.dirty(map.range()).unwrap().is_empty());
    map.advise_all(Advice::PopulateRead).unwrap();
    assert!(pagemap.dirty(map.range()).unwrap().is_empty(), "reads copy no page");
    let written = scattered(1500, length / PAGE_SIZE, 7);
    written.iter().for_each(|page| write_page(&map, *page));
    let found = pagemap.dirty(map.range()).unwrap();
    assert_eq!(pages(&map, &found), Vec::from_iter(written));
    assert!(found.iter().all(|r| !r.swapped));
}

/// Scans more regions than fit into one call, with counts around the limit: a call that fills the vector exactly, and a
/// `walk_end` inside a finished region.
#[test]
fn scan_continues_after_a_full_vector() {
    let regions = REGIONS_PER_CALL as u64;
    for count in [regions - 1, regions, regions + 1, 2 * regions, 2 * regions + 5] {
        let length = (2 * count + 3) * PAGE_SIZE;
        let file = template(length);
        let map = private_map(&file, length, PAGE_SIZE);
        let written: Vec<u64> = (0..count).map(|n| 2 * n + 1).collect();
        written.iter().for_each(|page| write_page(&map, *page));
        let found = Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), written, "{count} regions");
    }
}

#[test]
fn classifies_zero_and_huge_pages() {
    let length = 4 * HUGE_PAGE_SIZE;
    let map = Mapping::new(&Request {
        length: Bytes::new(length),
        align: Bytes::new(HUGE_PAGE_SIZE),
        file: None,
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: true,
        sync: false,
    })
    .unwrap();
    let pagemap = Pagemap::this_process().unwrap();
    for page in 0..512 {
        map.load(MemoryOffset::new(page * PAGE_SIZE)).unwrap();
    }
    assert!(pagemap.dirty(map.range()).unwrap().is_empty(), "the zero page is not a copy");
    map.advise(HUGE_PAGE_SIZE..2 * HUGE_PAGE_SIZE, Advice::HugePage).unwrap();
    write_page(&map, 600);
    let found = pagemap.dirty(map.range()).unwrap();
    assert_eq!(pages(&map, &found), (512..1024).collect::<Vec<_>>(), "one store dirties one huge page");
}

#[test]
fn guard_regions_are_not_dirty() {
    let length = 1 << 20;
    let file = template(length);
    let map = private_map(&file, length, PAGE_SIZE);
    (0..32).for_each(|page| write_page(&map, page));
    const GUARD_INSTALL: i32 = 102;
    for pages in [8..16, 64..80] {
        let (at, length) = ((map.address() + pages.start * PAGE_SIZE) as *mut _, pages.end - pages.start);
        // SAFETY: the pages lie inside the mapping, into which no reference exists.
        assert_eq!(unsafe { libc::madvise(at, (length * PAGE_SIZE) as usize, GUARD_INSTALL) }, 0);
    }
    let pagemap = Pagemap::this_process().unwrap();
    let found = pagemap.dirty(map.range()).unwrap();
    assert_eq!(pages(&map, &found), (0..8).chain(16..32).collect::<Vec<_>>());
    assert!(pagemap.entries(map.range()).unwrap()[64..80].iter().all(|e| e.is_guard()));
}

#[test]
fn inaccessible_part_keeps_its_copies() {
    let length = 1 << 20;
    let file = template(length);
    let map = private_map(&file, length, PAGE_SIZE);
    (10..20).for_each(|page| write_page(&map, page));
    let at = (map.address() + 12 * PAGE_SIZE) as *mut _;
    // SAFETY: the two pages lie inside the mapping, into which no reference exists.
    assert_eq!(unsafe { libc::mprotect(at, 2 * PAGE_SIZE as usize, libc::PROT_NONE) }, 0);
    let found = Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
    assert_eq!(pages(&map, &found), (10..20).collect::<Vec<_>>());
}

#[test]
fn unmapped_part_is_not_dirty() {
    let length = 1 << 20;
    let file = template(length);
    let map = private_map(&file, length, PAGE_SIZE);
    (10..20).for_each(|page| write_page(&map, page));
    let hole = map.address() + 12 * PAGE_SIZE;
    // SAFETY: MAP_FIXED replaces memory of this mapping, into which no pointer exists, by an inaccessible page.
    unsafe {
        let (none, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        let at = libc::mmap(hole as *mut _, 3 * PAGE_SIZE as usize, none, flags, -1, 0);
        assert_eq!(at as u64, hole);
    }
    let found = Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
    assert_eq!(pages(&map, &found), vec![10, 11, 15, 16, 17, 18, 19]);
}

#[test]
fn entries_report_files() {
    let length = 64 * PAGE_SIZE;
    let file = template(length);
    let map = private_map(&file, length, PAGE_SIZE);
    map.load(MemoryOffset::new(0)).unwrap();
    write_page(&map, 5);
    let entries = Pagemap::this_process().unwrap().entries(map.range()).unwrap();
    assert_eq!(entries.len(), 64);
    assert!(entries[0].is_present() && entries[0].is_file());
    assert!(entries[5].is_present() && !entries[5].is_file());
}

#[test]
fn exited_process_is_not_found() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pagemap = Pagemap::open(child.id()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(pagemap.entries(0x1000..0x2000).unwrap_err().code(), crate::error::Code::NotFound);
    assert_eq!(Pagemap::open(child.id()).unwrap_err().code(), crate::error::Code::NotFound);
}

#[test]
fn rejects_unaligned_ranges() {
    let pagemap = Pagemap::this_process().unwrap();
    assert!(pagemap.dirty(1..4096).is_err());
    let (start, end) = (8192, 4096);
    assert!(pagemap.entries(start..end).is_err(), "the end is before the start");
    assert!(pagemap.entries(4096..4096).unwrap().is_empty());
}
