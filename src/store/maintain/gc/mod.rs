//! Garbage collection: removes session directories of killed writers and packs without a referenced record, and
//! rewrites packs with few referenced records.
//!
//! ```text
//!   a few packs: new packs ─▶ placements, one by one, each atomically ─▶ old packs removed ─▶ the next few
//! ```
//! A crash in between leaves packs that no placement references; the next run removes them. A reader with an older
//! placement finds a pack missing, reopens the placement and continues.

mod plan;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::liveness::{Liveness, PackUse};
use crate::error::{Code, Error, Result};
use crate::progress::Progress;
use crate::store::disk::pack::pack_path;
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{publish, sync_directory};
use crate::store::disk::seal::remove_pack;
use crate::store::disk::session::{Session, allocated, sweep};
use crate::store::format::PackId;
use crate::store::format::pack::IndexEntry;
use crate::store::write::block_index::{BlockIndex, Place};
use crate::store::write::pack_writer::{PACK_BYTES, PackWriter};
use crate::store::write::tables::TableWriter;
use crate::store::{Digest, Scratch, Store, Template};
use crate::units::Bytes;
use plan::{Plan, Share};

/// Result of a collection, or of its dry run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Removed session directories of killed writers.
    pub sessions: u64,
    /// Removed packs.
    pub removed_packs: u64,
    /// Removed packs whose referenced records were copied to new packs.
    pub repacked_packs: u64,
    /// New packs with the copied records.
    pub new_packs: u64,
    /// Templates whose placement was replaced.
    pub placements: u64,
    /// Bytes returned to the file system, in whole file-system blocks.
    pub freed_bytes: Bytes,
    /// Bytes of unreferenced records that remain in packs with mostly referenced records.
    pub dead_bytes: Bytes,
}

/// Options of a collection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Collect<'a> {
    /// If set, nothing is changed, and the collection is planned as if these templates were removed.
    pub dry_run: Option<&'a [Digest]>,
    /// Rewrite every pack with an unreferenced record, at any cost.
    pub all: bool,
}

/// New places of copied records.
type Moved = HashMap<(PackId, u32), Place>;

struct Run<'a> {
    store: &'a Store,
    interrupt: &'a AtomicBool,
    progress: &'a dyn Progress,
}

impl Store {
    /// Removes unreferenced data, or with `dry_run` computes what would be removed. Waits for running imports to
    /// finish, and makes new imports wait. Readers are not affected.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`] if an import is still running after 15 s. Returns [`Code::Damage`] if the references
    /// of a template cannot be read; no pack is removed then. Returns an error if a system call fails, or if
    /// `interrupt` becomes true; data removed before the error stays removed.
    pub fn collect(
        &self,
        Collect { dry_run, all }: Collect<'_>,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Collected> {
        let _content = match dry_run {
            Some(_) => None,
            None => Some(self.lock_content_alone(interrupt)?),
        };
        let (sessions, swept) = sweep(&self.tmp_dir(), dry_run.is_some());
        // A removal that is not confirmed yet may be undone. Until then its template is not listed.
        let names = match dry_run {
            Some(_) => None,
            None => Some(self.lock_names_while(|| check(interrupt))?),
        };
        names.as_ref().map_or(Ok(()), |_| self.restore_set_aside())?;
        let liveness = Liveness::analyze_without(self, dry_run.unwrap_or_default(), interrupt, progress)?;
        drop(names);
        if let Some((digest, error)) = liveness.unreadable.first() {
            return Err(Error::new(
                Code::Damage,
                format!("cannot read the block references of template {digest}, so no pack was removed: {error}"),
            )
            .at(self.dir())
            .hint("import the same memory again to repair the template, or run 'stencil rm DIGEST' to remove it"));
        }
        let packs = liveness.packs.iter().filter(|(_, pack)| !pack.has_unindexed);
        let packs = packs.map(|(id, pack)| {
            let (all, live) = pack.bytes();
            Share { id: *id, all, live }
        });
        let plan = Plan::of(packs, all);
        let run = Run { store: self, interrupt, progress };
        let mut done =
            Collected { sessions, dead_bytes: Bytes::new(plan.remaining_dead), ..Collected::default() };
        let freed = match dry_run {
            Some(_) => run.estimate(&liveness, plan, &mut done),
            None => run.collect(liveness, plan, &mut done)?,
        };
        done.freed_bytes = Bytes::new(swept + freed);
        Ok(done)
    }
}

fn affected<'c>(liveness: &'c Liveness, packs: &BTreeSet<PackId>) -> impl Iterator<Item = &'c Digest> {
    let affected = liveness.templates.iter().filter(|t| t.pack_ids().iter().any(|id| packs.contains(id)));
    affected.map(Template::digest)
}

fn check(interrupt: &AtomicBool) -> Result<()> {
    match interrupt.load(Ordering::Relaxed) {
        true => Err(Error::failed("interrupted; data removed so far stays removed")),
        false => Ok(()),
    }
}

impl Run<'_> {
    fn allocated(&self, id: PackId) -> u64 {
        allocated(&self.store.packs().path(id))
    }

    fn check(&self) -> Result<()> {
        check(self.interrupt)
    }

    /// Returns the bytes that an unprivileged user can allocate on the store's file system.
    fn available_bytes(&self) -> u64 {
        rustix::fs::statvfs(self.store.dir()).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }

    fn estimate(&self, liveness: &Liveness, mut plan: Plan, done: &mut Collected) -> u64 {
        let live = plan.live();
        let mut old: u64 = plan.remove.iter().map(|id| self.allocated(*id)).sum();
        let mut repacked = BTreeSet::new();
        loop {
            let round = plan.next_round(u64::MAX);
            if round.is_empty() {
                break;
            }
            done.new_packs += round.iter().map(|pack| pack.live).sum::<u64>().div_ceil(PACK_BYTES);
            old += round.iter().map(|pack| self.allocated(pack.id)).sum::<u64>();
            repacked.extend(round.iter().map(|pack| pack.id));
        }
        done.removed_packs = (plan.remove.len() + repacked.len()) as u64;
        done.repacked_packs = repacked.len() as u64;
        done.placements = affected(liveness, &repacked).count() as u64;
        old.saturating_sub(live.next_multiple_of(4096))
    }

    fn collect(&self, mut liveness: Liveness, mut plan: Plan, done: &mut Collected) -> Result<u64> {
        // Packs without referenced records go first: they need no space and make room for the copies.
        let mut freed = self.remove(&mut liveness, &plan.remove)?;
        done.removed_packs = plan.remove.len() as u64;
        let index = BlockIndex::empty(self.store);
        let (mut added, mut replaced) = (0, BTreeSet::new());
        self.progress.start("repack", Some(Bytes::new(plan.live())));
        let rounds = loop {
            let round = plan.next_round(self.available_bytes());
            if round.is_empty() {
                break Ok(());
            }
            match self.round(&mut liveness, &round, &index, &mut replaced, done) {
                Ok((removed, new)) => (freed, added) = (freed + removed, added + new),
                Err(error) => break Err(error),
            }
        };
        self.progress.finish();
        rounds.map_err(|error| match error.errno() {
            Some(libc::ENOSPC | libc::EDQUOT) => error
                .context(format!("the collection stopped (packs removed: {})", done.removed_packs))
                .hint(format!(
                    "free {} on that file system, then run the command again",
                    Bytes::new(PACK_BYTES)
                )),
            _ => error,
        })?;
        done.placements = replaced.len() as u64;
        Ok(freed.saturating_sub(added))
    }

    /// Rewrites the packs of one round. Returns the bytes freed and the bytes allocated for new packs.
    fn round(
        &self,
        liveness: &mut Liveness,
        round: &[Share],
        index: &BlockIndex,
        replaced: &mut BTreeSet<Digest>,
        done: &mut Collected,
    ) -> Result<(u64, u64)> {
        let session = Session::create(&self.store.tmp_dir())?;
        let (moved, copied, packs) = self.copy(liveness, round, index, session.path())?;
        let mut added = 0;
        for id in &packs {
            let path = pack_path(session.path(), *id);
            added += allocated(&path);
            publish(&path, &self.store.packs().path(*id))?;
        }
        sync_directory(&self.store.packs_dir())?;
        let directory = session.path().join("image");
        for digest in affected(liveness, &copied) {
            self.check()?;
            // An earlier round may have replaced the placement since the analysis.
            let template = match self.store.template(digest) {
                Ok(template) => template,
                Err(_) => {
                    // A removal that is not confirmed yet may be undone. The template then has its old placement again.
                    let _names = self.store.lock_names_while(|| self.check())?;
                    match self.store.template(digest) {
                        Ok(template) => template,
                        Err(_) if !self.store.find(digest)? => continue,
                        Err(error) => return Err(error),
                    }
                }
            };
            rewrite(&template, &moved, &copied, &directory)?;
            let names = self.store.lock_names_while(|| self.check())?;
            if self.store.has(digest) {
                publish(&directory.join("placement"), &template.directory().join("placement"))?;
                sync_directory(&template.directory())?;
                replaced.insert(*digest);
            }
            drop(names);
            directory.remove_tree().map_err(|e| directory.error("cannot remove", e))?;
        }
        let freed = self.remove(liveness, &copied)?;
        done.removed_packs += copied.len() as u64;
        done.repacked_packs += copied.len() as u64;
        done.new_packs += packs.len() as u64;
        Ok((freed, added))
    }

    fn remove(&self, liveness: &mut Liveness, packs: &BTreeSet<PackId>) -> Result<u64> {
        let mut freed = 0;
        for id in packs {
            self.check()?;
            let path = self.store.packs().path(*id);
            freed += allocated(&path);
            remove_pack(&path)?;
            // A removed file keeps its disk space while it is open or mapped.
            self.store.packs().forget(*id);
            liveness.packs.remove(id);
        }
        sync_directory(&self.store.packs_dir())?;
        Ok(freed)
    }

    /// Copies the referenced records of these packs into new packs. Returns the new place of each record, the packs
    /// that were copied completely, and the new packs.
    fn copy(
        &self,
        liveness: &Liveness,
        round: &[Share],
        index: &BlockIndex,
        directory: &StorePath,
    ) -> Result<(Moved, BTreeSet<PackId>, Vec<PackId>)> {
        let mut writer = PackWriter::new(directory, index);
        let (mut moved, mut copied) = (Moved::new(), BTreeSet::new());
        for Share { id, .. } in round {
            match self.read(*id, &liveness.packs[id]) {
                Ok(records) => {
                    for (entry, record) in &records {
                        let place = match index.find_written(&entry.hash) {
                            Some(place) => place,
                            None => writer.append(entry.hash, record, entry.stored)?,
                        };
                        moved.insert((*id, entry.stored.offset), place);
                    }
                    copied.insert(*id);
                }
                // The pack is left as it is: intact records in it remain readable, and `verify` reports the damaged
                // ones.
                Err(e) if e.code() == Code::Damage => log::warn!("{e}; the pack is left unchanged"),
                Err(e) => return Err(e),
            }
        }
        Ok((moved, copied, writer.finish()?.packs))
    }

    /// Reads and verifies the referenced records of a pack, as they are stored. If one of them is damaged, no record is
    /// copied: a copy would only take space beside the pack, which has to stay.
    fn read(&self, id: PackId, pack_use: &PackUse) -> Result<Vec<(IndexEntry, Box<[u8]>)>> {
        let pack = self.store.packs().get(id)?;
        let mut scratch = Scratch::default();
        let mut records = Vec::new();
        for entry in pack_use.live() {
            self.check()?;
            let entry = entry.map_err(|e| e.in_file("pack", self.store.packs().path(id)))?;
            let record = scratch.verify(&pack, entry.stored, &entry.hash)?;
            self.progress.advance(Bytes::new(entry.stored.length.into()));
            records.push((entry, record.into()));
        }
        Ok(records)
    }
}

/// Writes the tables of a template with the new places of its blocks.
fn rewrite(template: &Template, moved: &Moved, gone: &BTreeSet<PackId>, directory: &StorePath) -> Result<()> {
    let files = template.files().iter().map(|f| (f.name.clone(), f.kind));
    let mut tables = TableWriter::new(directory, files)?;
    for (number, file) in template.files().iter().enumerate() {
        for block in 0..template.block_count(number) {
            let Some((hash, pack, stored)) = template.place(number, block)? else {
                tables.zeros(1)?;
                continue;
            };
            let place = match moved.get(&(pack, stored.offset)) {
                Some(place) if gone.contains(&pack) => *place,
                None if gone.contains(&pack) => {
                    return Err(Error::failed(format!("block {hash} of pack {pack} was not copied")));
                }
                _ => Place { pack, stored },
            };
            tables.block(&hash, place)?;
        }
        tables.end_file(file.size.get());
    }
    let written = tables.finish()?.digest;
    if written != *template.digest() {
        return Err(Error::failed(format!(
            "rewritten tables of template {} have digest {written}",
            template.digest()
        )));
    }
    sync_directory(directory)
}
