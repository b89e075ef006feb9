//! Reasons that follow from page tables and figures.

use std::collections::BTreeMap;
use std::ops::Range;

use super::code::{Code, Reasons};
use crate::clones::accounting::process::Measured;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::{COMMAND_NAME, CloneProcess, TemplateMapping};
use crate::clones::ranges::{intersect, joined};
use crate::store::{Digest, Serving};
use crate::units::{Bytes, HUGE_PAGE_SIZE, PAGE_SIZE, PageCount};

pub fn add(survey: &Survey, reasons: &mut Reasons) {
    for ((clone, measured), list) in survey.clones.iter().zip(&mut reasons.clones) {
        let memory = &measured.memory;
        let (mut decode, mut misaligned) = (Bytes::ZERO, Bytes::ZERO);
        for (map, clean) in clone.maps.iter().zip(&measured.clean) {
            match map.serving {
                Serving::Decode if survey.has_backing(map.mount, map.digest, &map.file) => decode += *clean,
                Serving::Passthrough if map.length.get() >= HUGE_PAGE_SIZE && !map.is_aligned() => {
                    misaligned += *clean;
                }
                _ => {}
            }
        }
        let all_copied: Bytes = all_copied(clone, measured).into_iter().map(|(_, bytes)| bytes).sum();
        Reasons::push(list, Code::Decode, decode);
        Reasons::push(list, Code::Misaligned, misaligned);
        Reasons::push(list, Code::AllCopied, all_copied);
        let (copies, tables) = (memory.private_bytes, memory.page_table_bytes);
        if tables > copies {
            Reasons::push(list, Code::PageTables, tables);
        }
        if memory.overhead_bytes > copies + tables {
            Reasons::push(list, Code::Overhead, memory.overhead_bytes);
        }
    }
    for row in &survey.density.templates {
        reasons.of_template(row.digest, Code::ResidentZeros, row.resident_zero_bytes);
    }
    for ((digest, _), pages) in copied_by_all(&survey.clones) {
        reasons.of_template(digest, Code::CopiedByAll, pages);
    }
}

/// Returns the mappings of which every page is copied, each by its first part and with its size. Zero memory and balloons
/// split a mapping into parts.
pub fn all_copied<'a>(clone: &'a CloneProcess, measured: &Measured) -> Vec<(&'a TemplateMapping, Bytes)> {
    let mut mappings: BTreeMap<(u64, u64, u64), (&TemplateMapping, Bytes, Bytes)> = BTreeMap::new();
    for (map, copied) in clone.maps.iter().zip(&measured.copied) {
        let key = (map.dev, map.ino, map.distance());
        let (_, copies, size) = mappings.entry(key).or_insert((map, Bytes::ZERO, Bytes::ZERO));
        *copies += copied.iter().map(|copy| PageCount::new(copy.pages()).bytes()).sum::<Bytes>();
        *size += map.length;
    }
    let all = mappings.into_values().filter(|(_, copies, size)| copies == size);
    all.map(|(map, copies, _)| (map, copies)).collect()
}

/// Digest of a template, and index of a file.
type File = (Digest, usize);

/// Returns the memory of the pages of each file that all of its clones have copied, if there are several clones.
fn copied_by_all(clones: &[(CloneProcess, Measured)]) -> BTreeMap<File, Bytes> {
    let mut files: BTreeMap<File, (u64, Vec<Range<u64>>)> = BTreeMap::new();
    // A process that keeps a working set in RAM maps the template too, and copies nothing.
    for (clone, measured) in clones.iter().filter(|(_, measured)| measured.command != COMMAND_NAME) {
        let mut of_clone: BTreeMap<File, Vec<Range<u64>>> = BTreeMap::new();
        for (map, copied) in clone.maps.iter().zip(&measured.copied) {
            let offset = |address: u64| map.offset.get() + address - map.start;
            let present = copied.iter().filter(|copy| !copy.swapped);
            let ranges = present.map(|copy| offset(copy.range.start)..offset(copy.range.end));
            of_clone.entry((map.digest, map.index)).or_default().extend(ranges);
        }
        for (file, copied) in of_clone {
            let copied = joined(copied);
            let (count, common) = files.entry(file).or_insert_with(|| (0, copied.clone()));
            *count += 1;
            *common = intersect(common, &copied);
        }
    }
    let bytes = |(count, common): (u64, Vec<Range<u64>>)| {
        let pages: u64 = common.iter().map(|range| (range.end - range.start) / PAGE_SIZE).sum();
        (count > 1).then(|| PageCount::new(pages * count).bytes())
    };
    files.into_iter().filter_map(|(file, found)| Some((file, bytes(found)?))).collect()
}
