//! Verification: reads all stored data, and reports damage and the affected templates.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::progress::Progress;
use crate::store::disk::pack::PackIndex;
use crate::store::disk::path::StorePath;
use crate::store::format::{Invalid, PackId};
use crate::store::{BLOCK_SIZE, Digest, Scratch, Store, Template};
use crate::sys::process::threads;
use crate::units::{Bytes, to_usize};

/// Blocks of a template that a thread verifies at a time.
const BLOCKS_PER_TURN: u64 = 256;

/// A file of a template that cannot be read completely.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Affected {
    /// Digest of the template.
    pub digest: Digest,
    /// Name of the file; `None` if the whole template is affected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// Damage at one place of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Damaged file of the store: a pack, an image, a placement, a policy or a tag.
    #[serde(serialize_with = "crate::sanitize::path")]
    pub path: PathBuf,
    /// Offset of the damaged record in a pack; `None` if the file as a whole is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Values found and expected.
    pub message: String,
    /// Affected files of templates. Empty if no template references the damaged record.
    pub affects: Vec<Affected>,
}

impl Damage {
    /// Returns true for damage in a pack that no template references. Such damage only takes space, because an import
    /// verifies records before it reuses them.
    pub fn is_unused(&self) -> bool {
        self.affects.is_empty() && self.path.extension().is_some_and(|e| e == "pack")
    }
}

/// Result of a verification.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verified {
    /// Number of verified templates.
    pub templates: u64,
    /// Number of packs that were read.
    pub packs: u64,
    /// Number of records that were read, decoded and compared with their hash.
    pub blocks: u64,
    /// Bytes of the records that were read, as stored.
    pub stored_bytes: Bytes,
    /// Damage that was found.
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

/// A pack after its records were read.
struct CheckedPack {
    index: PackIndex,
    /// Offsets of damaged records.
    bad: BTreeSet<u32>,
}

struct Run<'a> {
    store: &'a Store,
    progress: &'a dyn Progress,
    interrupt: &'a AtomicBool,
    findings: Mutex<Findings>,
}

impl Store {
    /// Verifies one template, or the whole store.
    ///
    /// Damage is reported in the result, not as an error.
    ///
    /// # Errors
    /// Returns an error if the store cannot be read at all, or if `interrupt` becomes true.
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
                run.or_record(self.digests(), &self.images_dir())?
            }
        };
        let ids = match only {
            Some(_) => Vec::new(),
            None => run.or_record(self.packs().ids(), &self.packs_dir())?,
        };
        let length =
            |id: &PackId| self.packs().path(*id).metadata().map_or(0, |found| found.st_size.cast_unsigned());
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
            true => Err(Error::failed("interrupted; the verification is incomplete")),
            false => Ok(()),
        }
    }

    /// Calls `act` with every number below `count`, on all cores, until a call fails.
    fn on_all_cores(&self, count: usize, act: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            self.check_interrupt()?;
            // Makes the other threads stop.
            act(number).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(count.max(1));
        threads::share(threads, work)
    }

    fn findings(&self) -> std::sync::MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a read failure as damage, for whatever reason. The verification continues, so that one file does not
    /// hide the others.
    ///
    /// # Errors
    /// Returns `error` if it is not a fault of the store: the host has no free descriptors or memory, or the whole
    /// store cannot be reached.
    fn record(&self, error: Error, at: (&StorePath, Option<u64>), affected: Option<Affected>) -> Result<()> {
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

    /// Returns the result, or a default value after recording the failure as damage.
    fn or_record<T: Default>(&self, read: Result<T>, path: &StorePath) -> Result<T> {
        read.or_else(|e| self.record(e, (path, None), None).map(|()| T::default()))
    }

    /// Checks the header and the directories of the store.
    fn layout(&self) -> Result<()> {
        if let Some((path, why)) = self.store.header()?.damaged {
            self.record(why, (&path, None), None)?;
        }
        for directory in [self.store.images_dir(), self.store.packs_dir(), self.store.tags_dir()] {
            if !directory.is_dir() {
                let why = Invalid::damage("missing, or not a directory")
                    .in_file("directory of the store", &directory);
                self.record(why, (&directory, None), None)?;
            }
        }
        Ok(())
    }

    /// Verifies every record of a pack. Returns `None` if the index is unusable.
    fn pack(&self, id: PackId) -> Result<Option<CheckedPack>> {
        self.findings().packs += 1;
        let path = self.store.packs().path(id);
        let index = match PackIndex::open(&path, id) {
            Ok(index) => index,
            // The pack was removed since it was listed, which is not damage.
            Err(_) if !path.exists() => return Ok(None),
            Err(e) => return self.record(e, (&path, None), None).map(|()| None),
        };
        let pack = match self.store.packs().get(id) {
            Ok(pack) => pack,
            Err(_) if !path.exists() => return Ok(None),
            Err(e) => return self.record(e, (&path, None), None).map(|()| None),
        };
        let mut entries = Vec::with_capacity(index.len());
        for number in 0..index.len() {
            match index.entry(number) {
                Ok(entry) => entries.push(entry),
                Err(e) => self.record(e.in_file("pack", &path), (&path, None), None)?,
            }
        }
        entries.sort_unstable_by_key(|e| e.stored.offset);
        let (mut scratch, mut bad, mut bytes) = (Scratch::default(), BTreeSet::new(), 0);
        for entry in &entries {
            self.check_interrupt()?;
            let stored = entry.stored;
            let result = scratch.verify(&pack, stored, &entry.hash).map(drop);
            if let Err(error) = result {
                self.record(error, (&path, Some(stored.offset.into())), None)?;
                bad.insert(stored.offset);
            }
            bytes += u64::from(stored.length);
            self.progress.advance(Bytes::new(stored.length.into()));
        }
        // The total has header and index too.
        let length = path.metadata().map_or(0, |found| found.st_size.cast_unsigned());
        self.progress.advance(Bytes::new(length.saturating_sub(bytes)));
        let mut findings = self.findings();
        findings.blocks += entries.len() as u64;
        findings.stored_bytes += bytes;
        Ok(Some(CheckedPack { index, bad }))
    }

    /// Verifies the tables of a template as a whole, and that each of its blocks is at its place. A block whose pack
    /// was not read before is read here.
    fn template(&self, digest: &Digest, checked: &BTreeMap<PackId, CheckedPack>) -> Result<()> {
        let directory = self.store.image_dir(digest);
        let whole = || Some(Affected { digest: *digest, file: None });
        let template = match self.store.template(digest) {
            Ok(template) => template,
            Err(_) if !self.store.is_listed(digest) => return Ok(()),
            Err(e) => return self.record(e, (&directory, None), whole()),
        };
        for id in template.pack_ids().iter().filter(|id| !checked.contains_key(id)) {
            let path = self.store.packs().path(*id);
            if let Err(e) = PackIndex::open(&path, *id) {
                // A collector may have moved the blocks since the template was opened; the reads below then use the new
                // placement.
                let moved = !path.exists()
                    && self.store.template(digest).is_ok_and(|now| !now.pack_ids().contains(id));
                if !moved && self.store.is_listed(digest) {
                    self.record(e, (&path, None), whole())?;
                }
            }
        }
        for result in template.check_tables() {
            result.or_else(|e| self.record(e, (&directory, None), whole()))?;
        }
        for (number, file) in template.files().iter().enumerate() {
            let blocks = template.block_count(number);
            let affected = || Affected { digest: *digest, file: Some(file.name.clone()) };
            self.on_all_cores(to_usize(blocks.div_ceil(BLOCKS_PER_TURN)), |turn| {
                let (mut scratch, mut plain) = (Scratch::default(), vec![0; to_usize(BLOCK_SIZE)]);
                let start = turn as u64 * BLOCKS_PER_TURN;
                for block in start..(start + BLOCKS_PER_TURN).min(blocks) {
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
            Err(e) => return self.record(e, (&template.directory(), None), Some(affected())),
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
            // A collector removes the blocks of a removed template.
            Err(_) if !self.store.is_listed(template.digest()) => Ok(()),
            Err(e) => self.record(e, (&path, Some(stored.offset.into())), Some(affected())),
        }
    }

    fn tags(&self) -> Result<()> {
        let (files, unlisted) = self.or_record(self.store.tag_files(), &self.store.tags_dir())?;
        for error in unlisted {
            self.record(error, (&self.store.tags_dir(), None), None)?;
        }
        for (tag, path) in files {
            if let Err(error) = self.store.target(&tag) {
                self.record(error, (&path, None), None)?;
            }
        }
        Ok(())
    }
}
