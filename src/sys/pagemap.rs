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

use super::tasks;
use crate::error::{Error, Result};
use crate::units::PAGE_SIZE;

mod entry;

pub use entry::Entry;

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
        let opened = tasks::through_memory(pid, |folder| {
            let file = File::open(folder.join("pagemap"))?;
            Ok(tasks::has_memory(folder)?.then_some(file))
        });
        let path = || format!("/proc/{pid}/pagemap");
        let file = opened.map_err(|e| Error::io("cannot open the pagemap", path(), e))?;
        Ok(Pagemap { file: file.ok_or_else(|| gone(Some(pid)))?, pid: Some(pid) })
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
                    push(&mut dirty, address..address + PAGE_SIZE, entry.swap_slot().is_some());
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
mod tests;
