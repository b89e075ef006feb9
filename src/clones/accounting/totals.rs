//! Sums over all clones, and the ratios between them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use serde::Serialize;

use super::process::{Measured, runs_kvm};
use super::records::{Records, is_simulated, record_of};
use super::shares::Parts;
use crate::clones::find::CloneProcess;
use crate::clones::ranges::joined;
use crate::error::Result;
use crate::store::{BLOCK_SIZE, Digest, Template};
use crate::sys::process::{ProcessId, procfs};
use crate::units::{Bytes, PAGE_SIZE, PageCount, approximate, to_usize};

/// Sums over all clones, in bytes. Each page frame is counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Number of clones.
    pub clones: u64,
    /// Size of all template mappings: the memory that the clones see.
    pub mapped_bytes: Bytes,
    /// Memory of the same clones, if each had restored its own copy of the template's data.
    pub copied_bytes: Bytes,
    /// Template pages in RAM, shared by all clones.
    pub template_bytes: Bytes,
    /// Page cache of the store's files, and memory of the supervisors and servers.
    pub store_cache_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in RAM, as distinct frames.
    pub private_bytes: Bytes,
    /// Page tables of the clones, including those of KVM.
    pub page_table_bytes: Bytes,
    /// Memory of the clones outside template mappings, as distinct frames.
    pub overhead_bytes: Bytes,
    /// Disks and jails of the clones in a file system without other storage.
    pub disk_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in swap. They take no RAM.
    pub swap_bytes: Bytes,
    /// Sum of template pages, store cache, private pages, page tables, overhead and disks.
    pub host_bytes: Bytes,
    /// RAM that another clone takes, as the mean of the present clones; null without clones.
    pub bytes_per_further_clone: Option<Bytes>,
    /// Number of further clones that fit into 1 GiB; null without clones.
    pub clones_per_gib: Option<f64>,
    /// `copied_bytes / host_bytes`; null without clones.
    pub sharing_ratio: Option<f64>,
    /// Same ratio, if each clone had copied only the touched pages; null unless the touched pages of all clones are
    /// known.
    pub lazy_ratio: Option<f64>,
    /// `mapped_bytes / host_bytes`; null without clones.
    pub overcommit_ratio: Option<f64>,
}

/// Memory of the same clones without sharing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Template data and new pages, if each clone had copied all data at its start.
    restored: Bytes,
    /// Touched pages, if each clone had copied only these; known for simulated clones.
    touched: Option<Bytes>,
}

impl Copied {
    /// Sums the memory that the clones would take without sharing.
    ///
    /// # Errors
    /// Returns an error if the tables of a template cannot be read.
    pub(super) fn of(
        clones: &[(CloneProcess, Measured)],
        templates: &BTreeMap<Digest, Template>,
        records: &Records,
    ) -> Result<Copied> {
        let mut copied = Copied { restored: Bytes::ZERO, touched: Some(Bytes::ZERO) };
        let mut data = DataPages::default();
        for (clone, measured) in clones {
            for ((digest, index), ranges) in mapped_file_ranges(clone) {
                if let Some(template) = templates.get(&digest) {
                    for Range { start, end } in ranges {
                        copied.restored += data.of(template, index)?.bytes(start..end);
                    }
                }
            }
            copied.restored += new_pages(clone, measured, templates, &mut data)?.bytes();
            let touched = record_of(clone, records).and_then(|entry| entry.touched);
            copied.touched = copied.touched.zip(touched).map(|(sum, touched)| {
                sum + PageCount::new(touched.read_pages + touched.written_pages).bytes()
            });
        }
        Ok(copied)
    }
}

/// The data pages of the files that clones map.
#[derive(Default)]
struct DataPages(BTreeMap<(Digest, usize), FileData>);

impl DataPages {
    fn of(&mut self, template: &Template, index: usize) -> Result<&mut FileData> {
        use std::collections::btree_map::Entry;
        match self.0.entry((*template.digest(), index)) {
            Entry::Occupied(data) => Ok(data.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(FileData::of(template, index)?)),
        }
    }
}

/// The data pages of one file.
struct FileData {
    /// One mask of pages for each block.
    masks: Vec<u16>,
    /// Known sizes. Many clones map the same range.
    sizes: BTreeMap<(u64, u64), Bytes>,
}

impl FileData {
    fn of(template: &Template, index: usize) -> Result<FileData> {
        let blocks = template.files()[index].size.get().div_ceil(BLOCK_SIZE);
        let masks = (0..blocks).map(|block| template.data_pages(index, block)).collect::<Result<_>>()?;
        Ok(FileData { masks, sizes: BTreeMap::new() })
    }

    /// Returns true if the page at this offset has data. Pages behind the end of the file have none.
    fn has(&self, offset: u64) -> bool {
        let mask = self.masks.get(to_usize(offset / BLOCK_SIZE)).copied().unwrap_or(0);
        mask >> (offset % BLOCK_SIZE / PAGE_SIZE) & 1 == 1
    }

    fn bytes(&mut self, range: Range<u64>) -> Bytes {
        let key = (range.start, range.end);
        if let Some(bytes) = self.sizes.get(&key) {
            return *bytes;
        }
        let pages = range.step_by(to_usize(PAGE_SIZE)).filter(|offset| self.has(*offset)).count();
        let bytes = PageCount::new(pages as u64).bytes();
        self.sizes.insert(key, bytes);
        bytes
    }
}

type FileRanges = BTreeMap<(Digest, usize), Vec<Range<u64>>>;

/// Returns the ranges of each file that a clone maps, in order, with overlaps merged.
fn mapped_file_ranges(clone: &CloneProcess) -> FileRanges {
    let mut ranges = FileRanges::new();
    for map in &clone.maps {
        let start = map.offset.get();
        ranges.entry((map.digest, map.index)).or_default().push(start..start + map.length.get());
    }
    ranges.into_iter().map(|(file, list)| (file, joined(list))).collect()
}

/// Counts the private pages that are zero in the template or replaced. A restored copy would also need this memory.
fn new_pages(
    clone: &CloneProcess,
    measured: &Measured,
    templates: &BTreeMap<Digest, Template>,
    data: &mut DataPages,
) -> Result<PageCount> {
    let replaced = measured.replaced.iter().flat_map(|(_, private)| private);
    let mut new: u64 = replaced.filter(|range| !range.swapped).map(|range| range.pages()).sum();
    for (map, copied) in clone.maps.iter().zip(&measured.copied) {
        let Some(template) = templates.get(&map.digest) else { continue };
        let data = data.of(template, map.index)?;
        for copy in copied.iter().filter(|copy| !copy.swapped) {
            let first = map.offset.get() + copy.range.start - map.start;
            let offsets = (0..copy.pages()).map(|page| first + page * PAGE_SIZE);
            new += offsets.filter(|offset| !data.has(*offset)).count() as u64;
        }
    }
    Ok(PageCount::new(new))
}

/// The second-level page tables of KVM that each clone with a virtual machine has.
pub(super) type KvmTables = HashMap<ProcessId, Bytes>;

/// Splits the second-level page tables of KVM between the clones with a virtual machine. The kernel has this figure only
/// for the whole host. A simulated clone has no virtual machine.
///
/// # Errors
/// Returns an error if the memory figures of the host cannot be read.
pub(super) fn kvm_tables<'a>(
    clones: impl Iterator<Item = &'a CloneProcess>,
    records: &Records,
) -> Result<KvmTables> {
    let tables = procfs::meminfo("SecPageTables")?.unwrap_or_default();
    if tables == Bytes::ZERO {
        return Ok(KvmTables::new());
    }
    let with_kvm = clones.filter(|clone| !is_simulated(clone, records) && runs_kvm(clone.pid));
    let processes: Vec<ProcessId> = with_kvm.map(CloneProcess::process).collect();
    let shares = tables.split(processes.len());
    Ok(processes.into_iter().zip(shares).collect())
}

impl Totals {
    /// Computes all sums and ratios. `parts` are those of the whole.
    pub(super) fn new(clones: &[(CloneProcess, Measured)], parts: Parts, copied: Copied) -> Totals {
        let sum =
            |part: fn(&Measured) -> Bytes| clones.iter().map(|(_, measured)| part(measured)).sum::<Bytes>();
        let Parts {
            template_bytes,
            store_cache_bytes,
            private_bytes,
            page_table_bytes,
            overhead_bytes,
            disk_bytes,
        } = parts;
        let mut totals = Totals {
            clones: clones.len() as u64,
            mapped_bytes: sum(|m| m.memory.mapped_bytes),
            template_bytes,
            store_cache_bytes,
            private_bytes,
            page_table_bytes,
            overhead_bytes,
            disk_bytes,
            swap_bytes: sum(|m| m.memory.swap_bytes),
            ..Totals::default()
        };
        totals.conclude(copied);
        totals
    }

    fn conclude(&mut self, copied: Copied) {
        let besides = self.page_table_bytes + self.overhead_bytes + self.disk_bytes;
        self.copied_bytes = copied.restored + besides;
        self.host_bytes = self.template_bytes + self.store_cache_bytes + self.of_the_clones();
        if self.clones == 0 {
            return;
        }
        let ratio = |part: Bytes| Some(approximate(part.get()) / approximate(self.host_bytes.get()));
        self.sharing_ratio = ratio(self.copied_bytes);
        self.lazy_ratio = copied.touched.and_then(|touched| ratio(touched + besides));
        self.overcommit_ratio = ratio(self.mapped_bytes);
        let further = self.of_the_clones().get() / self.clones;
        self.bytes_per_further_clone = Some(Bytes::new(further));
        self.clones_per_gib = (further > 0).then(|| approximate(1 << 30) / approximate(further));
    }

    /// Returns the memory of the clones, without the memory that they share.
    pub fn of_the_clones(&self) -> Bytes {
        self.private_bytes + self.page_table_bytes + self.overhead_bytes + self.disk_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_the_parts_and_computes_the_ratios() {
        let mut totals = Totals {
            clones: 4,
            mapped_bytes: Bytes::new(4 << 30),
            template_bytes: Bytes::new(100),
            store_cache_bytes: Bytes::new(10),
            private_bytes: Bytes::new(40),
            page_table_bytes: Bytes::new(8),
            overhead_bytes: Bytes::new(32),
            disk_bytes: Bytes::new(10),
            ..Totals::default()
        };
        totals.conclude(Copied { restored: Bytes::new(350), touched: None });
        assert_eq!(totals.host_bytes.get(), 200);
        assert_eq!(totals.copied_bytes.get(), 400);
        assert_eq!(totals.sharing_ratio, Some(2.0));
        assert_eq!(totals.lazy_ratio, None);
        assert_eq!(totals.bytes_per_further_clone, Some(Bytes::new(22)));
    }

    #[test]
    fn has_no_ratios_without_clones() {
        let mut totals = Totals { template_bytes: Bytes::new(100), ..Totals::default() };
        totals.conclude(Copied::default());
        assert_eq!((totals.sharing_ratio, totals.bytes_per_further_clone), (None, None));
    }
}
