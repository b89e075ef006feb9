//! A memory backend whose copied pages are swapped out.

use std::collections::BTreeSet;
use std::fs::File;

use stencilfs::memory::{Protection, Sharing, page_ranges};
use stencilfs::sys::memory::mapping::{Advice, Mapping, Request};
use stencilfs::sys::memory::pagemap::Pagemap;
use stencilfs::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE};

use crate::support::host;
use crate::vmm::backend_memory::{pages_of, template};

#[test]
fn swapped_copies_are_dirty_and_not_resident() {
    let _host = host::alone();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let _swap = host::SwapFile::on(64 << 20);
    let size = 8 << 20;
    let file = File::open(template(dir.path(), size)).unwrap();
    let map = Mapping::new(&Request {
        length: Bytes::new(size),
        align: Bytes::new(HUGE_PAGE_SIZE),
        file: Some((std::os::fd::AsFd::as_fd(&file), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: false,
        sync: false,
    })
    .unwrap();
    let written: BTreeSet<u64> = (0..300).map(|n| n * 5 + 2).collect();
    for page in &written {
        map.store(MemoryOffset::new(page * PAGE_SIZE), 0xaa).unwrap();
    }
    let pagemap = Pagemap::this_process().unwrap();
    // MADV_PAGEOUT skips pages that are still in a per-CPU list; a later call pages them out.
    let mut swapped = BTreeSet::new();
    for _ in 0..50 {
        map.advise(0..size / 2, Advice::PageOut).unwrap();
        let ranges = page_ranges(&pagemap, map.range()).unwrap();
        assert_eq!(pages_of(&ranges), written, "each page is reported once, swapped or not");
        swapped = pages_of(&ranges.into_iter().filter(|r| r.swapped).collect::<Vec<_>>());
        if swapped.len() >= 100 {
            break;
        }
    }
    assert!(swapped.len() >= 100, "only {} pages were swapped out", swapped.len());
    assert!(swapped.iter().all(|page| *page < size / 2 / PAGE_SIZE));
    let entries = pagemap.entries(map.range()).unwrap();
    for page in &swapped {
        assert!(entries[*page as usize].swap_slot().is_some() && !entries[*page as usize].is_present());
    }
    // A read swaps a page in: the page is still dirty, and in RAM.
    let swapped_in = *swapped.first().unwrap();
    assert_eq!(map.load(MemoryOffset::new(swapped_in * PAGE_SIZE)).unwrap(), 0xaa);
    let ranges = page_ranges(&pagemap, map.range()).unwrap();
    assert_eq!(pages_of(&ranges), written);
    assert!(!pages_of(&ranges.into_iter().filter(|r| r.swapped).collect::<Vec<_>>()).contains(&swapped_in));
}
