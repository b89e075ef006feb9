//! Working sets: the pages that clones of a template use after their launch, recorded from the page tables of clones.
//!
//! A set is advice: it determines which pages are read early, never which bytes a page has. It is part of the policy of
//! a template, so the digest does not depend on it.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::Digest;
use crate::store::disk::open::Store;
use crate::store::format::Invalid;
use crate::store::format::name::check_name;
use crate::units::PageCount;

/// Name of the set that commands use unless another one is named.
pub const DEFAULT_SET: &str = "default";

/// Maximum number of extents in one list.
const MAX_EXTENTS: usize = 8192;

/// Maximum length of the texts of all sets of a template in bytes, half of a policy.
const MAX_LENGTH: usize = 512 << 10;

/// Limit of page indexes: a file of 256 TiB. Sums over all files of a set then fit into 64 bits.
const MAX_PAGE: u64 = 1 << 36;

/// Weight of a page that a recording has for the first time.
const NEW: u8 = 128;

/// Smallest weight in a set. A page leaves the set when three recordings in a row do not have it.
const MIN_WEIGHT: u8 = 32;

/// Consecutive pages with equal weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Pages of the file.
    pub pages: Range<u64>,
    /// Decaying weight: each recording halves the weight, and adds 128 if the recording has the pages.
    weight: u8,
}

/// Extents that do not overlap, in the order of their first use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents(Vec<Extent>);

/// The pages of one file that a clone used, in one recording.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Used {
    /// All used pages, in the order of their first use. The ranges do not overlap.
    pub touched: Vec<Range<u64>>,
    /// Pages that the clone has copied, in ascending order.
    pub written: Vec<Range<u64>>,
}

/// The working set of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileSet {
    /// All used pages.
    pub touched: Extents,
    /// Pages that clones write.
    pub written: Extents,
}

/// A working set of a template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Number of recordings.
    pub recordings: u32,
    /// The sets of the files, by name.
    pub files: BTreeMap<String, FileSet>,
}

/// A working set as the policy stores it.
#[derive(Serialize, Deserialize)]
struct StoredSet {
    recordings: u32,
    files: BTreeMap<String, StoredFile>,
}

#[derive(Serialize, Deserialize)]
struct StoredFile {
    touched: String,
    written: String,
}

impl Extents {
    /// Returns the extents in the order of their first use.
    pub fn iter(&self) -> impl Iterator<Item = &Extent> {
        self.0.iter()
    }

    /// Returns the ranges of pages in ascending order.
    pub fn sorted(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<_> = self.0.iter().map(|extent| extent.pages.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> PageCount {
        self.0.iter().map(|extent| PageCount::new(extent.pages.end - extent.pages.start)).sum()
    }

    /// Returns the ranges that each of the last `recordings` recordings has, at most the last 8, in ascending order.
    pub fn in_all(&self, recordings: u32) -> Vec<Range<u64>> {
        let every = (0..recordings.min(8)).fold(0, |weight, _| NEW + weight / 2);
        let mut extents: Vec<_> = self.0.iter().filter(|extent| extent.weight >= every).collect();
        extents.sort_by_key(|extent| extent.pages.start);
        extents.into_iter().map(|extent| extent.pages.clone()).collect()
    }

    /// Adds a recording. `shorten` reduces a list with too many extents.
    fn merge(&mut self, recorded: &[Range<u64>], shorten: impl Fn(Vec<Extent>) -> Vec<Extent>) {
        let mut old: Vec<_> = self.0.iter().map(|e| (e.pages.clone(), e.weight)).collect();
        old.sort_by_key(|(range, _)| range.start);
        let mut new: Vec<_> = recorded.iter().map(|range| (range.clone(), NEW)).collect();
        new.sort_by_key(|(range, _)| range.start);
        let mut merged = Vec::new();
        for range in recorded {
            for (pages, weight) in split(range, &old) {
                push(&mut merged, Extent { pages, weight: NEW + weight / 2 });
            }
        }
        for extent in self.0.iter().filter(|extent| extent.weight / 2 >= MIN_WEIGHT) {
            for (pages, _) in split(&extent.pages, &new).into_iter().filter(|(_, weight)| *weight == 0) {
                push(&mut merged, Extent { pages, weight: extent.weight / 2 });
            }
        }
        self.0 = if merged.len() > MAX_EXTENTS { shorten(merged) } else { merged };
    }

    /// Formats the extents: `FIRST+PAGES` for each, and `wWEIGHT` before each extent whose weight differs from that of
    /// the previous one.
    fn encode(&self) -> String {
        let mut text = String::new();
        let mut weight = 0;
        for extent in &self.0 {
            if extent.weight != weight {
                weight = extent.weight;
                text += &format!("w{weight} ");
            }
            text += &format!("{}+{} ", extent.pages.start, extent.pages.end - extent.pages.start);
        }
        text.truncate(text.trim_end().len());
        text
    }

    fn decode(text: &str) -> std::result::Result<Extents, Invalid> {
        let invalid = |what: &str| Invalid::damage(format!("invalid working set: {what}"));
        let mut extents = Vec::new();
        let mut weight = 0;
        for word in text.split_ascii_whitespace() {
            if let Some(number) = word.strip_prefix('w') {
                weight = number.parse().map_err(|_| invalid(word))?;
                continue;
            }
            let numbers = word.split_once('+').and_then(|(first, pages)| {
                let (first, pages): (u64, u64) = (first.parse().ok()?, pages.parse().ok()?);
                Some(first..first.checked_add(pages).filter(|end| *end <= MAX_PAGE)?)
            });
            let is_valid = |pages: &Range<u64>| !pages.is_empty() && weight > 0;
            let pages = numbers.filter(is_valid).ok_or_else(|| invalid(word))?;
            extents.push(Extent { pages, weight });
            if extents.len() > MAX_EXTENTS {
                return Err(invalid("too many ranges"));
            }
        }
        let extents = Extents(extents);
        match extents.sorted().windows(2).any(|pair| pair[0].end > pair[1].start) {
            true => Err(invalid("ranges overlap")),
            false => Ok(extents),
        }
    }
}

/// Splits a range at the borders of `pieces`, which are in ascending order. Returns each part with the weight of its
/// piece, 0 outside of all pieces.
fn split(range: &Range<u64>, pieces: &[(Range<u64>, u8)]) -> Vec<(Range<u64>, u8)> {
    let mut parts = Vec::new();
    let mut start = range.start;
    let first = pieces.partition_point(|(piece, _)| piece.end <= range.start);
    for (piece, weight) in pieces[first..].iter().take_while(|(piece, _)| piece.start < range.end) {
        if start < piece.start {
            parts.push((start..piece.start, 0));
        }
        let end = piece.end.min(range.end);
        parts.push((piece.start.max(start)..end, *weight));
        start = end;
    }
    if start < range.end {
        parts.push((start..range.end, 0));
    }
    parts
}

fn push(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.pages.end == extent.pages.start && last.weight == extent.weight => {
            last.pages.end = extent.pages.end;
        }
        _ => extents.push(extent),
    }
}

/// Fills the smallest gaps between extents, as many as there are extents beyond the limit.
fn fill_gaps(limit: usize, extents: Vec<Extent>) -> Vec<Extent> {
    let mut placed: Vec<(usize, Extent)> = extents.into_iter().enumerate().collect();
    placed.sort_by_key(|(_, extent)| extent.pages.start);
    let gap = |before: usize| placed[before + 1].1.pages.start - placed[before].1.pages.end;
    let mut gaps: Vec<usize> = (0..placed.len().saturating_sub(1)).collect();
    gaps.sort_by_key(|before| gap(*before));
    gaps.truncate(placed.len().saturating_sub(limit));
    let filled: HashSet<usize> = gaps.into_iter().collect();
    let mut joined: Vec<(usize, Extent)> = Vec::with_capacity(limit);
    for (number, (place, extent)) in placed.into_iter().enumerate() {
        match joined.last_mut() {
            Some((first, last)) if number > 0 && filled.contains(&(number - 1)) => {
                *first = place.min(*first);
                last.weight = last.weight.max(extent.weight);
                last.pages.end = extent.pages.end;
            }
            _ => joined.push((place, extent)),
        }
    }
    joined.sort_by_key(|(place, _)| *place);
    joined.into_iter().map(|(_, extent)| extent).collect()
}

/// Drops the extents with the smallest weights, and the shortest ones of these, beyond the limit.
fn drop_lightest(limit: usize, extents: Vec<Extent>) -> Vec<Extent> {
    let mut placed: Vec<(usize, Extent)> = extents.into_iter().enumerate().collect();
    let weight = |extent: &Extent| (extent.weight, extent.pages.end - extent.pages.start);
    placed.sort_by_key(|(_, extent)| std::cmp::Reverse(weight(extent)));
    placed.truncate(limit);
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, extent)| extent).collect()
}

impl WorkingSet {
    /// Adds a recording of the given files.
    pub fn merge(&mut self, used: &BTreeMap<String, Used>) {
        self.recordings = self.recordings.saturating_add(1);
        for name in used.keys() {
            self.files.entry(name.clone()).or_default();
        }
        let nothing = Used::default();
        for (name, set) in &mut self.files {
            let used = used.get(name).unwrap_or(&nothing);
            set.touched.merge(&used.touched, |extents| fill_gaps(MAX_EXTENTS, extents));
            // A page that no clone has written must not be copied.
            set.written.merge(&used.written, |extents| drop_lightest(MAX_EXTENTS, extents));
        }
    }

    /// Returns the number of used pages of all files.
    pub fn pages(&self) -> PageCount {
        self.files.values().map(|set| set.touched.pages()).sum()
    }
}

impl WorkingSet {
    fn encode(&self) -> serde_json::Value {
        let file =
            |set: &FileSet| StoredFile { touched: set.touched.encode(), written: set.written.encode() };
        let files = self.files.iter().map(|(name, set)| (name.clone(), file(set))).collect();
        serde_json::to_value(StoredSet { recordings: self.recordings, files }).unwrap_or_default()
    }

    /// Decodes a set of a policy.
    pub(in crate::store) fn decode(value: &serde_json::Value) -> std::result::Result<WorkingSet, Invalid> {
        let stored = StoredSet::deserialize(value)
            .map_err(|e| Invalid::Newer(format!("unsupported working set: {e}")))?;
        let mut files = BTreeMap::new();
        for (name, file) in stored.files {
            check_name("name of a file", &name).map_err(|e| Invalid::damage(e.message()))?;
            let (touched, written) = (Extents::decode(&file.touched)?, Extents::decode(&file.written)?);
            files.insert(name, FileSet { touched, written });
        }
        Ok(WorkingSet { recordings: stored.recordings, files })
    }
}

impl Store {
    /// Returns a working set of a template; `None` if the template has no set of that name.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if the template does not exist, and
    /// [`Code::Damage`](crate::error::Code) if its policy or the set is damaged.
    pub fn working_set(&self, digest: &Digest, name: &str) -> Result<Option<WorkingSet>> {
        let template = self.template(digest)?;
        let set = template.policy().working_sets.get(name).map(WorkingSet::decode).transpose();
        set.map_err(|e| e.in_file("policy", self.policy_path(digest)))
    }

    /// Adds a recording to a working set of a template. Returns the set.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code) for an invalid name or if all sets together become too large, and
    /// the errors of [`set_policy`](Store::set_policy).
    pub fn add_recording(
        &self,
        digest: &Digest,
        name: &str,
        used: &BTreeMap<String, Used>,
    ) -> Result<WorkingSet> {
        check_name("name of a working set", name)?;
        let (mut merged, mut length) = (WorkingSet::default(), 0);
        self.set_policy(digest, |policy| {
            // A recording replaces a set that cannot be decoded.
            let before = policy.working_sets.get(name).and_then(|set| WorkingSet::decode(set).ok());
            merged = before.unwrap_or_default();
            merged.merge(used);
            let mut sets = policy.working_sets.clone();
            sets.insert(name.to_owned(), merged.encode());
            length = sets.values().map(|set| set.to_string().len()).sum();
            if length <= MAX_LENGTH {
                policy.working_sets = sets;
            }
        })?;
        match length <= MAX_LENGTH {
            true => Ok(merged),
            false => Err(Error::usage(format!(
                "the working sets of template {digest} would take {length} bytes, expected at most {MAX_LENGTH}"
            ))
            .hint("remove a set: stencil working-set rm T --set NAME")),
        }
    }

    /// Removes a working set of a template. Returns false if the template has no set of that name.
    ///
    /// # Errors
    /// Returns the errors of [`set_policy`](Store::set_policy).
    pub fn remove_working_set(&self, digest: &Digest, name: &str) -> Result<bool> {
        let mut existed = false;
        self.set_policy(digest, |policy| existed = policy.working_sets.remove(name).is_some())?;
        Ok(existed)
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "the lists are of ranges")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> Extents {
        Extents::decode(text).unwrap()
    }

    #[test]
    fn a_page_stays_while_one_of_the_last_three_recordings_has_it() {
        let mut pages = Extents::default();
        pages.merge(&[10..20], |extents| extents);
        assert_eq!(pages.encode(), "w128 10+10");
        pages.merge(&[12..14], |extents| extents);
        assert_eq!(pages.encode(), "w192 12+2 w64 10+2 14+6");
        pages.merge(&[], |extents| extents);
        assert_eq!(pages.encode(), "w96 12+2 w32 10+2 14+6");
        pages.merge(&[30..31], |extents| extents);
        assert_eq!(pages.encode(), "w128 30+1 w48 12+2");
        pages.merge(&[], |extents| extents);
        assert_eq!(pages.encode(), "w64 30+1");
    }

    #[test]
    fn the_latest_recording_determines_the_order() {
        let mut pages = Extents::default();
        pages.merge(&[0..1, 2..3], |extents| extents);
        pages.merge(&[9..10, 2..3], |extents| extents);
        assert_eq!(pages.encode(), "w128 9+1 w192 2+1 w64 0+1");
    }

    #[test]
    fn pages_of_all_recordings_are_known() {
        let mut pages = Extents::default();
        for recording in 1..20 {
            pages.merge(&[4..8, recording * 100..recording * 100 + 1], |extents| extents);
            let all = pages.in_all(u32::try_from(recording).unwrap());
            match recording {
                1 => assert_eq!(all, [4..8, 100..101]),
                _ => assert_eq!(all, [4..8], "{recording}"),
            }
        }
    }

    #[test]
    fn lists_with_too_many_extents_are_shortened() {
        let extents = set("w128 100+1 0+1 w64 2+1 w128 103+1");
        assert_eq!(Extents(fill_gaps(3, extents.0.clone())).encode(), "w128 100+1 0+3 103+1");
        assert_eq!(Extents(fill_gaps(2, extents.0.clone())).encode(), "w128 100+4 0+3");
        assert_eq!(Extents(drop_lightest(3, extents.0)).encode(), "w128 100+1 0+1 103+1");
        let mut pages = WorkingSet::default();
        let recorded: Vec<_> = (0..MAX_EXTENTS as u64 + 10).map(|n| 100 * n..100 * n + 1).collect();
        let used = Used { touched: recorded.clone(), written: recorded };
        pages.merge(&BTreeMap::from([("memory".to_owned(), used)]));
        let memory = &pages.files["memory"];
        // Ten gaps of 99 pages are filled.
        assert_eq!(memory.touched.pages().get(), MAX_EXTENTS as u64 + 10 + 990);
        assert_eq!(memory.written.pages().get(), MAX_EXTENTS as u64);
        assert_eq!([&memory.touched, &memory.written].map(|list| list.0.len()), [MAX_EXTENTS; 2]);
        assert_eq!(WorkingSet::decode(&pages.encode()).unwrap(), pages);
    }

    #[test]
    fn sets_with_other_fields_or_names_are_rejected() {
        for bad in [
            r#"{}"#,
            r#"{"recordings": 1, "files": {"a/b": {"touched": "", "written": ""}}}"#,
            r#"{"recordings": 1, "files": {"memory": {"touched": "w1 0+68719476737", "written": ""}}}"#,
            r#"[]"#,
        ] {
            assert!(WorkingSet::decode(&serde_json::from_str(bad).unwrap()).is_err(), "{bad}");
        }
    }

    #[test]
    fn invalid_texts_are_rejected() {
        let overflow = format!("w1 {}+2", u64::MAX);
        for text in [
            "5+1",
            "w0 5+1",
            "w1 1",
            "w1 1+0",
            "w1 x+1",
            "w256 1+1",
            "w 1+1",
            "w1 1+2 2+1",
            "w1 +",
            "w1 -1+2",
            &overflow,
        ] {
            assert!(Extents::decode(text).is_err(), "{text}");
        }
    }

    proptest! {
        /// A merge of ranges gives each page the weight that the definition gives for this page.
        #[test]
        fn merged_weights_are_those_of_each_page(runs in prop::collection::vec(
            prop::collection::vec((0u64..200, 1u64..20), 0..12), 1..6)) {
            let mut extents = Extents::default();
            let mut weights = [0u8; 256];
            for run in runs {
                let mut seen = [false; 256];
                let mut recorded = Vec::new();
                for (first, pages) in run {
                    for page in first..first + pages {
                        if !std::mem::replace(&mut seen[page as usize], true) {
                            recorded.push(page..page + 1);
                        }
                    }
                }
                extents.merge(&recorded, |extents| extents);
                for (weight, seen) in weights.iter_mut().zip(seen) {
                    *weight = match seen {
                        true => NEW + *weight / 2,
                        false => if *weight / 2 >= MIN_WEIGHT { *weight / 2 } else { 0 },
                    };
                }
                let decoded = Extents::decode(&extents.encode()).unwrap();
                prop_assert_eq!(&decoded, &extents);
                let mut found = [0u8; 256];
                for extent in extents.iter() {
                    extent.pages.clone().for_each(|page| found[page as usize] = extent.weight);
                }
                prop_assert_eq!(found, weights);
            }
        }
    }
}
