//! Verification: reads everything that is stored and names what is damaged and whom it affects.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use serde::Serialize;

use super::format::{Invalid, PackId};
use super::pack::PackIndex;
use super::path::StorePath;
use super::{BLOCK_SIZE, Digest, Scratch, Store, Template};
use crate::error::{Code, Error, Result};
use crate::progress::Progress;
use crate::sys::threads;
use crate::units::Bytes;

/// Blocks of a template that one thread checks at a time.
const SHARE: u64 = 256;

/// A file of a template that cannot be read as a whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Affected {
    /// The template.
    pub digest: Digest,
    /// Its file; nothing when the whole template is affected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// One damaged place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The file of the store: a pack, an image, a placement, a policy or a tag.
    #[serde(serialize_with = "crate::shown::path")]
    pub path: PathBuf,
    /// Where in a pack the damaged record begins; nothing when the file as a whole is meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// What was got and what expected.
    pub message: String,
    /// Who needs it. Nobody, when only a template that was removed used it.
    pub affects: Vec<Affected>,
}

impl Damage {
    /// True for a place in a pack that no template needs (any more): it takes space and nothing else,
    /// because an import reads what it reuses.
    pub fn is_unused(&self) -> bool {
        self.affects.is_empty() && self.path.extension().is_some_and(|e| e == "pack")
    }
}

/// What a verification has found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verified {
    /// Templates that were checked.
    pub templates: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Records that were read, decoded and compared with their hash.
    pub blocks: u64,
    /// Their size as stored.
    pub stored_bytes: Bytes,
    /// What is not as it was written.
    pub damages: Vec<Damage>,
}

type Key = (PathBuf, Option<u64>);

#[derive(Default)]
struct Findings {
    damages: BTreeMap<Key, (String, BTreeSet<Affected>)>,
    packs: u64,
    blocks: u64,
    stored_bytes: u64,
}

/// What is known of a pack after its records were read.
struct CheckedPack {
    index: PackIndex,
    bad: BTreeSet<u32>,
}

struct Run<'a> {
    store: &'a Store,
    progress: &'a dyn Progress,
    interrupt: &'a AtomicBool,
    findings: Mutex<Findings>,
}

impl Store {
    /// Verifies one template, or the whole store with everything in it.
    ///
    /// Damage is a result, not an error.
    ///
    /// # Errors
    /// When the store cannot be read at all, or `interrupt` became true.
    pub fn verify(
        &self,
        only: Option<&Digest>,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<Verified> {
        let run = Run { store: self, progress, interrupt, findings: Mutex::default() };
        let digests = match only {
            Some(digest) => vec![*digest],
            None => {
                run.layout()?;
                run.or_note(self.digests(), &self.images_dir())?
            }
        };
        let ids = match only {
            Some(_) => Vec::new(),
            None => run.or_note(self.packs().ids(), &self.packs_dir())?,
        };
        let length = |id: &PackId| self.packs().path(*id).metadata().map_or(0, |found| found.st_size as u64);
        let total = match only {
            Some(digest) => self.template(digest).map_or(Bytes::ZERO, |t| t.stored_bytes()),
            None => Bytes::new(ids.iter().map(length).sum()),
        };
        progress.start("verify", Some(total));
        let result = run.all(&digests, &ids, only.is_none());
        progress.finish();
        result?;
        let findings = run.findings.into_inner().unwrap_or_else(PoisonError::into_inner);
        let damages = findings.damages.into_iter().map(|((path, offset), (message, affects))| Damage {
            path,
            offset,
            message,
            affects: affects.into_iter().collect(),
        });
        Ok(Verified {
            templates: digests.len() as u64,
            packs: findings.packs,
            blocks: findings.blocks,
            stored_bytes: Bytes::new(findings.stored_bytes),
            damages: damages.collect(),
        })
    }
}

impl Run<'_> {
    fn all(&self, digests: &[Digest], ids: &[PackId], tags: bool) -> Result<()> {
        let checked = Mutex::new(BTreeMap::new());
        self.on_all_cores(ids.len(), |number| {
            if let Some(pack) = self.pack(ids[number])? {
                checked.lock().unwrap_or_else(PoisonError::into_inner).insert(ids[number], pack);
            }
            Ok(())
        })?;
        let checked = checked.into_inner().unwrap_or_else(PoisonError::into_inner);
        for digest in digests {
            self.template(digest, &checked)?;
        }
        if tags { self.tags() } else { Ok(()) }
    }

    fn check_interrupt(&self) -> Result<()> {
        match self.interrupt.load(Ordering::Relaxed) {
            true => Err(Error::failed("interrupted before everything was verified")),
            false => Ok(()),
        }
    }

    /// Calls `act` for every number below `count`, on all cores, until one fails.
    fn on_all_cores(&self, count: usize, act: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            self.check_interrupt()?;
            // The others stop at once.
            act(number).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(count.max(1));
        threads::share(threads, work)
    }

    fn findings(&self) -> std::sync::MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what cannot be read, for whatever reason: the run goes on, so that one file does not hide the others.
    ///
    /// # Errors
    /// The same error where it says nothing about the store: the host lacks descriptors or memory, or the whole store is
    /// out of reach.
    fn note(&self, error: Error, at: (&StorePath, Option<u64>), affected: Option<Affected>) -> Result<()> {
        self.check_interrupt()?;
        if error.errno().is_some_and(|e| matches!(e, libc::EMFILE | libc::ENFILE | libc::ENOMEM)) {
            return Err(error);
        }
        if error.code() == Code::TryAgain {
            self.store.expect_same_store()?;
        }
        let path = error.path().unwrap_or(at.0.as_ref()).to_owned();
        let mut findings = self.findings();
        let (_, affects) =
            findings.damages.entry((path, at.1)).or_insert_with(|| (error.reason(), BTreeSet::new()));
        affects.extend(affected);
        Ok(())
    }

    /// What was read, or nothing of it, and the reason noted.
    fn or_note<T: Default>(&self, read: Result<T>, path: &StorePath) -> Result<T> {
        read.or_else(|e| self.note(e, (path, None), None).map(|()| T::default()))
    }

    /// Notes what is wrong with the header and the folders of the store.
    fn layout(&self) -> Result<()> {
        if let Some((path, why)) = self.store.header()?.damaged {
            self.note(why, (&path, None), None)?;
        }
        for folder in [self.store.images_dir(), self.store.packs_dir(), self.store.tags_dir()] {
            if !folder.is_dir() {
                let why =
                    Invalid::damage("it is missing, or not a folder").in_file("folder of the store", &folder);
                self.note(why, (&folder, None), None)?;
            }
        }
        Ok(())
    }

    /// Reads every record of a pack. Nothing when its index is of no use.
    fn pack(&self, id: PackId) -> Result<Option<CheckedPack>> {
        self.findings().packs += 1;
        let path = self.store.packs().path(id);
        let index = match PackIndex::open(&path, id) {
            Ok(index) => index,
            // Removed meanwhile: nobody's damage.
            Err(_) if !path.exists() => return Ok(None),
            Err(e) => return self.note(e, (&path, None), None).map(|()| None),
        };
        let pack = match self.store.packs().get(id) {
            Ok(pack) => pack,
            Err(_) if !path.exists() => return Ok(None),
            Err(e) => return self.note(e, (&path, None), None).map(|()| None),
        };
        let mut entries = Vec::with_capacity(index.len());
        for number in 0..index.len() {
            match index.entry(number) {
                Ok(entry) => entries.push(entry),
                Err(e) => self.note(e.in_file("pack", &path), (&path, None), None)?,
            }
        }
        entries.sort_unstable_by_key(|e| e.stored.offset);
        let (mut scratch, mut bad, mut bytes) = (Scratch::default(), BTreeSet::new(), 0);
        for entry in &entries {
            self.check_interrupt()?;
            let stored = entry.stored;
            let result = scratch.verify(&pack, stored, &entry.hash).map(drop);
            if let Err(error) = result {
                self.note(error, (&path, Some(stored.offset.into())), None)?;
                bad.insert(stored.offset);
            }
            bytes += u64::from(stored.length);
            self.progress.advance(Bytes::new(stored.length.into()));
        }
        let mut findings = self.findings();
        findings.blocks += entries.len() as u64;
        findings.stored_bytes += bytes;
        Ok(Some(CheckedPack { index, bad }))
    }

    /// Checks the tables of a template as a whole, and that each of its blocks is where they say. A
    /// block whose pack was not read before is read now.
    fn template(&self, digest: &Digest, checked: &BTreeMap<PackId, CheckedPack>) -> Result<()> {
        let folder = self.store.image_dir(digest);
        let whole = || Some(Affected { digest: *digest, file: None });
        let template = match self.store.template(digest) {
            Ok(template) => template,
            Err(_) if !self.store.is_listed(digest) => return Ok(()),
            Err(e) => return self.note(e, (&folder, None), whole()),
        };
        for id in template.pack_ids().iter().filter(|id| !checked.contains_key(id)) {
            let path = self.store.packs().path(*id);
            if let Err(e) = PackIndex::open(&path, *id) {
                // A collector may have moved its blocks meanwhile: then the reads below find them.
                let moved = !path.exists()
                    && self.store.template(digest).is_ok_and(|now| !now.pack_ids().contains(id));
                if !moved && self.store.is_listed(digest) {
                    self.note(e, (&path, None), whole())?;
                }
            }
        }
        for result in template.check_tables() {
            result.or_else(|e| self.note(e, (&folder, None), whole()))?;
        }
        for (number, file) in template.files().iter().enumerate() {
            let blocks = template.block_count(number);
            let affected = || Affected { digest: *digest, file: Some(file.name.clone()) };
            self.on_all_cores(blocks.div_ceil(SHARE) as usize, |share| {
                let (mut scratch, mut plain) = (Scratch::default(), vec![0; BLOCK_SIZE as usize]);
                let start = share as u64 * SHARE;
                for block in start..(start + SHARE).min(blocks) {
                    self.block(&template, (number, block), checked, (&mut scratch, &mut plain), &affected)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn block(
        &self,
        template: &Template,
        (file, block): (usize, u64),
        checked: &BTreeMap<PackId, CheckedPack>,
        (scratch, plain): (&mut Scratch, &mut [u8]),
        affected: &dyn Fn() -> Affected,
    ) -> Result<()> {
        let place = match template.place(file, block) {
            Ok(None) => return Ok(()),
            Ok(Some(place)) => place,
            Err(e) => return self.note(e, (&template.folder(), None), Some(affected())),
        };
        let (hash, id, stored) = place;
        let path = self.store.packs().path(id);
        if let Some(pack) = checked.get(&id)
            && pack.index.find(&hash) == Some(stored)
        {
            if pack.bad.contains(&stored.offset)
                && let Some((_, affects)) =
                    self.findings().damages.get_mut(&(path.as_ref().to_owned(), Some(stored.offset.into())))
            {
                affects.insert(affected());
            }
            return Ok(());
        }
        let result = template.read_block(file, block, scratch, plain);
        let mut findings = self.findings();
        findings.blocks += 1;
        findings.stored_bytes += u64::from(stored.length);
        drop(findings);
        self.progress.advance(Bytes::new(stored.length.into()));
        match result {
            Ok(_) => Ok(()),
            // Its blocks go once it is removed.
            Err(_) if !self.store.is_listed(template.digest()) => Ok(()),
            Err(e) => self.note(e, (&path, Some(stored.offset.into())), Some(affected())),
        }
    }

    fn tags(&self) -> Result<()> {
        let (files, unlisted) = self.or_note(self.store.tag_files(), &self.store.tags_dir())?;
        for error in unlisted {
            self.note(error, (&self.store.tags_dir(), None), None)?;
        }
        for (tag, path) in files {
            if let Err(error) = self.store.target(&tag) {
                self.note(error, (&path, None), None)?;
            }
        }
        Ok(())
    }
}
