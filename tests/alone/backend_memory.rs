//! A backend whose copies are in swap.

use std::collections::BTreeSet;
use std::fs::File;

use stencilfs::memory::{Protection, Sharing, page_ranges};
use stencilfs::sys::memory::mapping::{Advice, Mapping, Request};
use stencilfs::sys::memory::pagemap::Pagemap;
use stencilfs::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE};

use crate::backend_memory::{pages_of, template};
use crate::support::host;

#[test]
fn copies_in_swap_are_dirty_and_hold_no_ram() {
    let _host = host::alone();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let _swap = host::SwapFile::on(64 << 20);
    let size = 8 << 20;
    let file = File::open(template(folder.path(), size)).unwrap();
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
    // Pages on a CPU's own lists are passed over; a second call finds them.
    let mut swapped = BTreeSet::new();
    for _ in 0..50 {
        map.advise(0..size / 2, Advice::PageOut).unwrap();
        let ranges = page_ranges(&pagemap, map.range()).unwrap();
        assert_eq!(pages_of(&ranges), written, "swapped or not, each page once");
        swapped = pages_of(&ranges.into_iter().filter(|r| r.swapped).collect::<Vec<_>>());
        if swapped.len() >= 100 {
            break;
        }
    }
    assert!(swapped.len() >= 100, "only {} pages went to swap", swapped.len());
    assert!(swapped.iter().all(|page| *page < size / 2 / PAGE_SIZE));
    let entries = pagemap.entries(map.range()).unwrap();
    for page in &swapped {
        assert!(entries[*page as usize].swap_slot().is_some() && !entries[*page as usize].is_present());
    }
    // A read brings a page back: it is dirty still, and in RAM.
    let back = *swapped.first().unwrap();
    assert_eq!(map.load(MemoryOffset::new(back * PAGE_SIZE)).unwrap(), 0xaa);
    let ranges = page_ranges(&pagemap, map.range()).unwrap();
    assert_eq!(pages_of(&ranges), written);
    assert!(!pages_of(&ranges.into_iter().filter(|r| r.swapped).collect::<Vec<_>>()).contains(&back));
}
