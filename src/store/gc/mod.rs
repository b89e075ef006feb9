//! Gives back what nobody needs: sessions of the dead, packs without a needed block, and, by writing them anew, packs of
//! which little is needed.
//!
//! ```text
//!   a few packs: new packs ─▶ placements, one by one, each in one step ─▶ old packs go ─▶ the next few
//! ```
//! A crash in between leaves packs that no placement names: the next run takes them. A reader with an older placement
//! meets a missing pack, opens the placement anew and goes on.

mod plan;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use self::plan::{Plan, Share};
use super::census::{Census, PackUse};
use super::format::PackId;
use super::format::pack::IndexEntry;
use super::known::{Known, Place};
use super::pack::pack_path;
use super::pack_writer::{PACK_BYTES, PackWriter};
use super::path::StorePath;
use super::publish::{publish, sync_folder};
use super::session::{Session, allocated, sweep};
use super::tables::TableWriter;
use super::{Digest, Scratch, Store, Template};
use crate::error::{Code, Error, Result};
use crate::progress::Progress;
use crate::units::Bytes;

/// What a collection has given back, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Folders of writers that were killed.
    pub sessions: u64,
    /// Packs that are gone.
    pub removed_packs: u64,
    /// How many of these were written anew, for something in them is needed.
    pub repacked_packs: u64,
    /// Packs that took their place.
    pub new_packs: u64,
    /// Templates whose placement was replaced.
    pub placements: u64,
    /// What the filesystem has got back, in whole blocks.
    pub freed_bytes: Bytes,
    /// Records that nobody needs, in packs that are mostly needed.
    pub dead_bytes: Bytes,
}

/// How a collection is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Collect<'a> {
    /// Nothing is changed, and these templates count as removed.
    pub dry_run: Option<&'a [Digest]>,
    /// Packs with any unreferenced record are rewritten, whatever that costs.
    pub all: bool,
}

/// Where records are now.
type Moved = HashMap<(PackId, u32), Place>;

struct Run<'a> {
    store: &'a Store,
    interrupt: &'a AtomicBool,
    progress: &'a dyn Progress,
}

impl Store {
    /// Gives back what nobody needs, or says with `dry_run` what that would be. Waits until no import is under way, and keeps
    /// new ones waiting. Readers go on.
    ///
    /// # Errors
    /// [`Code::TryAgain`] when an import does not end within 15 s. [`Code::Damage`] when it cannot be known what a template needs: then no pack is touched. What the filesystem
    /// says, or that `interrupt` became true; whatever was given back until then stays so.
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
        // A removal that is not sure yet may put a template back: meanwhile it is in no list.
        let names = match dry_run {
            Some(_) => None,
            None => Some(self.lock_names_while(|| check(interrupt))?),
        };
        names.as_ref().map_or(Ok(()), |_| self.settle_graves())?;
        let census = Census::take_without(self, dry_run.unwrap_or_default(), interrupt)?;
        drop(names);
        if let Some((digest, error)) = census.unreadable.first() {
            return Err(Error::new(
                Code::Damage,
                format!("what template {digest} needs is not known, so no pack is given back: {error}"),
            )
            .at(self.dir())
            .remedy("import the same memory again to repair it, or remove it: stencil rm DIGEST"));
        }
        let packs = census.packs.iter().filter(|(_, pack)| !pack.strange);
        let packs = packs.map(|(id, pack)| {
            let (all, live) = pack.bytes();
            Share { id: *id, all, live }
        });
        let plan = Plan::of(packs, all);
        let run = Run { store: self, interrupt, progress };
        let mut done = Collected { sessions, dead_bytes: Bytes::new(plan.stays), ..Collected::default() };
        let freed = match dry_run {
            Some(_) => run.estimate(&census, plan, &mut done),
            None => run.collect(census, plan, &mut done)?,
        };
        done.freed_bytes = Bytes::new(swept + freed);
        Ok(done)
    }
}

fn affected<'c>(census: &'c Census, packs: &BTreeSet<PackId>) -> impl Iterator<Item = &'c Digest> {
    let affected = census.templates.iter().filter(|t| t.pack_ids().iter().any(|id| packs.contains(id)));
    affected.map(Template::digest)
}

fn check(interrupt: &AtomicBool) -> Result<()> {
    match interrupt.load(Ordering::Relaxed) {
        true => Err(Error::failed("interrupted: what was given back until then stays so")),
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

    /// What is free where the store lies, for those who are not root.
    fn room(&self) -> u64 {
        rustix::fs::statvfs(self.store.dir()).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }

    fn estimate(&self, census: &Census, mut plan: Plan, done: &mut Collected) -> u64 {
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
        done.placements = affected(census, &repacked).count() as u64;
        old.saturating_sub(live.next_multiple_of(4096))
    }

    fn collect(&self, mut census: Census, mut plan: Plan, done: &mut Collected) -> Result<u64> {
        // What needs no work comes first: it makes room for what does.
        let mut freed = self.remove(&mut census, &plan.remove)?;
        done.removed_packs = plan.remove.len() as u64;
        let known = Known::nothing(self.store);
        let (mut taken, mut replaced) = (0, BTreeSet::new());
        self.progress.start("repack", Some(Bytes::new(plan.live())));
        let rounds = loop {
            let round = plan.next_round(self.room());
            if round.is_empty() {
                break Ok(());
            }
            match self.round(&mut census, &round, &known, &mut replaced, done) {
                Ok((given, new)) => (freed, taken) = (freed + given, taken + new),
                Err(error) => break Err(error),
            }
        };
        self.progress.finish();
        rounds.map_err(|error| match error.errno() {
            Some(libc::ENOSPC | libc::EDQUOT) => error
                .context(format!("packs given back: {}; then", done.removed_packs))
                .remedy(format!("free {} on that filesystem, then run it again", Bytes::new(PACK_BYTES))),
            _ => error,
        })?;
        done.placements = replaced.len() as u64;
        Ok(freed.saturating_sub(taken))
    }

    /// Writes these packs anew, as a whole. Gives what has become free, and what the new ones take.
    fn round(
        &self,
        census: &mut Census,
        round: &[Share],
        known: &Known,
        replaced: &mut BTreeSet<Digest>,
        done: &mut Collected,
    ) -> Result<(u64, u64)> {
        let session = Session::begin(&self.store.tmp_dir())?;
        let (moved, whole, packs) = self.copy(census, round, known, session.path())?;
        let mut taken = 0;
        for id in &packs {
            let path = pack_path(session.path(), *id);
            taken += allocated(&path);
            publish(&path, &self.store.packs().path(*id))?;
        }
        sync_folder(&self.store.packs_dir())?;
        let folder = session.path().join("image");
        for digest in affected(census, &whole) {
            self.check()?;
            // As it is after the rounds before.
            let template = match self.store.template(digest) {
                Ok(template) => template,
                Err(_) => {
                    // A removal that is not sure yet puts it back, with the placement of before.
                    let _names = self.store.lock_names_while(|| self.check())?;
                    match self.store.template(digest) {
                        Ok(template) => template,
                        Err(_) if !self.store.find(digest)? => continue,
                        Err(error) => return Err(error),
                    }
                }
            };
            rewrite(&template, &moved, &whole, &folder)?;
            let names = self.store.lock_names_while(|| self.check())?;
            if self.store.has(digest) {
                publish(&folder.join("placement"), &template.folder().join("placement"))?;
                sync_folder(&template.folder())?;
                replaced.insert(*digest);
            }
            drop(names);
            folder.remove_tree().map_err(|e| folder.error("cannot remove", e))?;
        }
        let freed = self.remove(census, &whole)?;
        done.removed_packs += whole.len() as u64;
        done.repacked_packs += whole.len() as u64;
        done.new_packs += packs.len() as u64;
        Ok((freed, taken))
    }

    fn remove(&self, census: &mut Census, packs: &BTreeSet<PackId>) -> Result<u64> {
        let mut freed = 0;
        for id in packs {
            self.check()?;
            let path = self.store.packs().path(*id);
            freed += allocated(&path);
            path.remove_file().map_err(|e| path.error("cannot remove the pack", e))?;
            // What is open or mapped keeps its room.
            self.store.packs().forget(*id);
            census.packs.remove(id);
        }
        sync_folder(&self.store.packs_dir())?;
        Ok(freed)
    }

    /// Copies what is needed of these packs into new ones. Gives where each record is now, the packs of which everything
    /// was copied, and the new ones.
    fn copy(
        &self,
        census: &Census,
        round: &[Share],
        known: &Known,
        folder: &StorePath,
    ) -> Result<(Moved, BTreeSet<PackId>, Vec<PackId>)> {
        let mut writer = PackWriter::new(folder, known);
        let (mut moved, mut whole) = (Moved::new(), BTreeSet::new());
        for Share { id, .. } in round {
            match self.read(*id, &census.packs[id]) {
                Ok(records) => {
                    for (entry, record) in &records {
                        let place = match known.find_own(&entry.hash) {
                            Some(place) => place,
                            None => writer.append(entry.hash, record, entry.stored)?,
                        };
                        moved.insert((*id, entry.stored.offset), place);
                    }
                    whole.insert(*id);
                }
                // It stays as it is: what is whole in it can still be read, and `verify` names the rest.
                Err(e) if e.code() == Code::Damage => log::warn!("{e}; that pack is left as it is"),
                Err(e) => return Err(e),
            }
        }
        Ok((moved, whole, writer.finish()?.packs))
    }

    /// What is needed of a pack, as it is stored: all of it is what it should be, or nothing of it is copied. A copy that
    /// nobody names would take room beside the pack that stays.
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

/// Writes tables of a template with the new places of its blocks.
fn rewrite(template: &Template, moved: &Moved, gone: &BTreeSet<PackId>, folder: &StorePath) -> Result<()> {
    let files = template.files().iter().map(|f| (f.name.clone(), f.kind));
    let mut tables = TableWriter::new(folder, files)?;
    for (number, file) in template.files().iter().enumerate() {
        for block in 0..template.block_count(number) {
            let Some((hash, pack, stored)) = template.place(number, block)? else {
                tables.zeros(1)?;
                continue;
            };
            let place = match moved.get(&(pack, stored.offset)) {
                Some(place) if gone.contains(&pack) => *place,
                None if gone.contains(&pack) => {
                    return Err(Error::failed(format!("block {hash} was not copied out of pack {pack}")));
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
            "the tables of template {} came out as those of {written}",
            template.digest()
        )));
    }
    sync_folder(folder)
}
