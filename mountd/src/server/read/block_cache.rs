//! A cache of decompressed blocks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use stencilfs::store::{BLOCK_SIZE, Digest};
use stencilfs::units::{Bytes, to_usize};

const BLOCK: usize = to_usize(BLOCK_SIZE);

/// A decompressed block.
pub struct CachedBlock {
    /// The bytes, [`BLOCK_SIZE`] of them.
    pub bytes: Box<[u8]>,
    used: AtomicBool,
}

/// Decompressed blocks by hash, limited in number. Evicts blocks by the clock algorithm: a block that was used since
/// the last visit of the clock hand is not evicted.
pub struct BlockCache {
    blocks: DashMap<Digest, Arc<CachedBlock>>,
    order: Mutex<VecDeque<Digest>>,
    free: Mutex<Vec<Box<[u8]>>>,
    max_blocks: usize,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockCache({} of {})", self.blocks.len(), self.max_blocks)
    }
}

impl BlockCache {
    /// Creates a cache of at most `max_bytes` bytes.
    pub fn new(max_bytes: Bytes) -> BlockCache {
        BlockCache {
            blocks: DashMap::new(),
            order: Mutex::new(VecDeque::new()),
            free: Mutex::new(Vec::new()),
            max_blocks: max_bytes.as_usize() / BLOCK,
        }
    }

    /// Returns the block with this hash, if it is cached.
    pub fn get(&self, id: &Digest) -> Option<Arc<CachedBlock>> {
        let cached = Arc::clone(&*self.blocks.get(id)?);
        cached.used.store(true, Ordering::Relaxed);
        Some(cached)
    }

    /// Returns a buffer for a block, reused if possible: its pages are then present.
    pub fn buffer(&self) -> Box<[u8]> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| vec![0; BLOCK].into_boxed_slice())
    }

    /// Caches a block, and evicts others.
    pub fn put(&self, id: Digest, bytes: Box<[u8]>) {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = Arc::new(CachedBlock { bytes, used: AtomicBool::new(false) });
        if self.blocks.insert(id, cached).is_none() {
            order.push_back(id);
        }
        // Terminates: each iteration either removes a block or clears a mark.
        while order.len() > self.max_blocks {
            let Some(oldest) = order.pop_front() else { break };
            if self.blocks.get(&oldest).is_some_and(|k| k.used.swap(false, Ordering::Relaxed)) {
                order.push_back(oldest);
                continue;
            }
            let Some((_, cached)) = self.blocks.remove(&oldest) else { continue };
            if let Some(cached) = Arc::into_inner(cached) {
                self.free.lock().unwrap_or_else(PoisonError::into_inner).push(cached.bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_bounded_and_keeps_used_blocks() {
        let cache = BlockCache::new(Bytes::new(4 * BLOCK_SIZE));
        let id = |n: u32| Digest::of(&n.to_le_bytes());
        for n in 0..100 {
            let mut buffer = cache.buffer();
            buffer[0] = n as u8;
            cache.put(id(n), buffer);
            assert!(n == 0 || cache.get(&id(0)).is_some(), "the used block was evicted at {n}");
        }
        assert_eq!(cache.blocks.len(), 4);
        assert_eq!(cache.order.lock().unwrap().len(), 4);
        assert_eq!(cache.get(&id(99)).unwrap().bytes[0], 99);
        assert!(cache.free.lock().unwrap().len() <= 1, "buffers are reused");
    }

    #[test]
    fn a_cache_of_size_zero_stores_nothing() {
        let cache = BlockCache::new(Bytes::ZERO);
        let buffer = cache.buffer();
        cache.put(Digest::of(b"x"), buffer);
        assert!(cache.blocks.is_empty());
    }
}
