//! Gives back what nobody needs: sessions of the dead, packs without a needed block, and, by writing them anew, packs of
//! which little is needed.
//!
//! ```text
//!   new packs ─▶ placements, one by one, each in one step ─▶ old packs go
//! ```
//! A crash in between leaves packs that no placement names: the next run takes them. A reader with an older placement
//! meets a missing pack, opens the placement anew and goes on.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::census::{Census, PackUse};
use super::format::PackId;
use super::known::{Known, Place};
use super::pack::pack_path;
use super::pack_writer::{PACK_BYTES, PackWriter};
use super::publish::{Session, allocated, publish, sweep, sync_folder};
use super::tables::TableWriter;
use super::{Scratch, Store, Template};
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

/// What is to be done with which packs.
#[derive(Debug, Default)]
struct Plan {
    remove: BTreeSet<PackId>,
    repack: BTreeSet<PackId>,
    /// Bytes of dead records that stay.
    stays: u64,
}

impl Plan {
    /// A pack that is at least half dead is written anew. The rest may keep as many dead bytes as one pack holds, or a
    /// tenth of all: beyond that the worst ones are written anew too.
    fn of(census: &Census) -> Plan {
        let mut plan = Plan::default();
        let mut rest: Vec<(u64, u64, PackId)> = Vec::new();
        for (id, pack) in census.packs.iter().filter(|(_, p)| !p.strange) {
            let (all, live) = pack.bytes();
            let dead = all - live;
            if live == 0 {
                plan.remove.insert(*id);
            } else if dead >= live {
                plan.repack.insert(*id);
            } else {
                rest.push((all, dead, *id));
            }
        }
        // The greatest share of dead bytes last.
        rest.sort_by(|a, b| (u128::from(a.1) * u128::from(b.0)).cmp(&(u128::from(b.1) * u128::from(a.0))));
        let mut all: u64 = rest.iter().map(|r| r.0).sum();
        plan.stays = rest.iter().map(|r| r.1).sum();
        while plan.stays > PACK_BYTES.max(all / 10)
            && let Some((bytes, dead, id)) = rest.pop()
        {
            plan.repack.insert(id);
            plan.stays -= dead;
            all -= bytes;
        }
        plan
    }
}

type Moved = HashMap<(PackId, u32), Place>;

struct Run<'a> {
    store: &'a Store,
    interrupt: &'a AtomicBool,
    progress: &'a dyn Progress,
}

impl Store {
    /// Gives back what nobody needs, or says with `dry_run` what that is. Waits until no import is under way, and keeps
    /// new ones waiting. Readers go on.
    ///
    /// # Errors
    /// [`Code::Damage`] when it cannot be known what a template needs: then no pack is touched. What the filesystem
    /// says, or that `interrupt` became true; whatever was done until then is as good as done.
    pub fn collect(
        &self,
        dry_run: bool,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Collected> {
        let _content = match dry_run {
            true => None,
            false => Some(self.lock_content_alone(interrupt)?),
        };
        let (sessions, swept) = sweep(&self.tmp_dir(), dry_run);
        let census = Census::take(self, interrupt)?;
        if let Some((digest, error)) = census.unreadable.first() {
            return Err(Error::new(
                Code::Damage,
                format!("what template {digest} needs is not known, so no pack is given back: {error}"),
            )
            .at(self.dir())
            .remedy("import the same memory again to repair it, or remove it: stencil rm DIGEST"));
        }
        let plan = Plan::of(&census);
        let run = Run { store: self, interrupt, progress };
        let mut done = Collected { sessions, dead_bytes: Bytes::new(plan.stays), ..Collected::default() };
        let freed = match dry_run {
            true => run.estimate(&census, &plan, &mut done),
            false => run.collect(&census, &plan, &mut done)?,
        };
        done.freed_bytes = Bytes::new(swept + freed);
        Ok(done)
    }
}

impl Run<'_> {
    fn allocated(&self, id: PackId) -> u64 {
        allocated(&self.store.packs().path(id))
    }

    fn check(&self) -> Result<()> {
        match self.interrupt.load(Ordering::Relaxed) {
            true => Err(Error::failed("interrupted: what was given back until then stays so")),
            false => Ok(()),
        }
    }

    fn estimate(&self, census: &Census, plan: &Plan, done: &mut Collected) -> u64 {
        let live: u64 = plan.repack.iter().map(|id| census.packs[id].bytes().1).sum();
        done.removed_packs = (plan.remove.len() + plan.repack.len()) as u64;
        done.repacked_packs = plan.repack.len() as u64;
        done.new_packs = live.div_ceil(PACK_BYTES);
        done.placements = self.affected(census, &plan.repack).count() as u64;
        let old: u64 = plan.remove.iter().chain(&plan.repack).map(|id| self.allocated(*id)).sum();
        old.saturating_sub(live.next_multiple_of(4096))
    }

    fn affected<'c>(
        &self,
        census: &'c Census,
        packs: &BTreeSet<PackId>,
    ) -> impl Iterator<Item = &'c Template> {
        census.templates.iter().filter(|t| t.pack_ids().iter().any(|id| packs.contains(id)))
    }

    fn collect(&self, census: &Census, plan: &Plan, done: &mut Collected) -> Result<u64> {
        // What needs no work comes first: it makes room for what does.
        let mut freed = self.remove(&plan.remove)?;
        done.removed_packs = plan.remove.len() as u64;
        if plan.repack.is_empty() {
            return Ok(freed);
        }
        let session = Session::begin(&self.store.tmp_dir())?;
        let (moved, whole, packs) = self.copy(census, &plan.repack, session.path())?;
        let mut taken = 0;
        for id in &packs {
            let path = pack_path(session.path(), *id);
            taken += allocated(&path);
            publish(&path, &self.store.packs().path(*id))?;
        }
        sync_folder(&self.store.packs_dir())?;
        for (number, template) in self.affected(census, &whole).enumerate() {
            self.check()?;
            let folder = session.path().join(format!("image-{number}"));
            rewrite(template, &moved, &whole, &folder)?;
            let _names = self.store.lock_names()?;
            if self.store.has(template.digest()) {
                publish(&folder.join("placement"), &template.folder().join("placement"))?;
                sync_folder(&template.folder())?;
                done.placements += 1;
            }
        }
        freed += self.remove(&whole)?;
        done.removed_packs += whole.len() as u64;
        done.repacked_packs = whole.len() as u64;
        done.new_packs = packs.len() as u64;
        Ok(freed.saturating_sub(taken))
    }

    fn remove(&self, packs: &BTreeSet<PackId>) -> Result<u64> {
        let mut freed = 0;
        for id in packs {
            self.check()?;
            let path = self.store.packs().path(*id);
            freed += allocated(&path);
            fs::remove_file(&path).map_err(|e| Error::io("cannot remove the pack", &path, e))?;
            self.store.packs().forget(*id);
        }
        sync_folder(&self.store.packs_dir())?;
        Ok(freed)
    }

    /// Copies what is needed of these packs into new ones. Gives where each record is now, the packs of which everything
    /// was copied, and the new ones.
    fn copy(
        &self,
        census: &Census,
        packs: &BTreeSet<PackId>,
        folder: &Path,
    ) -> Result<(Moved, BTreeSet<PackId>, Vec<PackId>)> {
        let known = Known::nothing(self.store);
        let mut writer = PackWriter::new(folder, &known);
        let (mut moved, mut whole) = (Moved::new(), BTreeSet::new());
        let live = packs.iter().map(|id| census.packs[id].bytes().1).sum();
        self.progress.start("repack", Some(Bytes::new(live)));
        for id in packs {
            match self.copy_pack(*id, &census.packs[id], (&known, &mut writer), &mut moved) {
                Ok(()) => drop(whole.insert(*id)),
                // It stays as it is: what is whole in it can still be read, and `verify` names the rest.
                Err(e) if e.code() == Code::Damage => log::warn!("{e}; that pack is left as it is"),
                Err(e) => {
                    self.progress.finish();
                    return Err(e);
                }
            }
        }
        self.progress.finish();
        let packs = writer.finish()?.packs;
        Ok((moved, whole, packs))
    }

    fn copy_pack(
        &self,
        id: PackId,
        pack_use: &PackUse,
        (known, writer): (&Known, &mut PackWriter<'_>),
        moved: &mut Moved,
    ) -> Result<()> {
        let pack = self.store.packs().get(id)?;
        let mut scratch = Scratch::default();
        for entry in pack_use.live() {
            self.check()?;
            let entry = entry.map_err(|e| e.in_file("pack", self.store.packs().path(id)))?;
            // As it is stored, and only if it is what it should be.
            let record = scratch.verify(&pack, entry.stored, &entry.hash)?;
            let place = match known.find_own(&entry.hash) {
                Some(place) => place,
                None => writer.append(entry.hash, record, entry.stored)?,
            };
            moved.insert((id, entry.stored.offset), place);
            self.progress.advance(Bytes::new(entry.stored.length.into()));
        }
        Ok(())
    }
}

/// Writes tables of a template with the new places of its blocks.
fn rewrite(template: &Template, moved: &Moved, gone: &BTreeSet<PackId>, folder: &Path) -> Result<()> {
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
