//! Placement, bounds and the end of mappings.

use std::os::fd::AsFd;

use super::*;

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

/// The permissions that `/proc/self/maps` shows at an address.
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
fn aligned_and_guarded() {
    for align in [4096, 65536, 2 << 20, 64 << 20] {
        let map = anonymous(3 * PAGE_SIZE, align).unwrap();
        assert!(map.address().is_multiple_of(align), "{align}");
        assert_eq!(permissions(map.range().start).unwrap(), "rw-p");
        assert_eq!(permissions(map.range().end).unwrap(), "---p", "guard page");
    }
}

#[test]
fn dropping_unmaps_memory_and_guard() {
    // An odd size at an odd alignment, so that no other test's mapping is likely to take the place.
    let map = anonymous(1 << 30, 1 << 30).unwrap();
    let range = map.range();
    drop(map);
    let middle = range.start + (512 << 20);
    assert_eq!(permissions(middle), None);
}

#[test]
fn bad_requests_are_errors() {
    for (length, align) in [(0, 4096), (4095, 4096), (4096, 0), (4096, 12288), (4096, 2048)] {
        let kind = anonymous(length, align).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::InvalidInput, "{length} {align}");
    }
    assert!(anonymous(1 << 62, 4096).is_err());
    assert!(anonymous(u64::MAX - 4095, 1 << 63).is_err());
}

#[test]
fn access_is_bounded() {
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
fn a_page_that_cannot_be_had_is_an_error_and_no_signal() {
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
