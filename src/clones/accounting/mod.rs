//! Memory accounting: what each clone has dirtied, what all of them really cost.
//!
//! `host_bytes` is to the byte the sum of its named parts: template pages in RAM (once), what the store
//! itself holds in RAM, distinct private pages, page tables, the clones' memory outside templates, and their disks
//! where these lie in RAM.

mod disks;
mod frames;
mod process;
pub mod residency;
mod totals;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

pub use process::{CloneMemory, Measured, measure};
pub use totals::Totals;

use super::baseline::Baseline;
use super::find::{self, CloneProcess, Inodes, TemplateMapping};
use super::registry;
use crate::control::Mount;
use crate::error::{Error, Result};
use crate::store::{Digest, Serving, Store, StorePath, Template};
use crate::sys::process::ProcessId;
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// One template and the RAM that it holds once for all its clones.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateMemory {
    /// Its digest.
    pub digest: Digest,
    /// `NAME:TAG` of all its tags.
    pub tags: BTreeSet<String>,
    /// `passthrough`, `decode`, or `both` after a promotion while old mappings live.
    pub serving: String,
    /// Length of all its files.
    pub size_bytes: Bytes,
    /// Pages of its files that are not zero.
    pub data_bytes: Bytes,
    /// Its pages in the page cache: both servings, all mounts.
    pub resident_bytes: Bytes,
    /// Page cache of the store's files that hold it. Files that several templates share are shown at each.
    pub store_cache_bytes: Bytes,
    /// Clones that map it.
    pub clones: u64,
}

/// One clone and its memory.
#[derive(Debug, Clone, Serialize)]
pub struct CloneRow {
    /// Id that `stencil clone` gave it, or its pid.
    pub id: String,
    /// Process id.
    pub pid: u32,
    /// All processes that have its address space, itself first.
    pub pids: Vec<u32>,
    /// Name given at launch, or the command's name.
    pub name: String,
    /// Control group.
    pub cgroup: String,
    /// Real user id.
    pub uid: u32,
    /// The template of its first mapping.
    pub template: Digest,
    /// `simulated`, `qemu`, `command`, or `other` for a process that somebody else launched.
    pub kind: String,
    /// Its figures.
    #[serde(flatten)]
    pub memory: CloneMemory,
    /// Its mappings.
    pub maps: Vec<TemplateMapping>,
}

/// The answer of `stencil density`.
#[derive(Debug, Clone, Serialize)]
pub struct Density {
    /// Templates of all mounts.
    pub templates: Vec<TemplateMemory>,
    /// All clones, by pid.
    pub clones: Vec<CloneRow>,
    /// The host.
    pub totals: Totals,
}

/// A measurement together with what it was made from, for the audit.
#[derive(Debug)]
pub struct Survey {
    /// The answer.
    pub density: Density,
    /// Each clone's mappings and where its copies lie.
    pub clones: Vec<(CloneProcess, Measured)>,
    /// What the inode numbers mean.
    pub inodes: Inodes,
    /// The host's free memory before the first of them was launched, where that is known.
    pub baseline: Option<Baseline>,
}

/// Measures all clones of these mounts, or those of one template.
///
/// # Errors
/// When a store, a supervisor or a process cannot be asked: no figure is better than a wrong one.
pub fn survey(mounts: &[Mount], only: Option<&Digest>) -> Result<Survey> {
    let inodes = Inodes::of(mounts)?;
    let mut found = find::search(&inodes)?.complete()?;
    if let Some(only) = only {
        found.retain(|clone| clone.maps.iter().any(|map| map.digest == *only));
    }
    let mut clones = Vec::with_capacity(found.len());
    for clone in found {
        if let Some(measured) = measure(&clone)? {
            clones.push((clone, measured));
        }
    }
    let entries = registry::list()?;
    disks::add(&mut clones, &entries)?;
    let mut templates = Templates::of(mounts, only)?;
    let processes: Vec<CloneProcess> = clones.iter().map(|(clone, _)| clone.clone()).collect();
    templates.add_residency(&residency::resident(mounts, &inodes, &processes)?);
    templates.add_clones(&processes);
    let store_cache = templates.store_cache()? + residency::daemons(mounts)?;
    let known = known(entries);
    let copied = totals::Copied::of(&clones, &templates.opened, &known)?;
    let totals = Totals::new(&clones, &templates.rows(), store_cache, frames::distinct(&clones)?, copied)?;
    let rows = clones.iter().map(|(clone, measured)| row(clone, measured, &known)).collect();
    let baseline = baseline(&clones, &known);
    let density = Density { templates: templates.rows(), clones: rows, totals };
    Ok(Survey { density, clones, inodes, baseline })
}

/// The baseline of the launch that the first of these clones are of. Two launches that began at one time may both have
/// one: then neither was alone.
fn baseline(clones: &[(CloneProcess, Measured)], known: &Known) -> Option<Baseline> {
    let mut of_clones = clones.iter().filter_map(|(clone, _)| record_of(clone, known)?.baseline);
    let first = of_clones.next()?;
    of_clones.all(|other| other == first).then_some(first)
}

type Known = HashMap<ProcessId, registry::Entry>;

fn known(entries: Vec<registry::Entry>) -> Known {
    let named = entries.into_iter().filter_map(|entry| Some((entry.process()?, entry)));
    named.collect()
}

/// The record of a clone, whichever process of its address space that names.
fn record_of<'a>(clone: &CloneProcess, known: &'a Known) -> Option<&'a registry::Entry> {
    clone.processes().find_map(|process| known.get(&process))
}

fn row(clone: &CloneProcess, measured: &Measured, known: &Known) -> CloneRow {
    let entry = record_of(clone, known);
    CloneRow {
        id: entry.map_or_else(|| clone.pid.to_string(), |e| e.id.clone()),
        pid: clone.pid,
        pids: clone.processes().map(|process| process.pid).collect(),
        name: entry.map_or_else(|| measured.command.clone(), |e| e.name.clone()),
        cgroup: measured.cgroup.clone(),
        uid: measured.uid,
        template: clone.maps[0].digest,
        kind: entry.map_or_else(|| "other".to_owned(), |e| e.kind.name().to_owned()),
        memory: measured.memory,
        maps: clone.maps.clone(),
    }
}

/// The templates of all mounted stores while they are measured.
struct Templates {
    opened: BTreeMap<Digest, Template>,
    rows: BTreeMap<Digest, TemplateMemory>,
    servings: BTreeMap<Digest, Vec<Serving>>,
    /// Files of the stores that hold them.
    files: BTreeSet<StorePath>,
}

impl Templates {
    fn of(mounts: &[Mount], only: Option<&Digest>) -> Result<Templates> {
        let mut all = Templates {
            opened: BTreeMap::new(),
            rows: BTreeMap::new(),
            servings: BTreeMap::new(),
            files: BTreeSet::new(),
        };
        let mut stores = BTreeSet::new();
        for mount in mounts {
            let store = Store::open(&mount.store)?;
            // One store may be mounted by several paths: below a bind mount its files are the same ones.
            let dir = std::fs::metadata(store.dir());
            let dir = dir.map_err(|e| Error::io("cannot read the store", store.dir(), e))?;
            if stores.insert((dir.dev(), dir.ino())) {
                all.add_store(&store, only)?;
            }
        }
        Ok(all)
    }

    fn add_store(&mut self, store: &Store, only: Option<&Digest>) -> Result<()> {
        let tags = store.tags()?;
        if only.is_none() {
            self.files.extend(store.pack_files()?);
        }
        for digest in store.digests()? {
            if only.is_some_and(|only| *only != digest) {
                continue;
            }
            let template = match store.template(&digest) {
                Ok(template) => template,
                // Inodes::of has named it in the log.
                Err(_) => continue,
            };
            let row = self.rows.entry(digest).or_insert_with(|| TemplateMemory {
                digest,
                tags: BTreeSet::new(),
                serving: String::new(),
                size_bytes: template.files().iter().map(|file| file.size).sum(),
                data_bytes: template.files().iter().map(|file| file.data_bytes).sum(),
                resident_bytes: Bytes::ZERO,
                store_cache_bytes: Bytes::ZERO,
                clones: 0,
            });
            // Another store may have the same template: its tags and its files are other ones.
            let ours = tags.iter().filter(|tag| tag.digest == digest);
            row.tags.extend(ours.map(|tag| format!("{}:{}", tag.name, tag.tag)));
            for path in template.store_files() {
                row.store_cache_bytes += residency::cached_store_file(&path)?;
                self.files.insert(path);
            }
            self.opened.entry(digest).or_insert(template);
        }
        Ok(())
    }

    fn add_residency(&mut self, resident: &residency::Resident) {
        for ((digest, serving), bytes) in resident {
            if let Some(row) = self.rows.get_mut(digest) {
                row.resident_bytes += *bytes;
                if *bytes > Bytes::ZERO {
                    self.servings.entry(*digest).or_default().push(*serving);
                }
            }
        }
    }

    fn add_clones(&mut self, clones: &[CloneProcess]) {
        for clone in clones {
            let mut digests: Vec<Digest> = clone.maps.iter().map(|map| map.digest).collect();
            digests.sort();
            digests.dedup();
            for digest in digests {
                if let Some(row) = self.rows.get_mut(&digest) {
                    row.clones += 1;
                }
            }
            for map in &clone.maps {
                self.servings.entry(map.digest).or_default().push(map.serving);
            }
        }
        for (digest, row) in &mut self.rows {
            let seen = self.servings.get(digest).map_or(&[][..], Vec::as_slice);
            let (passthrough, decode) =
                (seen.contains(&Serving::Passthrough), seen.contains(&Serving::Decode));
            row.serving = match (passthrough, decode) {
                (true, true) => "both",
                (true, false) => "passthrough",
                (false, true) => "decode",
                (false, false) => "idle",
            }
            .to_owned();
        }
    }

    fn store_cache(&self) -> Result<Bytes> {
        self.files.iter().map(residency::cached_store_file).sum()
    }

    fn rows(&self) -> Vec<TemplateMemory> {
        self.rows.values().cloned().collect()
    }
}

/// The pages of one clone that it has copied, as page numbers of the template's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DirtyRange {
    /// File of the template.
    pub file: String,
    /// First page of the file.
    pub first_page: u64,
    /// Number of pages.
    pub pages: PageCount,
    /// True when the copies lie in swap.
    pub swapped: bool,
}

/// What one process has copied; `None` when it maps no template or has ended.
///
/// # Errors
/// When a store cannot be read or the process may not be looked into.
pub fn dirty_of(pid: u32, mounts: &[Mount]) -> Result<Option<(CloneProcess, Vec<DirtyRange>)>> {
    let Some(clone) = find::look_at(pid, &Inodes::of(mounts)?)? else { return Ok(None) };
    let Some(measured) = measure(&clone)? else { return Ok(None) };
    let mut ranges = Vec::new();
    for (map, dirty) in clone.maps.iter().zip(&measured.dirty) {
        for copy in dirty {
            ranges.push(DirtyRange {
                file: map.file.clone(),
                first_page: (map.offset.get() + copy.range.start - map.start) / PAGE_SIZE,
                pages: PageCount::new(copy.pages()),
                swapped: copy.swapped,
            });
        }
    }
    Ok(Some((clone, ranges)))
}
