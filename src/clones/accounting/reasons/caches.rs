//! Reasons that follow from the page cache of the templates.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use super::code::{Code, Reasons};
use crate::clones::accounting::residency;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::{COMMAND_NAME, CloneProcess, ServedFile};
use crate::clones::ranges::joined;
use crate::control::Mount;
use crate::error::Result;
use crate::store::{Digest, Serving};
use crate::sys::memory::page_flags::Charges;
use crate::sys::process::cgroup;
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// Resident pages of one file, of all its page caches, as ranges of bytes.
type Resident = Vec<Range<u64>>;

/// Pages of each template by the inode number of the memory cgroup that they are charged to.
type Charged = BTreeMap<Digest, HashMap<u64, u64>>;

pub fn add(mounts: &[Mount], survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let charges = Charges::open()?;
    let mut files: BTreeMap<(Digest, usize), Resident> = BTreeMap::new();
    let (mut charged, mut failed) = (Charged::new(), None);
    let clones: Vec<&CloneProcess> = survey.clones.iter().map(|(clone, _)| clone).collect();
    let has_cache = |file: &ServedFile| {
        survey.opened.contains_key(&file.digest)
            && (file.serving == Serving::Decode || survey.has_backing(file.mount, file.digest, &file.name))
    };
    residency::each_inode(mounts, &survey.inodes, &clones, has_cache, |served, file| {
        let resident = files.entry((served.digest, served.index)).or_default();
        let of_template = charged.entry(served.digest).or_default();
        residency::each_page(&file, |offset, frame| {
            append(resident, offset..offset + PAGE_SIZE);
            match charges.as_ref().map(|charges| charges.of(frame)) {
                Some(Ok(cgroup)) => *of_template.entry(cgroup).or_default() += 1,
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
        })
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    for ((digest, _), resident) in files {
        reasons.of_template(digest, Code::CachedTwice, twice(resident));
    }
    add_charges(&charged, survey, reasons)
}

/// Adds a range, as a part of the last one if both adjoin.
fn append(resident: &mut Resident, range: Range<u64>) {
    match resident.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => resident.push(range),
    }
}

/// Returns the size of all pages except one of each.
fn twice(resident: Resident) -> Bytes {
    let bytes = |ranges: &[Range<u64>]| -> u64 { ranges.iter().map(|range| range.end - range.start).sum() };
    let all = bytes(&resident);
    Bytes::new(all - bytes(&joined(resident)))
}

/// A clone may be charged for pages that all clones share: the kernel charges the cgroup of the first process that needs
/// a page.
fn add_charges(charged: &Charged, survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let mut cgroups_of: BTreeMap<Digest, BTreeSet<&str>> = BTreeMap::new();
    let is_clone = |command: &str| command != COMMAND_NAME;
    for (clone, measured) in survey.clones.iter().filter(|(_, measured)| is_clone(&measured.command)) {
        for map in &clone.maps {
            cgroups_of.entry(map.digest).or_default().insert(&measured.cgroup);
        }
    }
    if cgroups_of.values().all(|cgroups| cgroups.len() < 2) {
        return Ok(());
    }
    let paths = cgroup::memory_cgroups()?;
    for (digest, cgroups) in cgroups_of {
        let of_template = charged.get(&digest).into_iter().flatten();
        let by_path: HashMap<&str, u64> =
            of_template.filter_map(|(inode, pages)| Some((paths.get(inode)?.as_str(), *pages))).collect();
        let mut clones_of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, (clone, measured)) in survey.clones.iter().enumerate() {
            if is_clone(&measured.command) && clone.maps.iter().any(|map| map.digest == digest) {
                clones_of.entry(&measured.cgroup).or_default().push(index);
            }
        }
        for (own, clones) in clones_of {
            let is_shared = cgroups.iter().any(|other| !is_below(other, own));
            let Some(pages) = by_path.get(own).filter(|_| is_shared) else { continue };
            for (clone, share) in clones.iter().zip(PageCount::new(*pages).bytes().split(clones.len())) {
                Reasons::push(&mut reasons.clones[*clone], Code::Charged, share);
            }
        }
    }
    Ok(())
}

/// Returns true for a cgroup and the cgroups below it.
fn is_below(path: &str, cgroup: &str) -> bool {
    let rest = path.strip_prefix(cgroup.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_all_pages_but_one_of_each() {
        let page = |number: u64| number * PAGE_SIZE..(number + 1) * PAGE_SIZE;
        assert_eq!(twice(vec![]), Bytes::ZERO);
        assert_eq!(twice(vec![page(1), page(2), page(5)]), Bytes::ZERO);
        assert_eq!(twice(vec![page(1), page(2), page(2), page(2), page(1)]).get(), 3 * PAGE_SIZE);
        let mut merged = Resident::new();
        [1, 2, 5, 0, 1].into_iter().for_each(|number| append(&mut merged, page(number)));
        assert_eq!(merged, [PAGE_SIZE..3 * PAGE_SIZE, page(5), 0..2 * PAGE_SIZE]);
        assert_eq!(twice(merged).get(), PAGE_SIZE);
    }

    #[test]
    fn a_cgroup_contains_those_below_it() {
        for (path, cgroup, expected) in [
            ("/a", "/a", true),
            ("/a/b", "/a", true),
            ("/ab", "/a", false),
            ("/a", "/a/b", false),
            ("/a", "/", true),
            ("/", "/", true),
        ] {
            assert_eq!(is_below(path, cgroup), expected, "{path} {cgroup}");
        }
    }
}
