//! The block index: which blocks the packs of the store and the packs written by this import contain.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::Result;
use crate::store::disk::pack::PackIndex;
use crate::store::disk::path::StorePath;
use crate::store::format::{PackId, Stored};
use crate::store::{Digest, Scratch, Store};

/// Location of a block's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Place {
    pub pack: PackId,
    pub stored: Stored,
}

/// Finds the record of a block by hash. Packs that other imports publish after `load` are not seen; their blocks may
/// then be stored twice, which only costs space.
#[derive(Debug)]
pub(in crate::store) struct BlockIndex {
    packs: Vec<PackIndex>,
    /// Similar images share packs, so the pack of the last hit is searched first.
    last_hit: AtomicUsize,
    written: RwLock<WrittenBlocks>,
    store: Store,
    /// Records of the store that were verified, and whether each is intact.
    verdicts: Mutex<HashMap<(PackId, u32), bool>>,
    /// Damaged blocks that a template may reference.
    repaired: Mutex<HashSet<Digest>>,
}

#[derive(Debug, Default)]
/// Blocks in packs written by this import.
struct WrittenBlocks {
    finished: Vec<PackIndex>,
    current: HashMap<Digest, Place>,
}

impl BlockIndex {
    /// Maps the index of every pack. A damaged pack is skipped, so that its blocks are stored again.
    pub fn load(store: &Store) -> Result<BlockIndex> {
        let mut blocks = BlockIndex::empty(store);
        for id in store.packs().ids()? {
            match PackIndex::open(&store.packs().path(id), id) {
                Ok(index) => blocks.packs.push(index),
                Err(e) => log::warn!("{e}; its blocks are not reused"),
            }
        }
        Ok(blocks)
    }

    /// Creates an index without the packs of the store: only added blocks are found.
    pub fn empty(store: &Store) -> BlockIndex {
        BlockIndex {
            packs: Vec::new(),
            last_hit: AtomicUsize::new(0),
            written: RwLock::default(),
            store: store.clone(),
            verdicts: Mutex::default(),
            repaired: Mutex::default(),
        }
    }

    /// Finds the place of a block with this hash. A record of the store is read and verified before its place is
    /// returned. If every record of the block is damaged, the block is not found and is stored again. A finished import
    /// can therefore be read, and importing the same memory again repairs a store.
    pub fn find(&self, hash: &Digest, scratch: &mut Scratch) -> Option<Place> {
        let mut damaged = false;
        let last_hit = self.last_hit.load(Ordering::Relaxed);
        for number in [last_hit].into_iter().chain((0..self.packs.len()).filter(|n| *n != last_hit)) {
            let Some(pack) = self.packs.get(number) else { continue };
            let Some(stored) = pack.find(hash) else { continue };
            let place = Place { pack: pack.id(), stored };
            if self.is_good(hash, &place, scratch) {
                self.last_hit.store(number, Ordering::Relaxed);
                return Some(place);
            }
            damaged = true;
        }
        let written = self.find_written(hash);
        if damaged && written.is_none() {
            self.add_repaired([*hash]);
        }
        written
    }

    /// Records damaged blocks that this import stores again, or for which it references another record.
    pub fn add_repaired(&self, hashes: impl IntoIterator<Item = Digest>) {
        self.repaired.lock().unwrap_or_else(PoisonError::into_inner).extend(hashes);
    }

    /// Returns the number of repaired blocks.
    pub fn repaired(&self) -> u64 {
        self.repaired.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn verdicts(&self) -> MutexGuard<'_, HashMap<(PackId, u32), bool>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_good(&self, hash: &Digest, place: &Place, scratch: &mut Scratch) -> bool {
        let key = (place.pack, place.stored.offset);
        if let Some(good) = self.verdicts().get(&key) {
            return *good;
        }
        let result = self
            .store
            .packs()
            .get(place.pack)
            .and_then(|pack| scratch.verify(&pack, place.stored, hash).map(drop));
        if let Err(e) = &result {
            log::warn!("{e}; the block is stored again");
        }
        self.verdicts().insert(key, result.is_ok());
        result.is_ok()
    }

    /// Finds the place where this import has written a block with this hash.
    pub fn find_written(&self, hash: &Digest) -> Option<Place> {
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        written.current.get(hash).copied().or_else(|| {
            written
                .finished
                .iter()
                .rev()
                .find_map(|pack| pack.find(hash).map(|stored| Place { pack: pack.id(), stored }))
        })
    }

    /// Adds a block that was appended to the current pack.
    pub fn add(&self, hash: Digest, place: Place) {
        self.written.write().unwrap_or_else(PoisonError::into_inner).current.insert(hash, place);
    }

    /// Adds the index of the finished pack at `path`, and starts a new current pack.
    pub fn finish_pack(&self, path: &StorePath, id: PackId) -> Result<()> {
        let index = PackIndex::open(path, id)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        written.finished.push(index);
        written.current.clear();
        Ok(())
    }
}
