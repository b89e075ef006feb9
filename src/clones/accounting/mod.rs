//! Memory accounting: the pages that each clone has copied, and the RAM that all clones take.
//!
//! `host_bytes` is exactly the sum of its parts: template pages in RAM (counted once), the RAM of the store and its
//! daemons, distinct private pages, page tables, the clones' memory outside templates, and the clones' disks in RAM.

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

/// One template and the RAM that all its clones share.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateMemory {
    /// Digest of the template.
    pub digest: Digest,
    /// All tags of the template, as `NAME:TAG`.
    pub tags: BTreeSet<String>,
    /// `passthrough`, `decode`, or `both` while mappings from before a promotion live; `idle` without pages or
    /// mappings.
    pub serving: String,
    /// Length of all files.
    pub size_bytes: Bytes,
    /// Size of the pages that are not zero.
    pub data_bytes: Bytes,
    /// Pages in the page cache, of both ways of serving and all mounts.
    pub resident_bytes: Bytes,
    /// Page cache of the store's files that hold the template. A file that several templates share is counted for each.
    pub store_cache_bytes: Bytes,
    /// Number of clones that map the template.
    pub clones: u64,
}

/// One clone and its memory.
#[derive(Debug, Clone, Serialize)]
pub struct CloneRow {
    /// Id that `stencil clone` assigned, or the process id.
    pub id: String,
    /// Process id.
    pub pid: u32,
    /// All processes that share the address space; `pid` is the first.
    pub pids: Vec<u32>,
    /// Name given at launch, or the name of the command.
    pub name: String,
    /// Control group.
    pub cgroup: String,
    /// Real user id.
    pub uid: u32,
    /// Template of the first mapping.
    pub template: Digest,
    /// `simulated`, `qemu`, `command`, or `other` for a process that Stencil did not launch.
    pub kind: String,
    /// Memory figures.
    #[serde(flatten)]
    pub memory: CloneMemory,
    /// Template mappings.
    pub maps: Vec<TemplateMapping>,
}

/// The result of `stencil density`.
#[derive(Debug, Clone, Serialize)]
pub struct Density {
    /// Templates of all mounts.
    pub templates: Vec<TemplateMemory>,
    /// All clones, by process id.
    pub clones: Vec<CloneRow>,
    /// Sums over all clones.
    pub totals: Totals,
}

/// A measurement and its inputs, for the audit.
#[derive(Debug)]
pub struct Survey {
    /// The result of the measurement.
    pub density: Density,
    /// The mappings of each clone, and the addresses of its copied pages.
    pub clones: Vec<(CloneProcess, Measured)>,
    /// The files that the inode numbers belong to.
    pub inodes: Inodes,
    /// Free memory of the host before the launch, if all clones belong to one launch with a baseline.
    pub baseline: Option<Baseline>,
}

/// Measures all clones of these mounts, or the clones of one template.
///
/// # Errors
/// Returns an error if a store, a supervisor or a process cannot be read: a partial sum would be wrong.
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
    let records = records_by_process(entries);
    let copied = totals::Copied::of(&clones, &templates.opened, &records)?;
    let totals = Totals::new(&clones, &templates.rows(), store_cache, frames::distinct(&clones)?, copied)?;
    let rows = clones.iter().map(|(clone, measured)| row(clone, measured, &records)).collect();
    let baseline = baseline(&clones, &records);
    let density = Density { templates: templates.rows(), clones: rows, totals };
    Ok(Survey { density, clones, inodes, baseline })
}

/// Returns the baseline that all of these clones have in common. Two launches that started at the same time may both
/// have a baseline; then neither baseline excludes the clones of the other launch.
fn baseline(clones: &[(CloneProcess, Measured)], records: &Records) -> Option<Baseline> {
    let mut of_clones = clones.iter().filter_map(|(clone, _)| record_of(clone, records)?.baseline);
    let first = of_clones.next()?;
    of_clones.all(|other| other == first).then_some(first)
}

/// The records of clones by their process.
type Records = HashMap<ProcessId, registry::Entry>;

fn records_by_process(entries: Vec<registry::Entry>) -> Records {
    entries.into_iter().filter_map(|entry| Some((entry.process()?, entry))).collect()
}

/// Returns the record of a clone. The record may name any process of the clone's address space.
fn record_of<'a>(clone: &CloneProcess, records: &'a Records) -> Option<&'a registry::Entry> {
    clone.processes().find_map(|process| records.get(&process))
}

fn row(clone: &CloneProcess, measured: &Measured, records: &Records) -> CloneRow {
    let entry = record_of(clone, records);
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

/// The templates of all mounted stores during a measurement.
struct Templates {
    opened: BTreeMap<Digest, Template>,
    rows: BTreeMap<Digest, TemplateMemory>,
    servings: BTreeMap<Digest, Vec<Serving>>,
    /// Files of the stores that hold the templates.
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
            // A store may be mounted by several paths. Through a bind mount, its files are the same.
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
                // Inodes::of has logged the error.
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
            // Several stores may have the same template, with separate tags and files.
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

/// A range of pages that one clone has copied, in pages of the template's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DirtyRange {
    /// File of the template.
    pub file: String,
    /// First page of the range.
    pub first_page: u64,
    /// Number of pages.
    pub pages: PageCount,
    /// True if the copied pages are in swap.
    pub swapped: bool,
}

/// Returns the pages that one process has copied; `None` if it maps no template or has exited.
///
/// # Errors
/// Returns an error if a store cannot be read or the process cannot be inspected.
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
