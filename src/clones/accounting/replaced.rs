//! Pages of a template mapping over which the process has mapped other memory, as the balloon of Firecracker does.
//!
//! A page that was replaced reads as what is mapped there now. `/proc/PID/maps` does not say what was mapped before. So
//! for each part of the file that the process maps nowhere, the addresses next to the mapped parts are examined:
//!
//! * Between two parts of one mapping, every readable page was replaced. Two mappings with the same distance between
//!   address and file offset count as parts of one.
//! * At an end of a mapping, neighbouring memory may have nothing to do with the template. It counts only in a process
//!   with a virtual machine, whose memory is a whole file, and only if anonymous memory without a name, readable and
//!   writable, continues the mapping up to the next mapped part or the end of the file. The guard page behind a
//!   mapping of QEMU is not readable.

use std::ops::Range;

use crate::clones::find::TemplateMapping;
use crate::error::Result;
use crate::sys::process::procfs::MapLine;
use crate::units::PAGE_SIZE;

/// Consecutive pages of a template mapping that the process has replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaced {
    /// Index of the neighbouring part of the mapping.
    pub map: usize,
    /// Addresses, page-aligned.
    pub range: Range<u64>,
    /// False if the pages of the file are known, but not the addresses of the memory that has replaced the pages.
    pub is_certain: bool,
}

/// Returns the replaced pages of a process in the order of their addresses. `maps` are its template mappings, `lines`
/// returns all of its mappings, both by address. `is_vmm` returns true if the process has a virtual machine. The search
/// calls both only if the result depends on the answer.
///
/// # Errors
/// Returns the error of `lines`.
pub fn replaced(
    maps: &[TemplateMapping],
    lines: impl FnOnce() -> Result<Vec<MapLine>>,
    is_vmm: impl Fn() -> bool,
) -> Result<Vec<Replaced>> {
    let mut found = Vec::new();
    let missing = missing_parts(maps);
    if missing.is_empty() {
        return Ok(found);
    }
    let lines = &lines()?[..];
    for missing in missing {
        match (missing.before, missing.behind) {
            (Some(before), Some(behind)) if maps[before].distance() == maps[behind].distance() => {
                let gap = maps[before].range().end..maps[behind].start;
                let replaced = |range| Replaced { map: before, range, is_certain: true };
                found.extend(readable(lines, &gap).map(replaced));
            }
            (before, behind) => {
                let length = missing.offsets.end - missing.offsets.start;
                let above = before.map(|map| (map, continued_above(lines, maps[map].range().end, length)));
                let below = behind.map(|map| (map, continued_below(lines, maps[map].start, length)));
                let bytes = |side: Option<(usize, u64)>| side.map_or(0, |(_, bytes)| bytes);
                if bytes(above) + bytes(below) < length || !is_vmm() {
                    continue;
                }
                // If the memory on both sides is larger than the missing pages, the border between the sides is unknown.
                let is_certain = bytes(above) + bytes(below) == length || bytes(above).min(bytes(below)) == 0;
                let mut left = length;
                let above = above.map(|(map, bytes)| (map, bytes, true));
                let below = below.map(|(map, bytes)| (map, bytes, false));
                for (map, bytes, is_above) in [above, below].into_iter().flatten() {
                    let bytes = bytes.min(left);
                    left -= bytes;
                    let range = match is_above {
                        true => maps[map].range().end..maps[map].range().end + bytes,
                        false => maps[map].start - bytes..maps[map].start,
                    };
                    found.extend((bytes > 0).then_some(Replaced { map, range, is_certain }));
                }
            }
        }
    }
    found.sort_by_key(|replaced| replaced.range.start);
    Ok(found)
}

/// A part of a file that the process does not map, and the mappings of the parts before and behind it.
struct Missing {
    offsets: Range<u64>,
    before: Option<usize>,
    behind: Option<usize>,
}

fn missing_parts(maps: &[TemplateMapping]) -> Vec<Missing> {
    let mut order: Vec<usize> = (0..maps.len()).collect();
    let file = |index: usize| (maps[index].digest, maps[index].index);
    order.sort_by_key(|&index| (file(index), maps[index].offset.get()));
    let mut missing = Vec::new();
    for of_file in order.chunk_by(|&a, &b| file(a) == file(b)) {
        let (mut end, mut before) = (0, None);
        for &index in of_file {
            let start = maps[index].offset.get();
            if start > end {
                missing.push(Missing { offsets: end..start, before, behind: Some(index) });
            }
            if start + maps[index].length.get() > end {
                (end, before) = (start + maps[index].length.get(), Some(index));
            }
        }
        let size = maps[of_file[0]].file_size.get().next_multiple_of(PAGE_SIZE);
        if end < size {
            missing.push(Missing { offsets: end..size, before, behind: None });
        }
    }
    missing
}

/// Returns the parts of an address range that can be read.
fn readable<'a>(lines: &'a [MapLine], range: &'a Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = lines.partition_point(|line| line.end <= range.start);
    lines[first..]
        .iter()
        .take_while(|line| line.start < range.end)
        .filter(|line| line.perms.starts_with('r'))
        .map(|line| line.start.max(range.start)..line.end.min(range.end))
}

/// Returns the size of the memory that continues a mapping which ends at `end`, at most `limit` bytes.
fn continued_above(lines: &[MapLine], end: u64, limit: u64) -> u64 {
    let mut reached = end;
    let first = lines.partition_point(|line| line.start < end);
    for line in lines[first..].iter().take_while(|line| line.is_unnamed_memory()) {
        if line.start != reached || reached - end >= limit {
            break;
        }
        reached = line.end;
    }
    (reached - end).min(limit)
}

/// Returns the size of the memory that precedes a mapping which starts at `start`, at most `limit` bytes.
fn continued_below(lines: &[MapLine], start: u64, limit: u64) -> u64 {
    let mut reached = start;
    let count = lines.partition_point(|line| line.start < start);
    for line in lines[..count].iter().rev().take_while(|line| line.is_unnamed_memory()) {
        if line.end != reached || start - reached >= limit {
            break;
        }
        reached = line.start;
    }
    (start - reached).min(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 10;

    /// A mapping of `pages` of a file of ten pages, at page `at`.
    fn map(at: u64, pages: Range<u64>) -> TemplateMapping {
        TemplateMapping::of_pages(at, pages, FILE)
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

    fn memory(pages: Range<u64>) -> MapLine {
        line(pages, "rw-p", "")
    }

    /// Returns the replaced pages, as pages of the address space, of a process with these other mappings.
    fn pages(maps: &[TemplateMapping], others: &[MapLine], is_vmm: bool) -> Vec<(u64, u64)> {
        let mut lines = others.to_vec();
        lines.extend(maps.iter().map(|map| MapLine {
            end: map.range().end,
            start: map.start,
            ..line(0..0, "rw-p", "/mnt/memory")
        }));
        lines.iter_mut().filter(|line| !line.path.is_empty()).for_each(|line| line.ino = 2);
        lines.sort_by_key(|line| line.start);
        let found = replaced(maps, || Ok(lines), || is_vmm).unwrap();
        let found = found.into_iter().map(|found| found.range);
        found.map(|range| (range.start / PAGE_SIZE, range.end / PAGE_SIZE)).collect()
    }

    #[test]
    fn readable_memory_between_two_parts_of_a_mapping_has_replaced_it() {
        let maps = [map(100, 0..3), map(106, 6..10)];
        assert_eq!(pages(&maps, &[memory(103..106)], false), [(103, 106)]);
        assert_eq!(
            pages(&maps, &[line(103..105, "r--s", "/other"), memory(105..106)], false),
            [(103, 105), (105, 106)]
        );
        assert_eq!(pages(&maps, &[], false), [], "unmapped");
        assert_eq!(
            pages(&maps, &[line(103..104, "---p", ""), memory(105..106)], false),
            [(105, 106)],
            "without access"
        );
    }

    #[test]
    fn memory_behind_a_mapping_of_a_vmm_has_replaced_the_rest_of_the_file() {
        let maps = [map(100, 0..7)];
        assert_eq!(pages(&maps, &[memory(107..110)], true), [(107, 110)]);
        assert_eq!(pages(&maps, &[memory(107..900)], true), [(107, 110)], "merged with memory behind it");
        assert_eq!(pages(&maps, &[memory(107..108), memory(108..110)], true), [(107, 110)]);
        for others in [
            vec![memory(107..109)],
            vec![memory(108..111)],
            vec![line(107..110, "rw-p", "[heap]")],
            vec![line(107..110, "---p", "")],
            vec![line(107..110, "rw-s", "")],
        ] {
            assert_eq!(pages(&maps, &others, true), [], "{others:?}");
        }
        assert_eq!(pages(&maps, &[memory(107..110)], false), [], "not a VMM");
    }

    #[test]
    fn memory_before_a_mapping_of_a_vmm_has_replaced_the_start_of_the_file() {
        let maps = [map(103, 3..10)];
        assert_eq!(pages(&maps, &[memory(50..103)], true), [(100, 103)]);
        assert_eq!(pages(&maps, &[memory(101..103)], true), []);
    }

    #[test]
    fn the_end_of_one_region_and_the_start_of_the_next_may_both_be_replaced() {
        // Pages 0 to 5 and 6 to 9 at two places; pages 4 to 6 are replaced.
        let maps = [map(100, 0..4), map(207, 7..10)];
        assert_eq!(pages(&maps, &[memory(104..106), memory(206..207)], true), [(104, 106), (206, 207)]);
        assert_eq!(pages(&maps, &[memory(104..105), memory(206..207)], true), []);
        // Other memory of the process may lie behind the first region, or before the second one.
        let sides = |others: [Range<u64>; 2]| {
            let lines = others.map(memory);
            let found = replaced(&maps, || Ok(lines.to_vec()), || true).unwrap();
            let bytes: u64 = found.iter().map(|found| found.range.end - found.range.start).sum();
            (bytes / PAGE_SIZE, found[0].is_certain)
        };
        assert_eq!(sides([104..106, 206..207]), (3, true));
        assert_eq!(sides([104..107, 204..207]), (3, false));
        assert_eq!(sides([104..106, 204..207]), (3, false));
        assert_eq!(sides([150..160, 204..207]), (3, true), "only one side has memory");
    }

    #[test]
    fn pages_that_are_mapped_elsewhere_are_not_replaced() {
        let maps = [map(100, 0..5), map(200, 5..10)];
        assert_eq!(pages(&maps, &[memory(105..110), memory(195..200)], true), []);
        let twice = [map(100, 0..10), map(200, 0..5)];
        assert_eq!(pages(&twice, &[memory(205..210)], true), []);
    }
}
