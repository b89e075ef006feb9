//! Zero memory: anonymous memory of a process in place of template pages that are zero. Stencil's own memory backend
//! maps long runs of zeros in this way; the balloon of Firecracker can have the same effect.
//!
//! Such a page has the bytes of the template until the process writes the page. So the accounting treats zero memory as
//! a part of the template mapping: a page that is present or in swap, and not the kernel's zero page, is a copied page.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::find::{Inodes, TemplateMapping};
use super::ranges::{intersect, subtract};
use crate::error::{Code, Result};
use crate::store::Digest;
use crate::sys::process::procfs::MapLine;
use crate::units::{Bytes, FileOffset, PAGE_SIZE};

/// Byte ranges of a file in which all blocks are zero.
type Zeros = Arc<Vec<Range<u64>>>;

/// Finds the zero memory of processes, from the tables of their templates.
#[derive(Debug)]
pub struct ZeroMemory<'a> {
    inodes: &'a Inodes,
    /// By template and index of the file. Many clones map the same file.
    zeros: Mutex<BTreeMap<(Digest, usize), Zeros>>,
}

impl<'a> ZeroMemory<'a> {
    /// Creates a search in processes that map these files.
    pub fn new(inodes: &'a Inodes) -> ZeroMemory<'a> {
        ZeroMemory { inodes, zeros: Mutex::default() }
    }

    /// Returns the files that the search knows.
    pub fn inodes(&self) -> &'a Inodes {
        self.inodes
    }

    /// Adds the zero memory of a process to its template mappings, which are in the order of their addresses. `lines`
    /// returns all mappings of the process, also in the order of their addresses. It is called only if there is a gap
    /// between the mappings.
    ///
    /// # Errors
    /// Returns an error if the tables of a template cannot be read, or the error of `lines`.
    pub fn add(
        &self,
        maps: &mut Vec<TemplateMapping>,
        lines: impl FnOnce() -> Result<Vec<MapLine>>,
    ) -> Result<()> {
        if gaps(maps).next().is_none() {
            return Ok(());
        }
        maps.extend(parts(maps, &lines()?, |map| self.zeros(map))?);
        maps.sort_by_key(|map| map.start);
        Ok(())
    }

    fn zeros(&self, map: &TemplateMapping) -> Result<Zeros> {
        let mut known = self.zeros.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(zeros) = known.get(&(map.digest, map.index)) {
            return Ok(Arc::clone(zeros));
        }
        let template = self.inodes.store(map.mount).map(|store| store.template(&map.digest));
        let zeros = match template {
            Some(Err(error)) if error.code() != Code::NotFound => return Err(error),
            // The template was removed meanwhile. All anonymous memory in the gaps then counts as replaced.
            Some(Err(_)) | None => Vec::new(),
            Some(Ok(template)) => {
                // The rest of the last page of the file is zero too.
                let whole = 0..map.file_size.get().next_multiple_of(PAGE_SIZE);
                subtract(std::slice::from_ref(&whole), &template.data_byte_ranges(map.index)?)
            }
        };
        let zeros = Arc::new(zeros);
        known.insert((map.digest, map.index), Arc::clone(&zeros));
        Ok(zeros)
    }
}

/// Returns the zero memory in the gaps of template mappings. `zeros` returns the zero ranges of the file of a mapping.
fn parts(
    maps: &[TemplateMapping],
    lines: &[MapLine],
    zeros: impl Fn(&TemplateMapping) -> Result<Zeros>,
) -> Result<Vec<TemplateMapping>> {
    let mut found = Vec::new();
    for (before, gap) in gaps(maps) {
        let distance = before.distance();
        let address = |offset: u64| offset.wrapping_add(distance);
        let zeros: Vec<_> =
            zeros(before)?.iter().map(|part| address(part.start)..address(part.end)).collect();
        for part in intersect(&unnamed_memory(lines, &gap), &zeros) {
            found.push(TemplateMapping {
                start: part.start,
                offset: FileOffset::new(part.start.wrapping_sub(distance)),
                length: Bytes::new(part.end - part.start),
                anonymous: true,
                ..before.clone()
            });
        }
    }
    Ok(found)
}

/// Returns the address ranges between two parts of one mapping (the same distance between address and file offset),
/// each with the part before the range.
fn gaps(maps: &[TemplateMapping]) -> impl Iterator<Item = (&TemplateMapping, Range<u64>)> {
    maps.windows(2).filter_map(move |pair| {
        let [before, behind] = pair else { return None };
        let gap = before.range().end..behind.start;
        let is_one =
            (before.dev, before.ino, before.distance()) == (behind.dev, behind.ino, behind.distance());
        (is_one && !gap.is_empty()).then_some((before, gap))
    })
}

/// Returns the parts of an address range that are private anonymous memory without a name, whatever the process may do
/// with it now: a change of the protection (mprotect) does not change the bytes.
fn unnamed_memory(lines: &[MapLine], range: &Range<u64>) -> Vec<Range<u64>> {
    let first = lines.partition_point(|line| line.end <= range.start);
    let lines = lines[first..].iter().take_while(|line| line.start < range.end);
    let memory = lines.filter(|line| line.ino == 0 && line.path.is_empty() && line.is_private());
    memory.map(|line| line.start.max(range.start)..line.end.min(range.end)).collect()
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "the lists are of ranges")]
mod tests {
    use super::*;

    /// A mapping of `pages` of a file of 100 pages, at page `at`.
    fn map(at: u64, pages: Range<u64>) -> TemplateMapping {
        TemplateMapping::of_pages(at, pages, 100)
    }

    fn line(pages: Range<u64>, perms: &str, path: &str) -> MapLine {
        MapLine {
            start: pages.start * PAGE_SIZE,
            end: pages.end * PAGE_SIZE,
            perms: perms.into(),
            offset: 0,
            dev: 0,
            ino: 0,
            path: path.into(),
        }
    }

    /// Returns the zero memory as pages of the address space, each with its first page of the file.
    fn found(maps: &[TemplateMapping], lines: &[MapLine], zeros: &[Range<u64>]) -> Vec<(Range<u64>, u64)> {
        let bytes = |pages: &Range<u64>| pages.start * PAGE_SIZE..pages.end * PAGE_SIZE;
        let zeros = Arc::new(zeros.iter().map(bytes).collect::<Vec<_>>());
        let found = parts(maps, lines, |_| Ok(Arc::clone(&zeros))).unwrap();
        assert!(found.iter().all(|map| map.anonymous && map.ino == 2));
        let pages = |map: TemplateMapping| {
            (map.start / PAGE_SIZE..map.range().end / PAGE_SIZE, map.offset.get() / PAGE_SIZE)
        };
        found.into_iter().map(pages).collect()
    }

    #[test]
    fn anonymous_memory_over_zero_pages_belongs_to_the_mapping() {
        let maps = [map(110, 10..20), map(140, 40..50), map(160, 60..100)];
        let anonymous = |pages| line(pages, "rw-p", "");
        let lines = [anonymous(120..140), anonymous(150..160), anonymous(200..300)];
        assert_eq!(found(&maps, &lines, &[0..100]), [(120..140, 20), (150..160, 50)]);
        // A page of data that anonymous memory covers was replaced.
        assert_eq!(found(&maps, &lines, &[0..25, 30..55]), [(120..125, 20), (130..140, 30), (150..155, 50)]);
        assert_eq!(found(&maps, &lines, &[]), []);
        // A changed protection.
        let protected = [line(122..124, "---p", ""), line(124..126, "r--p", "")];
        assert_eq!(found(&maps, &protected, &[0..100]), [(122..124, 22), (124..126, 24)]);
        // Memory that a VMM uses for no balloon.
        let others = [
            line(126..128, "rw-s", ""),
            line(128..130, "rw-p", "[anon: heap]"),
            MapLine { ino: 5, ..line(130..132, "rw-p", "/other") },
            anonymous(132..134),
        ];
        assert_eq!(found(&maps, &others, &[0..100]), [(132..134, 32)]);
    }

    #[test]
    fn memory_between_other_mappings_does_not_belong_to_a_template() {
        let lines = [line(0..1000, "rw-p", "")];
        for maps in [
            vec![map(110, 10..20)],
            // Another distance between address and offset.
            vec![map(110, 10..20), map(141, 40..50)],
            vec![map(110, 10..20), TemplateMapping { ino: 3, ..map(140, 40..50) }],
            vec![map(110, 10..20), map(120, 20..30)],
            vec![],
        ] {
            assert_eq!(found(&maps, &lines, &[0..100]), [], "{maps:?}");
        }
    }
}
