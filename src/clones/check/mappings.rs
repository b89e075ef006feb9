//! Judges the properties that depend on the mappings of a process and on their pages.

use std::ops::Range;

use super::facts::Facts;
use super::properties::Finding;
use crate::clones::accounting::{Measured, all_copied};
use crate::clones::find::{CloneProcess, TemplateMapping};
use crate::error::Result;
use crate::store::Serving;
use crate::sys::memory::pagemap::DirtyRange;
use crate::sys::memory::smaps::FlaggedMapping;
use crate::units::{Bytes, HUGE_PAGE_SIZE};

/// Returns each template mapping with its flags.
fn flagged<'a>(
    facts: &'a Facts,
    clone: &'a CloneProcess,
) -> impl Iterator<Item = (&'a TemplateMapping, Result<&'a FlaggedMapping, (String, String)>)> {
    clone.maps.iter().map(|map| {
        let at = facts.mappings.partition_point(|mapping| mapping.line.end <= map.start);
        let found = facts.mappings.get(at).filter(|mapping| {
            let line = &mapping.line;
            let is_same = map.anonymous || (line.dev, line.ino) == (map.dev, map.ino);
            is_same && line.start <= map.start && map.range().end <= line.end
        });
        (
            map,
            found.ok_or_else(|| {
                (format!("the mapping of '{}' changed during the check", map.file), RETRY_REMEDY.to_owned())
            }),
        )
    })
}

const RETRY_REMEDY: &str = "run this command again";

pub fn private(facts: &Facts, clone: &CloneProcess) -> Finding {
    for (map, mapping) in flagged(facts, clone) {
        if !mapping?.line.is_private() {
            return Err((
                format!("'{}' is mapped shared at {:#x}", map.file, map.start),
                "map the file with MAP_PRIVATE; QEMU: share=off".to_owned(),
            ));
        }
    }
    Ok("every mapping is private".to_owned())
}

pub fn huge_entries(facts: &Facts, clone: &CloneProcess) -> Finding {
    let mut checked = 0;
    for (map, mapping) in flagged(facts, clone) {
        let mapping = mapping?;
        // No entry of a mapping by decode, of zero memory or of a small file has 2 MiB. Zero memory and balloons split
        // a mapping into small parts.
        if map.serving == Serving::Decode || map.anonymous || map.file_size.get() < HUGE_PAGE_SIZE {
            continue;
        }
        checked += 1;
        if !map.is_aligned() {
            return Err((
                format!("'{}' is mapped at {:#x}, file offset {:#x}", map.file, map.start, map.offset.get()),
                "map the file at an address that is congruent to the file offset modulo 2 MiB; QEMU: align=2M".to_owned(),
            ));
        }
        if mapping.forbids_huge_pages() {
            return Err((
                format!("'{}' is mapped with MADV_NOHUGEPAGE", map.file),
                "do not forbid huge pages in the VMM".to_owned(),
            ));
        }
    }
    if checked == 0 {
        return Ok("no mapping can have 2 MiB entries: decode, or smaller than 2 MiB".to_owned());
    }
    if !facts.may_have_huge_pages {
        return Err((
            "prctl(PR_SET_THP_DISABLE) forbids 2 MiB entries in the process".to_owned(),
            "start the VMM without this setting, which a parent process may have made".to_owned(),
        ));
    }
    Ok("addresses and file offsets are congruent modulo 2 MiB".to_owned())
}

pub fn not_locked(facts: &Facts, clone: &CloneProcess) -> Finding {
    for (map, mapping) in flagged(facts, clone) {
        if mapping?.is_locked() {
            return Err((
                format!("'{}' is locked at {:#x}", map.file, map.start),
                "disable locked memory in the VMM; QEMU: -overcommit mem-lock=off".to_owned(),
            ));
        }
    }
    Ok("no template mapping is locked".to_owned())
}

/// Prealloc writes to every page. The guest may have discarded some pages since.
pub fn not_copied(facts: &Facts, clone: &CloneProcess, measured: &Measured) -> Finding {
    let remedy = || "disable prealloc and locked memory in the VMM".to_owned();
    if let Some((map, bytes)) = all_copied(clone, measured).first() {
        return Err((format!("every page of a mapping of '{}' is copied ({bytes})", map.file), remedy()));
    }
    let ((copied, all), samples) = (copied(clone, measured), &facts.samples);
    let is_most = copied.get() > all.get() / 2;
    // Pages in swap are not compared. Without a comparison, the copies are not proven to be needed.
    if is_most && samples.equal >= samples.copied.div_ceil(2) {
        return Err((
            format!(
                "{copied} of {all} are copied, and {} of {} compared copies are equal to the template",
                samples.equal, samples.copied
            ),
            remedy(),
        ));
    }
    Ok(format!("{copied} of {all} are copied"))
}

/// Returns the size of the copied pages, in RAM and in swap, and the size of the memory that can have copies: template
/// mappings and replaced pages. Zero memory shares nothing, so it is left out.
fn copied(clone: &CloneProcess, measured: &Measured) -> (Bytes, Bytes) {
    let shared = clone.maps.iter().zip(&measured.copied).filter(|(map, _)| !map.anonymous);
    let shared = shared.map(|(map, copies)| (copies, map.length));
    let size = |range: &Range<u64>| Bytes::new(range.end - range.start);
    let replaced = measured.replaced.iter().map(|(replaced, copies)| (copies, size(&replaced.range)));
    let add = |sum: (Bytes, Bytes), (copies, length): (&Vec<DirtyRange>, Bytes)| {
        (sum.0 + copies.iter().map(|copy| size(&copy.range)).sum::<Bytes>(), sum.1 + length)
    };
    shared.chain(replaced).fold((Bytes::ZERO, Bytes::ZERO), add)
}

pub fn bytes(facts: &Facts) -> Finding {
    match &facts.samples.different {
        Some((file, page)) => Err((
            format!("page {page} of '{file}' differs from the template in the store"),
            "stop the clone, and run 'stencil verify'".to_owned(),
        )),
        None => Ok(format!("{} clean pages were compared with the store", facts.samples.clean)),
    }
}
