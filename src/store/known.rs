//! Which blocks the store has already: the indexes of its packs, and what this import has written.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::Result;
use crate::store::format::{PackId, Stored};
use crate::store::pack::PackIndex;
use crate::store::path::StorePath;
use crate::store::{Digest, Scratch, Store};

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub pack: PackId,
    pub stored: Stored,
}

/// Lookup of blocks by hash. Packs that other imports publish meanwhile are not seen: a block is then
/// stored twice, which costs space and nothing else.
#[derive(Debug)]
pub(super) struct Known {
    packs: Vec<PackIndex>,
    /// Equal images lie in the same packs: the pack of the last hit is asked first.
    last_hit: AtomicUsize,
    own: RwLock<Own>,
    store: Store,
    /// Blocks of the store that were read: whether they are what they should be.
    verdicts: Mutex<HashMap<(PackId, u32), bool>>,
    /// Blocks that somebody may have relied on, and that could not be read.
    repaired: Mutex<HashSet<Digest>>,
}

#[derive(Debug, Default)]
struct Own {
    finished: Vec<PackIndex>,
    current: HashMap<Digest, Place>,
}

impl Known {
    /// Maps the index of every pack. A damaged pack is left out, so that its blocks are stored anew.
    pub fn load(store: &Store) -> Result<Known> {
        let mut known = Known::nothing(store);
        for id in store.packs().ids()? {
            match PackIndex::open(&store.packs().path(id), id) {
                Ok(index) => known.packs.push(index),
                Err(e) => log::warn!("{e}; its blocks are not reused"),
            }
        }
        Ok(known)
    }

    /// Knows nothing but what is added.
    pub fn nothing(store: &Store) -> Known {
        Known {
            packs: Vec::new(),
            last_hit: AtomicUsize::new(0),
            own: RwLock::default(),
            store: store.clone(),
            verdicts: Mutex::default(),
            repaired: Mutex::default(),
        }
    }

    /// Where a block with this hash is. A record of the store is read and verified before it is relied on. A block of
    /// which no record is sound is stored again, so that a finished import can be read, and importing the same memory
    /// again repairs a store.
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
        let own = self.find_own(hash);
        if damaged && own.is_none() {
            self.add_repaired([*hash]);
        }
        own
    }

    /// These blocks were stored, and damaged; this import stores them again, or relies on another record.
    pub fn add_repaired(&self, hashes: impl IntoIterator<Item = Digest>) {
        self.repaired.lock().unwrap_or_else(PoisonError::into_inner).extend(hashes);
    }

    /// How many blocks were repaired.
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
            log::warn!("{e}; that record is not used");
        }
        self.verdicts().insert(key, result.is_ok());
        result.is_ok()
    }

    /// Where this import has put a block with this hash.
    pub fn find_own(&self, hash: &Digest) -> Option<Place> {
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        own.current.get(hash).copied().or_else(|| {
            own.finished
                .iter()
                .rev()
                .find_map(|pack| pack.find(hash).map(|stored| Place { pack: pack.id(), stored }))
        })
    }

    /// A block was appended to the pack that is being written.
    pub fn add(&self, hash: Digest, place: Place) {
        self.own.write().unwrap_or_else(PoisonError::into_inner).current.insert(hash, place);
    }

    /// The pack that was being written is complete, at `path`.
    pub fn finish_pack(&self, path: &StorePath, id: PackId) -> Result<()> {
        let index = PackIndex::open(path, id)?;
        let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
        own.finished.push(index);
        own.current.clear();
        Ok(())
    }
}
