//! Liveness analysis of pack records: which records are referenced, and by which templates.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::disk::pack::PackIndex;
use crate::store::format::pack::IndexEntry;
use crate::store::format::{Invalid, PackId};
use crate::store::{Digest, Store, Template};
use crate::units::Bytes;

const UNREFERENCED: u32 = u32::MAX;
const SHARED: u32 = u32::MAX - 1;

/// The templates that reference a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Owner {
    Unreferenced,
    /// Only the template with this index in [`Liveness::templates`].
    One(usize),
    Shared,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    offset: u32,
    length: u32,
    /// Position of the record's entry in the pack index.
    entry: u32,
    owner: u32,
}

/// Records of one pack and the templates that reference them.
#[derive(Debug)]
pub(in crate::store) struct PackUse {
    index: Option<PackIndex>,
    /// Sorted by offset.
    records: Vec<Record>,
    /// Set if the index has an unreadable entry, or if a template references a record that the index does not list.
    /// Then no record of this pack may be removed.
    pub has_unindexed: bool,
}

impl PackUse {
    fn new(store: &Store, id: PackId) -> PackUse {
        let index = PackIndex::open(&store.packs().path(id), id)
            .inspect_err(|e| log::warn!("{e}; cannot tell which of its records are referenced"))
            .ok();
        let mut records = Vec::new();
        let mut has_unindexed = false;
        for (number, entry) in (0..).zip(0..index.as_ref().map_or(0, PackIndex::len)) {
            match index.as_ref().map(|i| i.entry(entry)) {
                Some(Ok(IndexEntry { stored, .. })) => records.push(Record {
                    offset: stored.offset,
                    length: stored.length,
                    entry: number,
                    owner: UNREFERENCED,
                }),
                _ => has_unindexed = true,
            }
        }
        records.sort_unstable_by_key(|r| r.offset);
        PackUse { index, records, has_unindexed }
    }

    fn mark(&mut self, offset: u32, template: u32) {
        match self.records.binary_search_by_key(&offset, |r| r.offset) {
            Ok(at) => {
                let owner = &mut self.records[at].owner;
                *owner = if *owner == UNREFERENCED || *owner == template { template } else { SHARED };
            }
            Err(_) => self.has_unindexed = true,
        }
    }

    /// Returns the length and the owner of each record.
    pub fn records(&self) -> impl Iterator<Item = (u64, Owner)> {
        self.records.iter().map(|r| {
            let owner = match r.owner {
                UNREFERENCED => Owner::Unreferenced,
                SHARED => Owner::Shared,
                one => Owner::One(one as usize),
            };
            (r.length.into(), owner)
        })
    }

    /// Returns the bytes of all records, and the bytes of the referenced records.
    pub fn bytes(&self) -> (u64, u64) {
        let all = self.records().map(|(length, _)| length).sum();
        let live = self.records().filter(|(_, o)| *o != Owner::Unreferenced).map(|(length, _)| length).sum();
        (all, live)
    }

    /// Returns the index entries of the referenced records, sorted by offset.
    pub fn live(&self) -> impl Iterator<Item = Result<IndexEntry, Invalid>> {
        let referenced = self.records.iter().filter(|r| r.owner != UNREFERENCED);
        referenced.filter_map(|r| Some(self.index.as_ref()?.entry(r.entry as usize)))
    }
}

/// All packs of a store, with the references to their records.
#[derive(Debug)]
pub(in crate::store) struct Liveness {
    pub packs: BTreeMap<PackId, PackUse>,
    pub templates: Vec<Template>,
    /// Templates that could not be read, so that their references are unknown.
    pub unreadable: Vec<(Digest, Error)>,
}

impl Liveness {
    /// Analyzes the whole store. Uses 16 bytes of memory for each stored block, and 4 bytes for each block of the
    /// template being counted.
    ///
    /// # Errors
    /// Returns an error if the store cannot be listed, or if `interrupt` becomes true.
    pub fn analyze(store: &Store, interrupt: &AtomicBool, progress: &dyn Progress) -> Result<Liveness> {
        Liveness::analyze_without(store, &[], interrupt, progress)
    }

    /// Same as [`analyze`](Self::analyze), but ignores the templates `without`.
    ///
    /// # Errors
    /// Same as [`analyze`](Self::analyze).
    pub fn analyze_without(
        store: &Store,
        without: &[Digest],
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Liveness> {
        let without: HashSet<&Digest> = without.iter().collect();
        let packs = store.packs().ids()?.into_iter().map(|id| (id, PackUse::new(store, id))).collect();
        let mut liveness = Liveness { packs, templates: Vec::new(), unreadable: Vec::new() };
        let digests = store.digests()?;
        progress.start_count("references", "templates", digests.len() as u64);
        for digest in digests.into_iter().filter(|digest| !without.contains(digest)) {
            let counted = store.template(&digest).and_then(|template| {
                liveness.count(&template, interrupt)?;
                Ok(template)
            });
            match counted {
                Ok(template) => liveness.templates.push(template),
                Err(error) if interrupt.load(Ordering::Relaxed) => return Err(error),
                // The template was removed after the store was listed.
                Err(_) if !store.is_listed(&digest) && !store.find(&digest)? => {}
                Err(error) => liveness.unreadable.push((digest, error)),
            }
            progress.advance(Bytes::new(1));
        }
        progress.finish();
        Ok(liveness)
    }

    /// Marks the records that `template` references. Marks none of them if a table of the template is damaged.
    fn count(&mut self, template: &Template, interrupt: &AtomicBool) -> Result<()> {
        let mut references: BTreeMap<PackId, Vec<u32>> = BTreeMap::new();
        for file in 0..template.files().len() {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::failed("interrupted; the store was not changed"));
            }
            for block in 0..template.block_count(file) {
                if let Some((_, id, stored)) = template.place(file, block)? {
                    references.entry(id).or_default().push(stored.offset);
                }
            }
        }
        let number = u32::try_from(self.templates.len())
            .map_err(|_| Error::failed("the store has too many templates for a garbage collection"))?;
        for (id, offsets) in references {
            if let Some(pack) = self.packs.get_mut(&id) {
                offsets.into_iter().for_each(|offset| pack.mark(offset, number));
            }
        }
        Ok(())
    }

    /// Calls `report` with the template's index and the record's length for each record that a template shares with
    /// other templates; once for each pair of template and record.
    pub fn shared_by(&self, progress: &dyn Progress, mut report: impl FnMut(usize, u64)) -> Result<()> {
        progress.start_count("sharing", "templates", self.templates.len() as u64);
        for (number, template) in self.templates.iter().enumerate() {
            let mut seen: BTreeMap<PackId, Vec<u64>> = BTreeMap::new();
            for file in 0..template.files().len() {
                for block in 0..template.block_count(file) {
                    let Some((_, id, stored)) = template.place(file, block)? else { continue };
                    let Some(pack) = self.packs.get(&id) else { continue };
                    let Ok(at) = pack.records.binary_search_by_key(&stored.offset, |r| r.offset) else {
                        continue;
                    };
                    let bits = seen.entry(id).or_insert_with(|| vec![0; pack.records.len().div_ceil(64)]);
                    let is_first = bits[at / 64] & (1 << (at % 64)) == 0;
                    bits[at / 64] |= 1 << (at % 64);
                    if is_first && pack.records[at].owner == SHARED {
                        report(number, stored.length.into());
                    }
                }
            }
            progress.advance(Bytes::new(1));
        }
        progress.finish();
        Ok(())
    }
}
