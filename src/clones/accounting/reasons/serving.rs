//! Reasons that follow from how files are served and mapped.

use std::collections::BTreeMap;

use super::code::{Code, Reasons};
use crate::clones::accounting::process::Measured;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::{CloneProcess, TemplateMapping};
use crate::control::{Mount, MountStatus, ServeMode, Served};
use crate::error::{Code as ErrorCode, Result};
use crate::store::{FileKind, Serving};
use crate::sys::memory::smaps;
use crate::units::Bytes;

/// Status by index of the mount; `None` for a mount that does not answer.
pub type Statuses = BTreeMap<usize, Option<MountStatus>>;

pub fn add(mounts: &[Mount], mut statuses: Statuses, survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    for ((clone, measured), list) in survey.clones.iter().zip(&mut reasons.clones) {
        let mut fallback = Bytes::ZERO;
        for (map, clean) in decoded(clone, measured) {
            let status = statuses.entry(map.mount).or_insert_with(|| {
                let status = mounts[map.mount].status();
                status.inspect_err(|error| log::warn!("{error}")).ok()
            });
            if status.as_ref().is_some_and(|status| has_no_backing(survey, status, map)) {
                fallback += clean;
            }
        }
        Reasons::push(list, Code::DecodeFallback, fallback);
        Reasons::push(list, Code::HugeAdvice, with_huge_advice(clone, measured)?);
    }
    Ok(())
}

/// Returns the file mappings by decode, each with the size of its clean pages.
fn decoded<'a>(
    clone: &'a CloneProcess,
    measured: &'a Measured,
) -> impl Iterator<Item = (&'a TemplateMapping, Bytes)> {
    let maps = clone.maps.iter().zip(measured.clean.iter().copied());
    maps.filter(|(map, _)| map.serving == Serving::Decode && !map.anonymous)
}

/// Returns true if the mount would serve the file by a backing and cannot. Files of kind blob never have kernel decode.
fn has_no_backing(survey: &Survey, status: &MountStatus, map: &TemplateMapping) -> bool {
    let template = status.templates.iter().find(|template| template.digest == map.digest);
    let file = template.and_then(|template| template.files.iter().find(|file| file.name == map.file));
    let kind =
        survey.opened.get(&map.digest).and_then(|its| its.files().get(map.index)).map(|file| file.kind);
    let never = match status.serve.parse::<ServeMode>() {
        Ok(ServeMode::Decode) => true,
        Ok(ServeMode::Kernel) => kind == Some(FileKind::Blob),
        _ => false,
    };
    !never && file.is_some_and(|file| file.serving == Served::Decode && file.why.is_some())
}

/// Returns the size of the mappings by decode for which the process has requested huge pages. The request has no effect
/// but on readahead: each page fault reads 4 MiB.
fn with_huge_advice(clone: &CloneProcess, measured: &Measured) -> Result<Bytes> {
    if decoded(clone, measured).next().is_none() {
        return Ok(Bytes::ZERO);
    }
    let mappings = match smaps::of(clone.pid) {
        Err(error) if error.code() != ErrorCode::NotFound => return Err(error),
        mappings => mappings.ok().flatten().unwrap_or_default(),
    };
    // The process id may have been reused since the survey.
    if !clone.process().is_alive() {
        return Ok(Bytes::ZERO);
    }
    let advised = mappings.iter().filter(|mapping| mapping.wants_huge_pages());
    let ranges: Vec<_> = advised.map(|mapping| mapping.line.start..mapping.line.end).collect();
    let has_advice = |map: &TemplateMapping| ranges.iter().any(|range| range.contains(&map.start));
    Ok(decoded(clone, measured).filter(|(map, _)| has_advice(map)).map(|(map, _)| map.length).sum())
}
