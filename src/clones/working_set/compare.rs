//! How well a working set fits the clones that run now.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use super::record::{count, look};
use crate::clones::find::{self, COMMAND_NAME, Inodes};
use crate::clones::ranges::{joined, subtract};
use crate::clones::zero_memory::ZeroMemory;
use crate::control::Mount;
use crate::error::{Code, Result};
use crate::store::{Digest, WorkingSet};
use crate::sys::process::procfs;
use crate::units::PageCount;

/// The pages that the clones of a template use, compared with the pages of a working set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Number of clones.
    pub clones: usize,
    /// Pages that at least one clone uses.
    pub touched_pages: PageCount,
    /// Touched pages that are in the set.
    pub hits: PageCount,
    /// Pages of the set that no clone uses.
    pub waste: PageCount,
}

/// Compares a working set with the clones of the template; `None` if there are no clones.
///
/// # Errors
/// Returns an error if a process cannot be inspected.
pub fn compare(digest: &Digest, set: &WorkingSet, mounts: &[Mount]) -> Result<Option<Comparison>> {
    let inodes = Inodes::of(mounts)?;
    let zeros = ZeroMemory::new(&inodes);
    let mut clones = 0;
    let mut touched: BTreeMap<String, Vec<Range<u64>>> = BTreeMap::new();
    for clone in find::search(&inodes)?.complete()? {
        let is_other = clone.maps.iter().all(|map| map.digest != *digest);
        // `stencil warm --pin` maps the whole set, but is no clone.
        if is_other || procfs::status(clone.pid)?.is_none_or(|status| status.name == COMMAND_NAME) {
            continue;
        }
        let looks = match look(clone.pid, &inodes, &zeros) {
            Err(error) if error.code() == Code::NotFound => None,
            other => other?,
        };
        let Some((_, looks)) = looks else { continue };
        clones += 1;
        for (map, pages, _) in looks.into_iter().filter(|(map, ..)| map.digest == *digest) {
            let all = touched.entry(map.file).or_default();
            *all = joined(all.drain(..).chain(pages).collect());
        }
    }
    if clones == 0 {
        return Ok(None);
    }
    let (mut touched_pages, mut missed) = (PageCount::ZERO, PageCount::ZERO);
    for (name, pages) in &touched {
        let in_set = set.files.get(name).map(|set| set.touched.sorted()).unwrap_or_default();
        touched_pages += count(pages);
        missed += count(&subtract(pages, &in_set));
    }
    let nothing = Vec::new();
    let unused = set
        .files
        .iter()
        .map(|(name, set)| count(&subtract(&set.touched.sorted(), touched.get(name).unwrap_or(&nothing))));
    let waste = unused.sum();
    let hits = PageCount::new(touched_pages.get() - missed.get());
    Ok(Some(Comparison { clones, touched_pages, hits, waste }))
}
