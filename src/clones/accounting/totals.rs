//! The host's sums and the ratios that follow from them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::frames::Distinct;
use super::process::Measured;
use super::{Known, TemplateMemory, record_of};
use crate::clones::find::CloneProcess;
use crate::error::Result;
use crate::store::{BLOCK_SIZE, Digest, Template};
use crate::sys::{procfs, tasks};
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// Sums over all clones, in bytes; every frame once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Number of clones.
    pub clones: u64,
    /// Size of all template mappings: what the clones believe to have.
    pub mapped_bytes: Bytes,
    /// What the same clones would hold if each had restored its own copy of the template's data.
    pub copied_bytes: Bytes,
    /// Template pages in RAM, once for all.
    pub template_bytes: Bytes,
    /// Page cache of the store's files, and the memory of supervisors and servers.
    pub store_cache_bytes: Bytes,
    /// Copies of template pages in RAM, distinct frames.
    pub private_bytes: Bytes,
    /// Page tables of the clones, those of KVM included.
    pub page_table_bytes: Bytes,
    /// Memory of the clones outside template mappings, distinct frames.
    pub overhead_bytes: Bytes,
    /// Disks of the clones that lie in RAM and nowhere else.
    pub disk_bytes: Bytes,
    /// Copies in swap: no RAM.
    pub swap_bytes: Bytes,
    /// RAM that all this takes: template + store cache + private + page tables + overhead + disks.
    pub host_bytes: Bytes,
    /// RAM that one more clone like these takes; null without clones.
    pub bytes_per_further_clone: Option<Bytes>,
    /// How many more clones like these fit into a GiB; null without clones.
    pub clones_per_gib: Option<f64>,
    /// `copied_bytes / host_bytes`; null without clones.
    pub sharing_ratio: Option<f64>,
    /// The same against clones that copy only what they touch; null where that is not known of all.
    pub lazy_ratio: Option<f64>,
    /// `mapped_bytes / host_bytes`; null without clones.
    pub overcommit_ratio: Option<f64>,
}

/// What the same clones would cost without sharing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Template data and new pages, if each clone had copied all data at its start.
    restored: Bytes,
    /// Pages touched, if each clone had copied these alone; known for simulated clones.
    touched: Option<Bytes>,
}

impl Copied {
    /// Adds up the counterfactuals of all clones.
    ///
    /// # Errors
    /// When a template's tables cannot be read.
    pub(super) fn of(
        clones: &[(CloneProcess, Measured)],
        templates: &BTreeMap<Digest, Template>,
        known: &Known,
    ) -> Result<Copied> {
        let mut copied = Copied { restored: Bytes::ZERO, touched: Some(Bytes::ZERO) };
        let mut data = DataOfRanges::default();
        for (clone, measured) in clones {
            for ((digest, index), ranges) in mapped_file_ranges(clone) {
                if let Some(template) = templates.get(&digest) {
                    for (start, end) in ranges {
                        copied.restored += data.bytes(template, index, start, end)?;
                    }
                }
            }
            copied.restored += new_pages(clone, measured, templates)?.bytes();
            let touched = record_of(clone, known).and_then(|entry| entry.touched);
            copied.touched = copied.touched.zip(touched).map(|(sum, touched)| {
                sum + PageCount::new(touched.read_pages + touched.written_pages).bytes()
            });
        }
        Ok(copied)
    }
}

/// Data bytes of file ranges, remembered: a thousand clones map the same range.
#[derive(Default)]
struct DataOfRanges(BTreeMap<(Digest, usize, u64, u64), Bytes>);

impl DataOfRanges {
    fn bytes(&mut self, template: &Template, index: usize, start: u64, end: u64) -> Result<Bytes> {
        let key = (*template.digest(), index, start, end);
        if let Some(known) = self.0.get(&key) {
            return Ok(*known);
        }
        let mut pages = 0;
        for block in start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE) {
            let mask = u64::from(template.data_pages(index, block)?);
            for page in 0..BLOCK_SIZE / PAGE_SIZE {
                let offset = block * BLOCK_SIZE + page * PAGE_SIZE;
                pages += u64::from(mask >> page & 1 == 1 && (start..end).contains(&offset));
            }
        }
        let bytes = PageCount::new(pages).bytes();
        self.0.insert(key, bytes);
        Ok(bytes)
    }
}

type FileRanges = BTreeMap<(Digest, usize), Vec<(u64, u64)>>;

/// The ranges of each file that a clone maps, overlaps merged, cut at the file's mapped end.
fn mapped_file_ranges(clone: &CloneProcess) -> FileRanges {
    let mut ranges = FileRanges::new();
    for map in &clone.maps {
        let start = map.offset.get();
        ranges.entry((map.digest, map.index)).or_default().push((start, start + map.length.get()));
    }
    for list in ranges.values_mut() {
        list.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(list.len());
        for &(start, end) in list.iter() {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        *list = merged;
    }
    ranges
}

/// Copies of pages that are zero in the template: memory that a restored copy would have needed too.
fn new_pages(
    clone: &CloneProcess,
    measured: &Measured,
    templates: &BTreeMap<Digest, Template>,
) -> Result<PageCount> {
    let mut new = 0;
    for (map, dirty) in clone.maps.iter().zip(&measured.dirty) {
        let Some(template) = templates.get(&map.digest) else { continue };
        for copy in dirty.iter().filter(|copy| !copy.swapped) {
            let first = map.offset.get() + copy.range.start - map.start;
            for page in 0..copy.pages() {
                let offset = first + page * PAGE_SIZE;
                let mask = u64::from(template.data_pages(map.index, offset / BLOCK_SIZE)?);
                new += u64::from(mask >> (offset % BLOCK_SIZE / PAGE_SIZE) & 1 == 0);
            }
        }
    }
    Ok(PageCount::new(new))
}

impl Totals {
    /// Sums everything up.
    ///
    /// # Errors
    /// When the host's figures cannot be read.
    pub(super) fn new(
        clones: &[(CloneProcess, Measured)],
        templates: &[TemplateMemory],
        store_cache_bytes: Bytes,
        distinct: Distinct,
        copied: Copied,
    ) -> Result<Totals> {
        let sum =
            |part: fn(&Measured) -> Bytes| clones.iter().map(|(_, measured)| part(measured)).sum::<Bytes>();
        let kvm = if clones.iter().any(|(clone, _)| runs_kvm(clone.pid)) {
            procfs::meminfo("SecPageTables")?.unwrap_or_default()
        } else {
            Bytes::ZERO
        };
        let mut totals = Totals {
            clones: clones.len() as u64,
            mapped_bytes: sum(|m| m.memory.mapped_bytes),
            template_bytes: templates.iter().map(|template| template.resident_bytes).sum(),
            store_cache_bytes,
            private_bytes: distinct.private,
            page_table_bytes: sum(|m| m.memory.page_table_bytes) + kvm,
            overhead_bytes: distinct.overhead,
            disk_bytes: sum(|m| m.memory.disk_bytes),
            swap_bytes: sum(|m| m.memory.swap_bytes),
            ..Totals::default()
        };
        totals.conclude(copied);
        Ok(totals)
    }

    fn conclude(&mut self, copied: Copied) {
        let besides = self.page_table_bytes + self.overhead_bytes + self.disk_bytes;
        self.copied_bytes = copied.restored + besides;
        self.host_bytes = self.template_bytes + self.store_cache_bytes + self.of_the_clones();
        if self.clones == 0 {
            return;
        }
        let ratio = |part: Bytes| Some(part.get() as f64 / self.host_bytes.get() as f64);
        self.sharing_ratio = ratio(self.copied_bytes);
        self.lazy_ratio = copied.touched.and_then(|touched| ratio(touched + besides));
        self.overcommit_ratio = ratio(self.mapped_bytes);
        let further = self.of_the_clones().get() / self.clones;
        self.bytes_per_further_clone = Some(Bytes::new(further));
        self.clones_per_gib = (further > 0).then(|| (1u64 << 30) as f64 / further as f64);
    }

    /// What the clones take, without what they share.
    pub fn of_the_clones(&self) -> Bytes {
        self.private_bytes + self.page_table_bytes + self.overhead_bytes + self.disk_bytes
    }
}

/// True when the process holds a KVM machine; its second-level page tables are the kernel's
/// `SecPageTables`, which has no figure for each process.
fn runs_kvm(pid: u32) -> bool {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| std::fs::read_dir(thread.join("fd")));
    entries
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| target.as_os_str() == "anon_inode:kvm-vm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_the_sum_of_its_parts_and_ratios_follow() {
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
    fn without_clones_there_is_no_ratio() {
        let mut totals = Totals { template_bytes: Bytes::new(100), ..Totals::default() };
        totals.conclude(Copied::default());
        assert_eq!((totals.sharing_ratio, totals.bytes_per_further_clone), (None, None));
    }
}
