//! State of the pages of a process (present, copied, swapped) from `/proc/PID/pagemap`: with the ioctl `PAGEMAP_SCAN`
//! (page ranges, fast) and from the 64-bit entries (frames, exact per page).
//!
//! **A copied page is a dirty page.** In a private file mapping, a page that is present and does not belong to the file
//! was copied by a write (copy-on-write). [`Pagemap::dirty`] lists these pages of any process from outside, without
//! prior setup such as soft-dirty bits or userfaultfd.

use std::fs::File;
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::sys::process::{procfs, tasks};
use crate::units::{Bytes, PAGE_SIZE};

mod entry;
mod written;

pub use entry::Entry;

/// A set of `PAGEMAP_SCAN` page categories.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// The mapping is registered with a userfaultfd for asynchronous write protection.
    const WRITE_TRACKED: Categories = Categories(1);
    /// The page is not write-protected by a userfaultfd.
    const WRITTEN: Categories = Categories(2);
    /// The page belongs to a file or to shared memory.
    pub const FILE: Categories = Categories(4);
    /// The page is present in memory and in the page table.
    pub const PRESENT: Categories = Categories(8);
    /// The page is in swap, or its entry is a marker in the format of a swap entry.
    pub const SWAPPED: Categories = Categories(16);
    /// The page is the shared zero page.
    pub const ZERO: Categories = Categories(32);
    /// The page is mapped by a PMD (huge page).
    pub const HUGE: Categories = Categories(64);
    /// The page is in a guard region (reported since Linux 6.15).
    pub const GUARD: Categories = Categories(256);

    /// Returns true if every category of `other` is in this set.
    pub const fn contains(self, other: Categories) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns true if a category of `other` is in this set.
    pub const fn intersects(self, other: Categories) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Categories {
    type Output = Categories;
    fn bitor(self, other: Categories) -> Categories {
        Categories(self.0 | other.0)
    }
}

/// The page filter of a scan and the categories to report. A page matches if it has all categories of `all`, none of
/// `none`, and at least one of `any` (unless `any` is empty).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Query {
    /// Categories that a page must all have.
    pub all: Categories,
    /// Categories that a page must not have.
    pub none: Categories,
    /// Categories of which a page must have at least one.
    pub any: Categories,
    /// Categories to report. Neighbouring pages with different reported categories are separate regions.
    pub report: Categories,
    /// True to write-protect the matching pages by a userfaultfd.
    pub protect: bool,
}

/// Consecutive pages with the same reported categories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Page-aligned address range.
    pub range: Range<u64>,
    /// The reported categories of the pages.
    pub categories: Categories,
}

/// Consecutive copied pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyRange {
    /// Page-aligned address range.
    pub range: Range<u64>,
    /// True if the copies are in swap and not in memory.
    pub swapped: bool,
}

impl DirtyRange {
    /// Returns the number of 4 KiB pages.
    pub fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE_SIZE
    }
}

/// The pages of a private file mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FilePages {
    /// Copied pages.
    pub dirty: Vec<DirtyRange>,
    /// Pages of the file that the page tables map.
    pub clean: Bytes,
    /// Part of `clean` that PMDs map (huge pages).
    pub clean_huge: Bytes,
}

/// Categories of which a copied page has none.
const NOT_COPIED: Categories = Categories(Categories::FILE.0 | Categories::ZERO.0 | Categories::GUARD.0);

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

/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`: write-protects the pages that match; fails if a mapping in the range is
/// not registered for that.
const PROTECT: u64 = 3;

/// Maximum number of regions per `PAGEMAP_SCAN` call.
const REGIONS_PER_CALL: usize = 1024;

/// Maximum number of entries per read.
const ENTRIES_PER_READ: usize = 8192;

static SCANNED_PAGES: AtomicU64 = AtomicU64::new(0);
static ENTRY_READS: AtomicU64 = AtomicU64::new(0);

/// Work of all pagemaps of this process since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Size of the scanned address ranges, in pages.
    pub scanned_pages: u64,
    /// Number of read(2) calls for entries.
    pub entry_reads: u64,
}

/// Returns the work since the start of this process.
pub fn work() -> Work {
    Work {
        scanned_pages: SCANNED_PAGES.load(Ordering::Relaxed),
        entry_reads: ENTRY_READS.load(Ordering::Relaxed),
    }
}

/// An open pagemap of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// For messages; `None` for this process.
    pid: Option<u32>,
}

impl Pagemap {
    /// Opens the pagemap of this process. After a fork, the child still reads the pagemap of the parent.
    ///
    /// # Errors
    /// Returns an error if `/proc/self/pagemap` cannot be opened.
    pub fn this_process() -> Result<Pagemap> {
        let path = "/proc/self/pagemap";
        let file = File::open(path).map_err(|e| Error::io("cannot open pagemap", path, e))?;
        Ok(Pagemap { file, pid: None })
    }

    /// Opens the pagemap of a process. The value refers to that process even after its pid is reused.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the process has exited, and
    /// [`Code::Failed`](crate::error::Code::Failed) without permission to inspect the process.
    pub fn open(pid: u32) -> Result<Pagemap> {
        let opened = tasks::through_memory(pid, |directory| {
            let file = File::open(directory.join("pagemap"))?;
            Ok(tasks::has_memory(directory)?.then_some(file))
        });
        let path = || format!("/proc/{pid}/pagemap");
        let file = opened.map_err(|e| Error::io("cannot open pagemap", path(), e))?;
        Ok(Pagemap { file: file.ok_or_else(|| exited(Some(pid)))?, pid: Some(pid) })
    }

    /// Same as [`Pagemap::open`], also returns fields of `/proc/PID/status`.
    ///
    /// # Errors
    /// Same as [`Pagemap::open`].
    pub fn open_with_status(pid: u32) -> Result<(Pagemap, procfs::Status)> {
        let opened = tasks::through_memory(pid, |directory| {
            let file = File::open(directory.join("pagemap"))?;
            Ok(procfs::status_with_memory(directory)?.map(|status| (file, status)))
        });
        let path = || format!("/proc/{pid}/pagemap");
        let opened = opened.map_err(|e| Error::io("cannot open pagemap", path(), e))?;
        let (file, status) = opened.ok_or_else(|| exited(Some(pid)))?;
        Ok((Pagemap { file, pid: Some(pid) }, status))
    }

    fn path(&self) -> String {
        self.pid.map_or_else(|| "/proc/self/pagemap".to_owned(), |pid| format!("/proc/{pid}/pagemap"))
    }

    fn failed(&self, what: &str, cause: io::Error) -> Error {
        match cause.raw_os_error() {
            Some(libc::ESRCH) => exited(self.pid),
            Some(libc::ENOTTY) => {
                Error::io(what, self.path(), cause).hint("use Linux 6.7 or later, which has PAGEMAP_SCAN")
            }
            _ => Error::io(what, self.path(), cause),
        }
    }

    /// Returns the matching pages of the page-aligned `range` in ascending order. Consecutive pages with equal
    /// categories form one region.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the range is not page-aligned, and an error if the ioctl
    /// fails.
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
        SCANNED_PAGES.fetch_add((range.end - range.start) / PAGE_SIZE, Ordering::Relaxed);
        let mut regions = vec![RawRegion::default(); REGIONS_PER_CALL];
        let mut start = range.start;
        while start < range.end {
            let count = self.scan_once(start..range.end, query, &mut regions)?;
            for raw in &regions[..count] {
                each(Region { range: raw.start..raw.end, categories: Categories(raw.categories) });
            }
            // Fewer regions than the vector holds: the walk is complete. `walk_end` is not used, because it may point
            // into a finished range. For a full vector the end of the last region is an equally good start, because the
            // pages between the two addresses did not match.
            if count < regions.len() {
                return Ok(());
            }
            start = regions[count - 1].end;
        }
        Ok(())
    }

    fn scan_once(&self, range: Range<u64>, query: &Query, regions: &mut [RawRegion]) -> Result<usize> {
        let supported = supported_categories();
        let (all, none) = (query.all.0 & supported, query.none.0 & supported);
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: if query.protect { PROTECT } else { 0 },
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: none,
            category_mask: all | none,
            category_anyof_mask: query.any.0 & supported,
            return_mask: query.report.0 & supported,
        };
        loop {
            // SAFETY: the argument has the kernel's layout and its `size` field is correct; `vec` points to `vec_len`
            // regions that are borrowed mutably for the call.
            let done = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut argument) };
            if let Ok(count) = usize::try_from(done) {
                return Ok(count.min(regions.len()));
            }
            let cause = io::Error::last_os_error();
            if cause.kind() != io::ErrorKind::Interrupted {
                return Err(self.failed("cannot scan pages", cause));
            }
        }
    }

    /// Returns the copied pages of `range`, present or in swap, in ascending order. The result needs no prior setup
    /// and, with `CAP_SYS_ADMIN`, is exact. Markers of userfaultfd and guard regions look like swap to a scan; they are
    /// identified by their pagemap entries, whose content the kernel shows only with `CAP_SYS_ADMIN`. Without it, they
    /// count as copied pages in swap.
    ///
    /// # Errors
    /// Same as [`Pagemap::scan`] and [`Pagemap::entries`].
    pub fn dirty(&self, range: Range<u64>) -> Result<Vec<DirtyRange>> {
        let query = Query {
            none: NOT_COPIED,
            any: Categories::PRESENT | Categories::SWAPPED,
            report: Categories::SWAPPED,
            ..Query::default()
        };
        let mut dirty: Vec<DirtyRange> = Vec::new();
        for region in self.scan(range, &query)? {
            self.add_dirty(region, &mut dirty)?;
        }
        Ok(dirty)
    }

    /// Adds the pages of a region without a category of [`NOT_COPIED`].
    fn add_dirty(&self, region: Region, dirty: &mut Vec<DirtyRange>) -> Result<()> {
        if !region.categories.contains(Categories::SWAPPED) {
            push(dirty, region.range, false);
            return Ok(());
        }
        self.each_entry(region.range, |address, entry| {
            // The page may have been swapped in since the scan.
            let copied = !entry.is_file() && !entry.is_guard() && !entry.is_marker();
            if copied && (entry.is_present() || entry.is_swap()) {
                push(dirty, address..address + PAGE_SIZE, entry.swap_slot().is_some());
            }
        })
    }

    /// Returns the copied pages of a private file mapping, as [`Pagemap::dirty`] does, and the size of its clean pages,
    /// by one scan.
    ///
    /// # Errors
    /// Same as [`Pagemap::dirty`].
    pub fn of_file_mapping(&self, range: Range<u64>) -> Result<FilePages> {
        let query = Query {
            any: Categories::PRESENT | Categories::SWAPPED,
            report: Categories::PRESENT | Categories::SWAPPED | Categories::HUGE | NOT_COPIED,
            ..Query::default()
        };
        let mut pages = FilePages::default();
        for region in self.scan(range, &query)? {
            if region.categories.contains(Categories::FILE | Categories::PRESENT) {
                let bytes = Bytes::new(region.range.end - region.range.start);
                pages.clean += bytes;
                if region.categories.contains(Categories::HUGE) {
                    pages.clean_huge += bytes;
                }
            } else if !region.categories.intersects(NOT_COPIED) {
                self.add_dirty(region, &mut pages.dirty)?;
            }
        }
        Ok(pages)
    }

    /// Returns the entries of all pages of `range` in ascending order.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the range is not page-aligned, and
    /// [`Code::NotFound`](crate::error::Code::NotFound) if the process has exited.
    pub fn entries(&self, range: Range<u64>) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.each_entry(range, |_, entry| entries.push(entry))?;
        Ok(entries)
    }

    /// Calls `each` with the address and the entry of every page of `range` in ascending order, with bounded memory.
    ///
    /// # Errors
    /// Same as [`Pagemap::entries`].
    pub fn each_entry(&self, range: Range<u64>, mut each: impl FnMut(u64, Entry)) -> Result<()> {
        check_pages(&range)?;
        let pages = (range.end - range.start) / PAGE_SIZE;
        let mut buffer = vec![0u8; 8 * (pages as usize).min(ENTRIES_PER_READ)];
        let mut address = range.start;
        while address < range.end {
            let wanted = buffer.len().min(8 * ((range.end - address) / PAGE_SIZE) as usize);
            ENTRY_READS.fetch_add(1, Ordering::Relaxed);
            let got = match self.file.read_at(&mut buffer[..wanted], address / PAGE_SIZE * 8) {
                Ok(got) => got & !7,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed("cannot read pagemap", e)),
            };
            if got == 0 {
                return Err(exited(self.pid));
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
    let is_aligned = range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE);
    if is_aligned && range.start <= range.end {
        return Ok(());
    }
    Err(Error::usage(format!("invalid address range {:#x}-{:#x}: not page-aligned", range.start, range.end)))
}

fn exited(pid: Option<u32>) -> Error {
    match pid {
        Some(pid) => Error::not_found(format!("process {pid} has exited")),
        None => Error::not_found("the process of this pagemap has exited"),
    }
}

/// Returns all categories that the running kernel supports. The kernel rejects a call with unsupported categories. Only
/// GUARD (Linux 6.15) is newer than the oldest kernel that Stencil supports.
fn supported_categories() -> u64 {
    use std::sync::OnceLock;
    static SUPPORTED: OnceLock<u64> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
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
        // SAFETY: the argument has the kernel's layout and its `size` field is correct; there is no result vector.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &mut argument) };
        if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            all & !Categories::GUARD.0
        } else {
            all
        }
    })
}

#[cfg(test)]
mod tests;
