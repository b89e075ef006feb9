//! Which records of the packs are needed, and by whom.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use super::format::pack::IndexEntry;
use super::format::{Invalid, PackId};
use super::pack::PackIndex;
use super::{Digest, Store, Template};
use crate::error::{Error, Result};

const NOBODY: u32 = u32::MAX;
const SEVERAL: u32 = u32::MAX - 1;

/// Who needs a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Nobody,
    /// The template of that number alone.
    One(usize),
    Several,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    offset: u32,
    length: u32,
    /// Its number in the index.
    entry: u32,
    owner: u32,
}

/// What is known of one pack.
#[derive(Debug)]
pub(super) struct PackUse {
    index: Option<PackIndex>,
    /// In the order of offsets.
    records: Vec<Record>,
    /// A template needs something of it that its index does not know: nothing of it may be given back.
    pub strange: bool,
}

impl PackUse {
    fn new(store: &Store, id: PackId) -> PackUse {
        let index = PackIndex::open(&store.packs().path(id), id)
            .inspect_err(|e| log::warn!("{e}; what it holds is not known"))
            .ok();
        let mut records = Vec::new();
        let mut strange = false;
        for entry in 0..index.as_ref().map_or(0, PackIndex::len) {
            match index.as_ref().map(|i| i.entry(entry)) {
                Some(Ok(IndexEntry { stored, .. })) => records.push(Record {
                    offset: stored.offset,
                    length: stored.length,
                    entry: entry as u32,
                    owner: NOBODY,
                }),
                _ => strange = true,
            }
        }
        records.sort_unstable_by_key(|r| r.offset);
        PackUse { index, records, strange }
    }

    fn mark(&mut self, offset: u32, template: u32) {
        match self.records.binary_search_by_key(&offset, |r| r.offset) {
            Ok(at) => {
                let owner = &mut self.records[at].owner;
                *owner = if *owner == NOBODY || *owner == template { template } else { SEVERAL };
            }
            Err(_) => self.strange = true,
        }
    }

    /// Length and owner of each record.
    pub fn records(&self) -> impl Iterator<Item = (u64, Owner)> {
        self.records.iter().map(|r| {
            let owner = match r.owner {
                NOBODY => Owner::Nobody,
                SEVERAL => Owner::Several,
                one => Owner::One(one as usize),
            };
            (r.length.into(), owner)
        })
    }

    /// Bytes of all records, and of those that somebody needs.
    pub fn bytes(&self) -> (u64, u64) {
        let all = self.records().map(|(length, _)| length).sum();
        let live = self.records().filter(|(_, o)| *o != Owner::Nobody).map(|(length, _)| length).sum();
        (all, live)
    }

    /// The records that somebody needs, in the order of offsets.
    pub fn live(&self) -> impl Iterator<Item = Result<IndexEntry, Invalid>> {
        let needed = self.records.iter().filter(|r| r.owner != NOBODY);
        needed.filter_map(|r| Some(self.index.as_ref()?.entry(r.entry as usize)))
    }
}

/// All packs, and who needs what of them.
#[derive(Debug)]
pub(super) struct Census {
    pub packs: BTreeMap<PackId, PackUse>,
    pub templates: Vec<Template>,
    /// What these need is not known.
    pub unreadable: Vec<(Digest, Error)>,
}

impl Census {
    /// Counts. Memory: sixteen bytes for each block that is stored, and four for each block of one template.
    ///
    /// # Errors
    /// When the store cannot be listed, or `interrupt` became true.
    pub fn take(store: &Store, interrupt: &AtomicBool) -> Result<Census> {
        Census::take_without(store, &[], interrupt)
    }

    /// The same, as if the store did not have these templates.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_without(store: &Store, without: &[Digest], interrupt: &AtomicBool) -> Result<Census> {
        let without: HashSet<&Digest> = without.iter().collect();
        let packs = store.packs().ids()?.into_iter().map(|id| (id, PackUse::new(store, id))).collect();
        let mut census = Census { packs, templates: Vec::new(), unreadable: Vec::new() };
        for digest in store.digests()?.into_iter().filter(|digest| !without.contains(digest)) {
            let counted = store.template(&digest).and_then(|template| {
                census.count(&template, interrupt)?;
                Ok(template)
            });
            match counted {
                Ok(template) => census.templates.push(template),
                Err(error) if interrupt.load(Ordering::Relaxed) => return Err(error),
                // Removed meanwhile.
                Err(_) if !store.is_listed(&digest) && !store.find(&digest)? => {}
                Err(error) => census.unreadable.push((digest, error)),
            }
        }
        Ok(census)
    }

    /// Marks what the template needs, all of it or, where its tables turn out damaged, nothing.
    fn count(&mut self, template: &Template, interrupt: &AtomicBool) -> Result<()> {
        let mut needed: BTreeMap<PackId, Vec<u32>> = BTreeMap::new();
        for file in 0..template.files().len() {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::failed("interrupted: nothing was changed"));
            }
            for block in 0..template.block_count(file) {
                if let Some((_, id, stored)) = template.place(file, block)? {
                    needed.entry(id).or_default().push(stored.offset);
                }
            }
        }
        let number = self.templates.len() as u32;
        for (id, offsets) in needed {
            if let Some(pack) = self.packs.get_mut(&id) {
                offsets.into_iter().for_each(|offset| pack.mark(offset, number));
            }
        }
        Ok(())
    }

    /// Tells of each template the records that others need too, each once.
    pub fn shared_by(&self, mut tell: impl FnMut(usize, u64)) -> Result<()> {
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
                    let fresh = bits[at / 64] & (1 << (at % 64)) == 0;
                    bits[at / 64] |= 1 << (at % 64);
                    if fresh && pack.records[at].owner == SEVERAL {
                        tell(number, stored.length.into());
                    }
                }
            }
        }
        Ok(())
    }
}
