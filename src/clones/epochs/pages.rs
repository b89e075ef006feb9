//! Sets of dirty pages, by mapping.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::clones::accounting::DirtyRange;
use crate::clones::find::CloneProcess;
use crate::clones::ranges::{joined, subtract};
use crate::error::Result;
use crate::store::Digest;
use crate::units::{PAGE_SIZE, PageCount};

/// Largest page number that a file offset has.
const MAX_PAGE: u64 = u64::MAX / PAGE_SIZE;

/// Pages of a file of a template that were dirty at an epoch and are pages of the template again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiscardedPages {
    /// File of the template.
    pub file: String,
    /// First page.
    pub first_page: u64,
    /// Number of pages.
    pub pages: PageCount,
}

/// Where dirty pages are. A mapping that was made again, elsewhere or of another template, is another place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    digest: Digest,
    file: String,
    /// Address of page 0 of the file if all of it were mapped; `None` if the addresses are unknown.
    base: Option<u64>,
    replaced: bool,
}

impl Place {
    fn of(range: &DirtyRange) -> Place {
        Place {
            digest: range.digest,
            file: range.file.clone(),
            base: range.address.map(|address| address.wrapping_sub(range.first_page.wrapping_mul(PAGE_SIZE))),
            replaced: range.replaced,
        }
    }
}

/// Pages of files, as sorted ranges that do not overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<(Place, Vec<(u64, u64)>)>", try_from = "Vec<(Place, Vec<(u64, u64)>)>")]
pub struct PageSet(BTreeMap<Place, Vec<Range<u64>>>);

impl From<PageSet> for Vec<(Place, Vec<(u64, u64)>)> {
    fn from(set: PageSet) -> Self {
        let pairs =
            |ranges: Vec<Range<u64>>| ranges.into_iter().map(|range| (range.start, range.end)).collect();
        set.0.into_iter().map(|(place, ranges)| (place, pairs(ranges))).collect()
    }
}

impl TryFrom<Vec<(Place, Vec<(u64, u64)>)>> for PageSet {
    type Error = &'static str;

    fn try_from(list: Vec<(Place, Vec<(u64, u64)>)>) -> std::result::Result<PageSet, &'static str> {
        let mut set = PageSet::default();
        for (place, pairs) in list {
            let ranges: Vec<Range<u64>> = pairs.into_iter().map(|(start, end)| start..end).collect();
            let are_sorted = ranges.is_sorted_by(|one, next| one.end < next.start);
            if !are_sorted || !ranges.iter().all(|range| range.start < range.end && range.end <= MAX_PAGE) {
                return Err("invalid page ranges");
            }
            set.0.insert(place, ranges);
        }
        Ok(set)
    }
}

impl PageSet {
    /// Creates the set of these dirty pages.
    pub fn of(ranges: &[DirtyRange]) -> PageSet {
        let mut places: BTreeMap<Place, Vec<Range<u64>>> = BTreeMap::new();
        for range in ranges {
            places.entry(Place::of(range)).or_default().push(pages(range));
        }
        PageSet(places.into_iter().map(|(place, ranges)| (place, joined(ranges))).collect())
    }

    /// Creates the set of pages whose addresses `find` returns for each template mapping of the clone.
    pub fn of_copies(
        clone: &CloneProcess,
        find: impl Fn(Range<u64>) -> Result<Vec<Range<u64>>>,
    ) -> Result<PageSet> {
        let mut set = PageSet::default();
        for map in &clone.maps {
            let base = map.distance();
            let place =
                Place { digest: map.digest, file: map.file.clone(), base: Some(base), replaced: false };
            let page = |address: u64| address.wrapping_sub(base) / PAGE_SIZE;
            let found = find(map.range())?.into_iter();
            let ranges = found.map(|range| page(range.start)..page(range.end)).collect();
            set.add(&PageSet(BTreeMap::from([(place, ranges)])));
        }
        Ok(set)
    }

    /// Adds the pages of another set.
    pub fn add(&mut self, other: &PageSet) {
        for (place, ranges) in other.0.iter().filter(|(_, ranges)| !ranges.is_empty()) {
            let ours = self.0.entry(place.clone()).or_default();
            ours.extend(ranges.iter().cloned());
            *ours = joined(std::mem::take(ours));
        }
    }

    /// Returns the pages that are not in the other set.
    pub fn without(&self, other: &PageSet) -> PageSet {
        let rest = |(place, ranges): (&Place, &Vec<Range<u64>>)| {
            (place.clone(), subtract(ranges, other.0.get(place).map_or(&[][..], Vec::as_slice)))
        };
        PageSet(self.0.iter().map(rest).collect())
    }

    /// Removes the pages over which the process had mapped other memory.
    pub fn remove_replaced(&mut self) {
        self.0.retain(|place, _| !place.replaced);
    }

    /// Returns the parts of a dirty range that are not in this set.
    pub fn rest_of(&self, range: &DirtyRange) -> Vec<DirtyRange> {
        let whole = pages(range);
        let ours = self.0.get(&Place::of(range)).map_or(&[][..], Vec::as_slice);
        let part = |part: Range<u64>| DirtyRange {
            first_page: part.start,
            pages: PageCount::new(part.end - part.start),
            address: range.address.map(|address| address + (part.start - whole.start) * PAGE_SIZE),
            ..range.clone()
        };
        subtract(std::slice::from_ref(&whole), ours).into_iter().map(part).collect()
    }

    /// Returns the pages of files that are in no place of the other set.
    pub fn files_without(&self, other: &PageSet) -> Vec<DiscardedPages> {
        let others = other.by_file();
        let ours = self.by_file().into_iter();
        let rest = ours.flat_map(|(key, ranges)| {
            let rest = subtract(&ranges, others.get(&key).map_or(&[][..], Vec::as_slice));
            rest.into_iter().map(move |range| (key.1.to_owned(), range))
        });
        rest.map(|(file, range)| DiscardedPages {
            file,
            first_page: range.start,
            pages: PageCount::new(range.end - range.start),
        })
        .collect()
    }

    fn by_file(&self) -> BTreeMap<(Digest, &str), Vec<Range<u64>>> {
        let mut files: BTreeMap<_, Vec<Range<u64>>> = BTreeMap::new();
        for (place, ranges) in &self.0 {
            files.entry((place.digest, place.file.as_str())).or_default().extend(ranges.iter().cloned());
        }
        files.into_iter().map(|(file, ranges)| (file, joined(ranges))).collect()
    }
}

fn pages(range: &DirtyRange) -> Range<u64> {
    range.first_page..range.first_page + range.pages.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(first_page: u64, pages: u64, replaced: bool) -> DirtyRange {
        DirtyRange {
            file: "memory".into(),
            first_page,
            pages: PageCount::new(pages),
            address: Some(0x10_0000 + first_page * PAGE_SIZE),
            swapped: false,
            replaced,
            digest: Digest::new([1; 32]),
        }
    }

    fn found(set: &PageSet, ranges: &[DirtyRange]) -> Vec<(u64, u64, u64)> {
        let parts = ranges.iter().flat_map(|range| set.rest_of(range));
        parts.map(|part| (part.first_page, part.pages.get(), part.address.unwrap())).collect()
    }

    #[test]
    fn pages_of_the_same_place_are_subtracted() {
        let at_mark = [dirty(0, 10, false), dirty(20, 5, false), dirty(40, 2, true)];
        let set = PageSet::of(&at_mark);
        let address = |page| 0x10_0000 + page * PAGE_SIZE;
        assert_eq!(
            found(&set, &[dirty(5, 10, false), dirty(22, 1, false), dirty(24, 2, false)]),
            [(10, 5, address(10)), (25, 1, address(25))]
        );
        // A copied page that was replaced since, and a page of another template or address, are different pages.
        assert_eq!(found(&set, &[dirty(0, 1, true)]), [(0, 1, address(0))]);
        let other = DirtyRange { digest: Digest::new([2; 32]), ..dirty(0, 1, false) };
        assert_eq!(found(&set, &[other]), [(0, 1, address(0))]);
        let moved = DirtyRange { address: Some(0x20_0000), ..dirty(0, 1, false) };
        assert_eq!(found(&set, &[moved]), [(0, 1, 0x20_0000)]);
        // Pages 3 and 4 were written again.
        let again = set.without(&PageSet::of(&[dirty(3, 2, false)]));
        assert_eq!(found(&again, &[dirty(0, 6, false)]), [(3, 2, address(3))]);
        let mut copied = set.clone();
        copied.remove_replaced();
        assert_eq!(found(&copied, &[dirty(40, 2, true)]), [(40, 2, address(40))]);
    }

    #[test]
    fn discarded_pages_are_dirty_in_no_way() {
        let at_mark = PageSet::of(&[dirty(0, 10, false), dirty(20, 5, true)]);
        let now = PageSet::of(&[dirty(0, 4, false), dirty(4, 1, true), dirty(21, 1, false)]);
        let discarded = at_mark.files_without(&now);
        let pages: Vec<_> = discarded.iter().map(|part| (part.first_page, part.pages.get())).collect();
        assert_eq!(pages, [(5, 5), (20, 1), (22, 3)]);
    }

    #[test]
    fn records_are_read_as_written_and_invalid_ones_refused() {
        let set = PageSet::of(&[dirty(0, 10, false), dirty(20, 5, true), dirty(30, 1, false)]);
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(serde_json::from_str::<PageSet>(&text).unwrap(), set);
        for (good, bad) in [
            ("[0,10]", "[10,0]"),
            ("[0,10]", "[40,41]"),
            ("[0,10]", "[0,30]"),
            ("[30,31]", "[30,99999999999999999]"),
        ] {
            let changed = text.replace(good, bad);
            assert_ne!(changed, text);
            assert!(serde_json::from_str::<PageSet>(&changed).is_err(), "{changed}");
        }
    }
}
