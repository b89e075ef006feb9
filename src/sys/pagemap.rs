//! Which pages of a process are present, copied, swapped: `/proc/PID/pagemap`, by `PAGEMAP_SCAN`
//! (ranges, fast) and by its 64-bit entries (frames, exact per page).
//!
//! **Copy-on-write is the dirty bit.** In a private mapping of a file a page that is present and is
//! no page of the file has been copied by a write; [`Pagemap::dirty`] lists these, from outside, on
//! any process, without arming anything.

use std::fs::File;
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::units::PAGE_SIZE;

/// A set of page categories of `PAGEMAP_SCAN`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// No category.
    pub const NONE: Categories = Categories(0);
    /// The page lies in a mapping that allows asynchronous write protection.
    pub const WP_ALLOWED: Categories = Categories(1);
    /// Written since it was write-protected.
    pub const WRITTEN: Categories = Categories(2);
    /// A page of a file or of shared memory.
    pub const FILE: Categories = Categories(4);
    /// Present in RAM and in the page table.
    pub const PRESENT: Categories = Categories(8);
    /// In swap, or a marker that looks so.
    pub const SWAPPED: Categories = Categories(16);
    /// The shared zero page.
    pub const ZERO: Categories = Categories(32);
    /// Mapped by a PMD.
    pub const HUGE: Categories = Categories(64);
    /// A guard region (known to the kernel since 6.15).
    pub const GUARD: Categories = Categories(256);

    /// True when every category of `other` is in this set.
    pub const fn contains(self, other: Categories) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set without the other's categories.
    #[must_use]
    pub const fn without(self, other: Categories) -> Categories {
        Categories(self.0 & !other.0)
    }
}

impl BitOr for Categories {
    type Output = Categories;
    fn bitor(self, other: Categories) -> Categories {
        Categories(self.0 | other.0)
    }
}

/// Which pages a scan reports, and what it says about them. A page matches when it has all of `all`,
/// none of `none`, and one of `any` (unless that is empty).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Query {
    /// Categories that a page must have.
    pub all: Categories,
    /// Categories that a page must not have.
    pub none: Categories,
    /// Categories of which a page must have at least one.
    pub any: Categories,
    /// Categories that are reported, and that split ranges.
    pub report: Categories,
}

/// Neighbouring pages with the same reported categories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Addresses, whole pages.
    pub range: Range<u64>,
    /// What was reported.
    pub categories: Categories,
}

/// Neighbouring pages that a process has copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyRange {
    /// Addresses, whole pages.
    pub range: Range<u64>,
    /// True when the copies lie in swap and hold no RAM.
    pub swapped: bool,
}

impl DirtyRange {
    /// Number of 4 KiB pages.
    pub fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE_SIZE
    }
}

/// One entry of a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

/// Page table entries that look like swap and are none have this type: the last of the 32 that the
/// kernel has (`SWP_PTE_MARKER`).
const SWAP_TYPE_MARKER: u64 = 31;

impl Entry {
    /// The raw 64 bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Present in RAM and in the page table.
    pub fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// In swap, or a marker that looks so.
    pub fn is_swap(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// A page of a file or of shared memory.
    pub fn is_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// A guard region (known to the kernel since 6.15).
    pub fn is_guard(self) -> bool {
        self.0 >> 58 & 1 == 1
    }

    /// Write-protected by userfaultfd, or a marker for that.
    pub fn is_uffd_wp(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    /// The frame is mapped by this page table entry alone.
    pub fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// The frame number of a present page; nothing without `CAP_SYS_ADMIN`, which the kernel wants for it.
    pub fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        (self.is_present() && frame != 0).then_some(frame)
    }

    /// Type and offset of a swap entry.
    fn swap(self) -> Option<(u64, u64)> {
        self.is_swap().then_some((self.0 & 31, self.0 >> 5 & ((1 << 50) - 1)))
    }

    /// A marker (userfaultfd, guard, poison), which holds no page: neither RAM nor swap.
    pub fn is_marker(self) -> bool {
        self.swap().is_some_and(|(kind, _)| kind == SWAP_TYPE_MARKER)
    }

    /// Type and offset of the swap slot that holds the page, unless it is a marker.
    pub fn swap_slot(self) -> Option<(u64, u64)> {
        self.swap().filter(|(kind, _)| *kind != SWAP_TYPE_MARKER)
    }
}

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610_u32 as libc::Ioctl;

/// Regions that one call of the kernel may answer.
const REGIONS_PER_CALL: usize = 1024;

/// Entries that one read fetches.
const ENTRIES_PER_READ: usize = 8192;

/// The pagemap of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// For messages; nothing for this process.
    pid: Option<u32>,
}

impl Pagemap {
    /// Of this process. A thread of it that forks later keeps looking at the parent.
    ///
    /// # Errors
    /// Whatever opening `/proc/self/pagemap` gives.
    pub fn this_process() -> Result<Pagemap> {
        let path = "/proc/self/pagemap";
        let file = File::open(path).map_err(|e| Error::io("cannot open the pagemap", path, e))?;
        Ok(Pagemap { file, pid: None })
    }

    /// Of any process. The value stays with that process even when its number is given away.
    ///
    /// # Errors
    /// Not found when the process is gone; failed without the right to look into it.
    pub fn open(pid: u32) -> Result<Pagemap> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => gone(Some(pid)),
            _ => Error::io("cannot open the pagemap", &path, e),
        })?;
        Ok(Pagemap { file, pid: Some(pid) })
    }

    fn path(&self) -> String {
        self.pid.map_or_else(|| "/proc/self/pagemap".to_owned(), |pid| format!("/proc/{pid}/pagemap"))
    }

    fn failed(&self, what: &str, cause: io::Error) -> Error {
        match cause.raw_os_error() {
            Some(libc::ESRCH) => gone(self.pid),
            Some(libc::ENOTTY) => Error::io(what, self.path(), cause).remedy("PAGEMAP_SCAN needs Linux 6.7"),
            _ => Error::io(what, self.path(), cause),
        }
    }

    /// The pages of `range` (whole pages) that match, in order; neighbours of equal categories are one region.
    ///
    /// # Errors
    /// A usage error for a range that is not of whole pages; else what the kernel says.
    pub fn scan(&self, range: Range<u64>, query: &Query) -> Result<Vec<Region>> {
        let mut found: Vec<Region> = Vec::new();
        self.scan_each(range, query, |region| match found.last_mut() {
            Some(last) if last.range.end == region.range.start && last.categories == region.categories => {
                last.range.end = region.range.end;
            }
            _ => found.push(region),
        })?;
        Ok(found)
    }

    fn scan_each(&self, range: Range<u64>, query: &Query, mut each: impl FnMut(Region)) -> Result<()> {
        check_pages(&range)?;
        let mut answer = vec![RawRegion::default(); REGIONS_PER_CALL];
        let mut start = range.start;
        while start < range.end {
            let count = self.scan_once(start..range.end, query, &mut answer)?;
            for raw in &answer[..count] {
                each(Region { range: raw.start..raw.end, categories: Categories(raw.categories) });
            }
            // Fewer regions than there was room for: the walk is done. `walk_end` says nothing then (it
            // may point into a finished range), and with a full answer the last region's end is as good:
            // what lies between the two did not match.
            if count < answer.len() {
                return Ok(());
            }
            start = answer[count - 1].end;
        }
        Ok(())
    }

    fn scan_once(&self, range: Range<u64>, query: &Query, answer: &mut [RawRegion]) -> Result<usize> {
        let known = known_categories();
        let (all, none) = (query.all.0 & known, query.none.0 & known);
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: 0,
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: answer.as_mut_ptr() as u64,
            vec_len: answer.len() as u64,
            max_pages: 0,
            category_inverted: none,
            category_mask: all | none,
            category_anyof_mask: query.any.0 & known,
            return_mask: query.report.0 & known,
        };
        loop {
            // SAFETY: the argument has the layout and the size that it names; `vec` points to `vec_len`
            // regions that are borrowed mutably for the call.
            let done = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut argument) };
            if let Ok(count) = usize::try_from(done) {
                return Ok(count.min(answer.len()));
            }
            let cause = io::Error::last_os_error();
            if cause.kind() != io::ErrorKind::Interrupted {
                return Err(self.failed("cannot scan pages", cause));
            }
        }
    }

    /// The pages of `range` that the process has copied, present or in swap, in order. Exact, and
    /// nothing needs to be armed before. Where userfaultfd or guard markers look like swap they are
    /// told apart by their entries, for which the kernel wants `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// As [`Pagemap::scan`] and [`Pagemap::entries`].
    pub fn dirty(&self, range: Range<u64>) -> Result<Vec<DirtyRange>> {
        let query = Query {
            none: Categories::FILE | Categories::ZERO | Categories::GUARD,
            any: Categories::PRESENT | Categories::SWAPPED,
            report: Categories::SWAPPED,
            ..Query::default()
        };
        let mut dirty: Vec<DirtyRange> = Vec::new();
        for region in self.scan(range, &query)? {
            if !region.categories.contains(Categories::SWAPPED) {
                push(&mut dirty, region.range, false);
                continue;
            }
            self.each_entry(region.range, |address, entry| {
                // The page may have come back since the scan.
                let copied = !entry.is_file() && !entry.is_guard() && !entry.is_marker();
                if copied && (entry.is_present() || entry.is_swap()) {
                    push(&mut dirty, address..address + PAGE_SIZE, entry.is_swap());
                }
            })?;
        }
        Ok(dirty)
    }

    /// The entries of all pages of `range`, in order.
    ///
    /// # Errors
    /// A usage error for a range that is not of whole pages; not found when the process is gone.
    pub fn entries(&self, range: Range<u64>) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.each_entry(range, |_, entry| entries.push(entry))?;
        Ok(entries)
    }

    /// Calls `each` with the address and the entry of every page of `range`, in order, in bounded memory.
    ///
    /// # Errors
    /// As [`Pagemap::entries`].
    pub fn each_entry(&self, range: Range<u64>, mut each: impl FnMut(u64, Entry)) -> Result<()> {
        check_pages(&range)?;
        let pages = (range.end - range.start) / PAGE_SIZE;
        let mut buffer = vec![0u8; 8 * (pages as usize).min(ENTRIES_PER_READ)];
        let mut address = range.start;
        while address < range.end {
            let wanted = buffer.len().min(8 * ((range.end - address) / PAGE_SIZE) as usize);
            let got = match self.file.read_at(&mut buffer[..wanted], address / PAGE_SIZE * 8) {
                Ok(got) => got & !7,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed("cannot read the pagemap", e)),
            };
            if got == 0 {
                return Err(gone(self.pid));
            }
            for bytes in buffer[..got].chunks_exact(8) {
                let mut word = [0; 8];
                word.copy_from_slice(bytes);
                each(address, Entry(u64::from_ne_bytes(word)));
                address += PAGE_SIZE;
            }
        }
        Ok(())
    }
}

fn push(ranges: &mut Vec<DirtyRange>, range: Range<u64>, swapped: bool) {
    match ranges.last_mut() {
        Some(last) if last.range.end == range.start && last.swapped == swapped => last.range.end = range.end,
        _ => ranges.push(DirtyRange { range, swapped }),
    }
}

fn check_pages(range: &Range<u64>) -> Result<()> {
    let whole = range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE);
    if whole && range.start <= range.end {
        return Ok(());
    }
    Err(Error::usage(format!("{:#x}-{:#x} is no range of whole pages", range.start, range.end)))
}

fn gone(pid: Option<u32>) -> Error {
    match pid {
        Some(pid) => Error::not_found(format!("process {pid} is gone")),
        None => Error::not_found("the address space of this process is gone"),
    }
}

/// All categories that the running kernel knows: unknown ones make it refuse the whole call. Only
/// GUARD is younger (6.15) than the oldest kernel that Stencil runs on.
fn known_categories() -> u64 {
    use std::sync::OnceLock;
    static KNOWN: OnceLock<u64> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let all = 0x1ff;
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: 0,
            start: 0,
            end: 0,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: all,
            return_mask: all,
        };
        let Ok(file) = File::open("/proc/self/pagemap") else { return all };
        // SAFETY: the argument has the layout and the size that it names; there is no result vector.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &mut argument) };
        if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            all & !Categories::GUARD.0
        } else {
            all
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::mapping::{Advice, Mapping, Protection, Request, Sharing};
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

    /// Numbers without a pattern, the same in every run.
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
    fn exactly_the_written_pages_are_dirty() {
        let length = 16 << 20;
        let file = template(length);
        let map = private_map(&file, length, HUGE_PAGE_SIZE);
        let pagemap = Pagemap::this_process().unwrap();
        assert!(pagemap.dirty(map.range()).unwrap().is_empty());
        map.advise_all(Advice::PopulateRead).unwrap();
        assert!(pagemap.dirty(map.range()).unwrap().is_empty(), "reading copies nothing");
        let written = scattered(1500, length / PAGE_SIZE, 7);
        written.iter().for_each(|page| write_page(&map, *page));
        let found = pagemap.dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), Vec::from_iter(written));
        assert!(found.iter().all(|r| !r.swapped));
    }

    /// More regions than one call may answer, at counts around the limit: an answer that fills the
    /// vector exactly, and `walk_end` inside a finished region.
    #[test]
    fn a_scan_ends_where_it_should() {
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
    fn zero_pages_and_huge_pages_of_anonymous_memory() {
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
        assert!(pagemap.dirty(map.range()).unwrap().is_empty(), "the zero page is no copy");
        map.advise(HUGE_PAGE_SIZE..2 * HUGE_PAGE_SIZE, Advice::HugePage).unwrap();
        write_page(&map, 600);
        let found = pagemap.dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), (512..1024).collect::<Vec<_>>(), "one store, one huge page");
    }

    #[test]
    fn guard_regions_are_not_dirty() {
        let length = 1 << 20;
        let file = template(length);
        let map = private_map(&file, length, PAGE_SIZE);
        (0..32).for_each(|page| write_page(&map, page));
        map.advise(8 * PAGE_SIZE..16 * PAGE_SIZE, Advice::GuardInstall).unwrap();
        map.advise(64 * PAGE_SIZE..80 * PAGE_SIZE, Advice::GuardInstall).unwrap();
        let pagemap = Pagemap::this_process().unwrap();
        let found = pagemap.dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), (0..8).chain(16..32).collect::<Vec<_>>());
        assert!(pagemap.entries(map.range()).unwrap()[64..80].iter().all(|e| e.is_guard() && e.is_marker()));
    }

    #[test]
    fn a_forbidden_part_keeps_its_copies() {
        let length = 1 << 20;
        let file = template(length);
        let map = private_map(&file, length, PAGE_SIZE);
        (10..20).for_each(|page| write_page(&map, page));
        map.forbid(12 * PAGE_SIZE..14 * PAGE_SIZE).unwrap();
        let found = Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), (10..20).collect::<Vec<_>>());
    }

    #[test]
    fn an_unmapped_part_is_no_longer_dirty() {
        let length = 1 << 20;
        let file = template(length);
        let map = private_map(&file, length, PAGE_SIZE);
        (10..20).for_each(|page| write_page(&map, page));
        let hole = map.address() + 12 * PAGE_SIZE;
        // SAFETY: MAP_FIXED puts an inaccessible page where this mapping had memory that nobody points to.
        unsafe {
            let (none, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
            let at = libc::mmap(hole as *mut _, 3 * PAGE_SIZE as usize, none, flags, -1, 0);
            assert_eq!(at as u64, hole);
        }
        let found = Pagemap::this_process().unwrap().dirty(map.range()).unwrap();
        assert_eq!(pages(&map, &found), vec![10, 11, 15, 16, 17, 18, 19]);
    }

    #[test]
    fn entries_know_frames_and_owners() {
        let length = 64 * PAGE_SIZE;
        let file = template(length);
        let map = private_map(&file, length, PAGE_SIZE);
        map.load(MemoryOffset::new(0)).unwrap();
        write_page(&map, 5);
        let entries = Pagemap::this_process().unwrap().entries(map.range()).unwrap();
        assert_eq!(entries.len(), 64);
        assert!(entries[0].is_present() && entries[0].is_file());
        assert!(entries[5].is_present() && !entries[5].is_file() && entries[5].is_exclusive());
        assert!(entries[5].frame().is_some() && entries[5].frame() != entries[0].frame());
    }

    #[test]
    fn a_process_that_is_gone_is_not_found() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pagemap = Pagemap::open(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(pagemap.entries(0x1000..0x2000).unwrap_err().code(), crate::error::Code::NotFound);
        assert_eq!(Pagemap::open(child.id()).unwrap_err().code(), crate::error::Code::NotFound);
    }

    /// Arms asynchronous write protection by userfaultfd over a mapping; disarmed when the file is closed.
    fn arm_write_protection(map: &Mapping) -> File {
        use std::os::fd::FromRawFd;
        const API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
        const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
        const WRITE_PROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
        let (unpopulated, asynchronous) = (1u64 << 13, 1u64 << 15);
        let range = map.range();
        let length = range.end - range.start;
        let mut api = [0xaa, unpopulated | asynchronous, 0];
        let mut register = [range.start, length, 2, 0];
        let mut protect = [range.start, length, 1];
        // SAFETY: each argument is an array of as many u64 as the request's number names bytes; the range is
        // the mapping's own, and protecting it changes no byte of it.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) as i32;
            assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
            let file = File::from_raw_fd(fd);
            for (request, argument) in [
                (API, api.as_mut_ptr()),
                (REGISTER, register.as_mut_ptr()),
                (WRITE_PROTECT, protect.as_mut_ptr()),
            ] {
                let done = libc::ioctl(fd, request, argument);
                assert_eq!(done, 0, "{request:#x}: {}", io::Error::last_os_error());
            }
            file
        }
    }

    #[test]
    fn write_protection_markers_are_not_dirty() {
        let length = 16 << 20;
        let file = template(length);
        let map = private_map(&file, length, HUGE_PAGE_SIZE);
        let written = scattered(100, length / PAGE_SIZE, 5);
        written.iter().for_each(|page| write_page(&map, *page));
        let _armed = arm_write_protection(&map);
        let pagemap = Pagemap::this_process().unwrap();
        let swapped = Query { any: Categories::SWAPPED, ..Query::default() };
        let look_swapped: u64 =
            pagemap.scan(map.range(), &swapped).unwrap().iter().map(|r| r.range.end - r.range.start).sum();
        assert!(look_swapped > 100 * PAGE_SIZE, "the markers are there");
        assert_eq!(pages(&map, &pagemap.dirty(map.range()).unwrap()), Vec::from_iter(written.clone()));
        // A write below the protection: one more page.
        let clean = (0..).find(|page| !written.contains(page)).unwrap();
        write_page(&map, clean);
        let found = pages(&map, &pagemap.dirty(map.range()).unwrap());
        assert_eq!(found.len(), 101);
        assert!(found.contains(&clean));
    }

    #[test]
    fn ranges_are_whole_pages() {
        let pagemap = Pagemap::this_process().unwrap();
        assert!(pagemap.dirty(1..4096).is_err());
        let (start, end) = (8192, 4096);
        assert!(pagemap.entries(start..end).is_err(), "ends before it starts");
        assert!(pagemap.entries(4096..4096).unwrap().is_empty());
    }
}
