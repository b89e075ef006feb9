//! Which pages of its template a clone has copied, by position in the template.

use std::ops::Range;

use crate::clones::find::{CloneProcess, TemplateMapping};
use crate::clones::ranges::subtract;
use crate::error::{Code, Result};
use crate::sys::memory::pagemap::{Categories, DirtyRange, Pagemap, Query};
use crate::units::PAGE_SIZE;

/// State of a page of a template mapping. All other pages are not in the page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageState {
    /// The page tables map the page of the template.
    Clean,
    /// Copied, and in RAM.
    Copied,
    /// Copied, and in swap.
    Swapped,
}

/// The pages of all template mappings of a clone, ordered by template, file and offset and numbered from 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// Number of mapped pages.
    pub pages: u64,
    /// Ranges of pages that do not overlap.
    pub ranges: Vec<(Range<u64>, PageState)>,
}

impl Layout {
    /// Finds the state of each page. Returns `None` if the clone has exited.
    ///
    /// # Errors
    /// Returns an error if the process cannot be inspected.
    pub fn of(clone: &CloneProcess) -> Result<Option<Layout>> {
        let found = Pagemap::open(clone.pid).and_then(|pagemap| match clone.process().is_alive() {
            true => scan(&clone.maps, &pagemap).map(Some),
            false => Ok(None),
        });
        match found {
            Err(error) if error.code() == Code::NotFound => Ok(None),
            other => other,
        }
    }

    /// Adds a mapping behind the others.
    fn add(&mut self, map: &Range<u64>, dirty: &[DirtyRange], clean: &[Range<u64>]) {
        let first = self.pages;
        let pages = |range: &Range<u64>| {
            first + (range.start - map.start) / PAGE_SIZE..first + (range.end - map.start) / PAGE_SIZE
        };
        let state = |copy: &DirtyRange| if copy.swapped { PageState::Swapped } else { PageState::Copied };
        self.ranges.extend(dirty.iter().map(|copy| (pages(&copy.range), state(copy))));
        // A page may have been copied between the scans.
        let copies: Vec<Range<u64>> = dirty.iter().map(|copy| copy.range.clone()).collect();
        let clean = subtract(clean, &copies);
        self.ranges.extend(clean.iter().map(|range| (pages(range), PageState::Clean)));
        self.pages += (map.end - map.start) / PAGE_SIZE;
    }
}

fn scan(maps: &[TemplateMapping], pagemap: &Pagemap) -> Result<Layout> {
    let clean = Query { all: Categories::FILE | Categories::PRESENT, ..Query::default() };
    let mut ordered: Vec<&TemplateMapping> = maps.iter().collect();
    ordered.sort_by_key(|map| (map.digest, map.index, map.offset, map.start));
    let mut layout = Layout::default();
    for map in ordered {
        let clean = pagemap.scan(map.range(), &clean)?.into_iter().map(|region| region.range);
        let clean: Vec<Range<u64>> = clean.collect();
        layout.add(&map.range(), &pagemap.dirty(map.range())?, &clean);
    }
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_follow_each_other_and_copies_win() {
        let bytes = |range: Range<u64>| range.start * PAGE_SIZE..range.end * PAGE_SIZE;
        let copy = |range, swapped| DirtyRange { range: bytes(range), swapped };
        let mut layout = Layout::default();
        layout.add(&bytes(100..110), &[copy(102..104, false)], &[bytes(101..106)]);
        layout.add(&bytes(50..55), &[copy(50..51, true)], &[]);
        let expected = [
            (2..4, PageState::Copied),
            (1..2, PageState::Clean),
            (4..6, PageState::Clean),
            (10..11, PageState::Swapped),
        ];
        assert_eq!(layout, Layout { pages: 15, ranges: expected.to_vec() });
    }
}
