//! Comparison of some pages of a process with the template.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::clones::accounting::{Measured, Originals};
use crate::clones::find::{CloneProcess, Inodes};
use crate::error::{Error, Result};
use crate::store::{Digest, Template};
use crate::sys::memory::pagemap::{Categories, DirtyRange, Pagemap, Query};
use crate::sys::memory::process_memory::ProcessMemory;
use crate::units::{PAGE_SIZE, to_usize};

/// Maximum number of clean pages, and of copied pages, of a process that are compared.
const MAX_PAGES: u64 = 256;

/// The result of a comparison.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Samples {
    /// Number of compared clean pages.
    pub clean: u64,
    /// The first clean page with other bytes than the template: the file and the page.
    pub different: Option<(String, u64)>,
    /// Number of compared copied pages, with pages of memory that has replaced template pages.
    pub copied: u64,
    /// Compared copied pages that are equal to their page of the template.
    pub equal: u64,
}

/// Page-aligned addresses of one mapping, given by its index, or of replaced pages next to it.
type Part = (usize, Range<u64>);

impl Samples {
    /// Reads pages that are spread evenly over the clean and over the copied pages of a process.
    ///
    /// # Errors
    /// Returns an error if the process or the store cannot be read.
    pub fn take(clone: &CloneProcess, measured: &Measured, inodes: &Inodes) -> Result<Samples> {
        let (pagemap, memory) = (Pagemap::open(clone.pid)?, ProcessMemory::open(clone.pid)?);
        let mut pages = Pages { clone, inodes, templates: BTreeMap::new(), originals: Originals::default() };
        let (mut samples, mut clean, mut copied) = (Samples::default(), vec![], vec![]);
        for (index, (map, copies)) in clone.maps.iter().zip(&measured.copied).enumerate() {
            // Zero memory shares no page.
            if !map.anonymous {
                copied.extend(present(copies).map(|range| (index, range)));
                let found = pagemap.scan(map.range(), &clean_pages())?;
                clean.extend(found.into_iter().map(|region| (index, region.range)));
            }
        }
        for (replaced, private) in measured.replaced.iter().filter(|(replaced, _)| replaced.is_certain) {
            copied.extend(present(private).map(|range| (replaced.map, range)));
        }
        for (index, address) in spread(&copied) {
            if let Some(is_equal) = pages.is_equal(&memory, index, address)? {
                samples.copied += 1;
                samples.equal += u64::from(is_equal);
            }
        }
        for (index, address) in spread(&clean) {
            let is_equal = pages.is_equal(&memory, index, address)?;
            // The process may have written to the page since the first scan. A read leaves a clean page clean.
            if pagemap.scan(address..address + PAGE_SIZE, &clean_pages())?.is_empty() {
                continue;
            }
            samples.clean += 1;
            if is_equal != Some(true) && samples.different.is_none() {
                let map = &clone.maps[index];
                let page = (map.offset.get() + address - map.start) / PAGE_SIZE;
                samples.different = Some((map.file.clone(), page));
            }
        }
        Ok(samples)
    }
}

/// The pages that the templates of a process have.
struct Pages<'a> {
    clone: &'a CloneProcess,
    inodes: &'a Inodes,
    templates: BTreeMap<Digest, Template>,
    originals: Originals,
}

impl Pages<'_> {
    /// Compares a page of the process with the template. Returns `None` if the process does not map the page any more.
    fn is_equal(&mut self, memory: &ProcessMemory, index: usize, address: u64) -> Result<Option<bool>> {
        let map = &self.clone.maps[index];
        if !self.templates.contains_key(&map.digest) {
            let store = self.inodes.store(map.mount);
            let store = store.ok_or_else(|| Error::failed("the store of the mapping is unknown"))?;
            self.templates.insert(map.digest, store.template(&map.digest)?);
        }
        let mut page = vec![0; to_usize(PAGE_SIZE)];
        if !memory.read(address, &mut page)? {
            return Ok(None);
        }
        Ok(Some(page == self.originals.page(&self.templates[&map.digest], map, address)?))
    }
}

fn present(copies: &[DirtyRange]) -> impl Iterator<Item = Range<u64>> + '_ {
    copies.iter().filter(|copy| !copy.swapped).map(|copy| copy.range.clone())
}

fn clean_pages() -> Query {
    Query { all: Categories::FILE | Categories::PRESENT, ..Query::default() }
}

/// Returns at most [`MAX_PAGES`] pages, spread evenly over the pages of these parts.
fn spread(parts: &[Part]) -> Vec<(usize, u64)> {
    let pages: u64 = parts.iter().map(|(_, range)| (range.end - range.start) / PAGE_SIZE).sum();
    let step = pages.div_ceil(MAX_PAGES).max(1);
    let of_part = |(index, range): &Part| {
        let index = *index;
        range.clone().step_by(to_usize(PAGE_SIZE)).map(move |address| (index, address))
    };
    parts.iter().flat_map(of_part).step_by(to_usize(step)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_all_parts() {
        let pages = |parts: &[Range<u64>]| -> Vec<(usize, u64)> {
            let bytes = parts.iter().map(|r| r.start * PAGE_SIZE..r.end * PAGE_SIZE);
            let all = spread(&bytes.enumerate().collect::<Vec<_>>());
            all.into_iter().map(|(index, address)| (index, address / PAGE_SIZE)).collect()
        };
        assert_eq!(pages(&[]), []);
        assert_eq!(pages(&[3..5, 9..10]), [(0, 3), (0, 4), (1, 9)]);
        let many = pages(&[0..1000, 5000..6000]);
        assert_eq!((many.len(), many[0], many[1]), (250, (0, 0), (0, 8)));
        assert_eq!(many.last(), Some(&(1, 5992)));
    }
}
