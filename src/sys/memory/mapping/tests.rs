//! Tests of placement, bounds and unmapping.

use std::os::fd::AsFd;

use crate::sys::memory::mapping::*;

fn anonymous(length: u64, align: u64) -> io::Result<Mapping> {
    Mapping::new(&Request {
        length: Bytes::new(length),
        align: Bytes::new(align),
        file: None,
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: true,
        sync: false,
    })
}

/// Returns the permissions of an address in `/proc/self/maps`.
fn permissions(address: u64) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        (start..end).contains(&address).then(|| rest[..4].to_owned())
    })
}

#[test]
fn mapping_is_aligned_and_guarded() {
    for align in [4096, 65536, 2 << 20, 64 << 20] {
        let map = anonymous(3 * PAGE_SIZE, align).unwrap();
        assert!(map.address().is_multiple_of(align), "{align}");
        assert_eq!(permissions(map.range().start).unwrap(), "rw-p");
        assert_eq!(permissions(map.range().end).unwrap(), "---p", "guard page");
    }
}

#[test]
fn drop_unmaps_memory_and_guard() {
    // An unusual size and alignment, so that the mapping of another test is unlikely to reuse the address.
    let map = anonymous(1 << 30, 1 << 30).unwrap();
    let range = map.range();
    drop(map);
    let middle = range.start + (512 << 20);
    assert_eq!(permissions(middle), None);
}

#[test]
fn rejects_invalid_requests() {
    for (length, align) in [(0, 4096), (4095, 4096), (4096, 0), (4096, 12288), (4096, 2048)] {
        let kind = anonymous(length, align).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::InvalidInput, "{length} {align}");
    }
    assert!(anonymous(1 << 62, 4096).is_err());
    assert!(anonymous(u64::MAX - 4095, 1 << 63).is_err());
}

#[test]
fn access_is_bounds_checked() {
    let map = anonymous(2 * PAGE_SIZE, PAGE_SIZE).unwrap();
    map.write(MemoryOffset::new(8190), &[1, 2]).unwrap();
    let mut out = [0; 2];
    map.read(MemoryOffset::new(8190), &mut out).unwrap();
    assert_eq!(out, [1, 2]);
    assert!(map.read(MemoryOffset::new(8191), &mut out).is_err());
    assert!(map.write(MemoryOffset::new(u64::MAX), &[1]).is_err());
    assert!(map.load(MemoryOffset::new(8192)).is_err());
    assert!(map.store(MemoryOffset::new(8192), 1).is_err());
    assert!(map.advise(4096..12288, Advice::Random).is_err());
}

#[test]
fn inaccessible_page_is_an_error_instead_of_a_signal() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * PAGE_SIZE).unwrap();
    let map = Mapping::new(&Request::view(file.as_fd(), Bytes::new(2 * PAGE_SIZE))).unwrap();
    file.set_len(PAGE_SIZE).unwrap();
    let mut out = [1; 16];
    map.read(MemoryOffset::new(0), &mut out).unwrap();
    assert_eq!(out, [0; 16]);
    let error = map.read(MemoryOffset::new(PAGE_SIZE), &mut out).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    let error = map.read(MemoryOffset::new(PAGE_SIZE - 8), &mut out).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    let error = map.write(MemoryOffset::new(0), &[1]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "read-only memory");
}

#[test]
fn zeros_replace_a_part_and_are_copied_page_by_page() {
    const HUGE: u64 = 2 << 20;
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; 4 * HUGE as usize], 0).unwrap();
    let request = |protection, sharing| Request {
        length: Bytes::new(4 * HUGE),
        align: Bytes::new(HUGE),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection,
        sharing,
        reserve: false,
        sync: false,
    };
    let mut map = Mapping::new(&request(Protection::ReadWrite, Sharing::Private)).unwrap();
    for invalid in [0..0, 1..HUGE, 0..HUGE + 1, 3 * HUGE..5 * HUGE] {
        let kind = map.map_zeros(invalid.clone(), false).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::InvalidInput, "{invalid:?}");
    }
    map.map_zeros(HUGE..3 * HUGE, false).unwrap();
    map.advise_all(Advice::DontFork).unwrap();
    let mut bytes = vec![1; 4 * HUGE as usize];
    map.read(MemoryOffset::new(0), &mut bytes).unwrap();
    let is_zero = |at: usize| (HUGE as usize..3 * HUGE as usize).contains(&at);
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if is_zero(at) { 0 } else { 7 }));
    map.store(MemoryOffset::new(HUGE + 5 * PAGE_SIZE), 3).unwrap();
    map.store(MemoryOffset::new(9 * PAGE_SIZE), 3).unwrap();
    let dirty = crate::sys::memory::pagemap::Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
    let start = map.range().start;
    let dirty: Vec<_> = dirty.iter().map(|found| (found.range.start - start) / PAGE_SIZE).collect();
    assert_eq!(dirty, [9, 512 + 5]);
    for (protection, sharing) in
        [(Protection::Read, Sharing::Private), (Protection::ReadWrite, Sharing::Shared)]
    {
        let mut map = Mapping::new(&request(protection, sharing)).unwrap();
        assert!(map.map_zeros(0..HUGE, false).is_err());
    }
}
