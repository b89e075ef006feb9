//! Serving by decode: answers READs from compressed blocks, each verified before a byte of it is sent.
//!
//! A block that is requested completely is decompressed straight into the reply. A block that is requested in part is
//! cached for a while, as the kernel usually requests the rest next; the kernel's page cache holds everything else.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::{DashMap, DashSet};
use stencilfs::error::{Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Template};
use stencilfs::sys::memory::memfd::LockedBuffer;
use stencilfs::units::{Bytes, to_usize};

use crate::protocol::stats::{Counter, Stats};
use crate::server::refusal::Refusal;
use crate::server::reply_buffers::Replies;

/// Most damaged blocks that are logged; further ones are only counted.
const MAX_REPORTED: usize = 4096;

const BLOCK: usize = to_usize(BLOCK_SIZE);

/// Largest READ, in bytes.
pub const MAX_READ: usize = 1 << 20;

struct Workspace {
    /// Replies are sent from locked memory: if the server is killed while the kernel copies a reply and has to fault in
    /// a page, the request ends with EIO.
    reply: LockedBuffer,
    scratch: Scratch,
}

thread_local! {
    static WORKSPACE: RefCell<Option<Workspace>> = const { RefCell::new(None) };
}

/// Answers READs of files that are served by decode.
#[derive(Debug)]
pub struct Decoder {
    cache: BlockCache,
    stats: Stats,
    replies: Replies,
    /// Damaged blocks that are in the log already.
    reported: DashSet<(Digest, usize, u64)>,
}

impl Decoder {
    /// Creates a decoder that caches at most `keep` bytes of decompressed blocks, and sends from the buffers `replies`
    /// of [`MAX_READ`] bytes.
    pub fn new(keep: Bytes, stats: Stats, replies: Replies) -> Decoder {
        Decoder { cache: BlockCache::new(keep), stats, replies, reported: DashSet::new() }
    }

    /// Produces `size` bytes at `offset` of a file, fewer at its end, and passes them to `send`.
    ///
    /// # Errors
    /// Returns [`Refusal::Damaged`] if a block of the range is damaged; nothing is sent then.
    pub fn read(
        &self,
        template: &Template,
        file: usize,
        offset: u64,
        size: usize,
        send: impl FnOnce(&[u8]),
    ) -> Result<(), Refusal> {
        let length = template.files().get(file).ok_or(Refusal::Stale)?.size.get();
        let end = length.min(offset.saturating_add(size.min(MAX_READ) as u64));
        if offset >= end {
            send(&[]);
            return Ok(());
        }
        WORKSPACE.with_borrow_mut(|slot| {
            let workspace = match slot {
                Some(workspace) => workspace,
                None => slot.insert(self.new_workspace()?),
            };
            let Workspace { reply, scratch } = workspace;
            let reply = &mut reply[..to_usize(end - offset)];
            self.fill(template, file, offset, length, reply, scratch)?;
            self.stats.count(Counter::Reads);
            self.stats.add(Counter::ReadBytes, reply.len() as u64);
            send(reply);
            Ok(())
        })
    }

    fn new_workspace(&self) -> Result<Workspace, Refusal> {
        let Some(reply) = self.replies.take() else {
            log::error!("out of reply buffers: more threads answer READs than expected");
            return Err(Refusal::Failed);
        };
        Ok(Workspace { reply, scratch: Scratch::default() })
    }

    fn fill(
        &self,
        template: &Template,
        file: usize,
        offset: u64,
        length: u64,
        reply: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), Refusal> {
        let end = offset + reply.len() as u64;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_SIZE;
            let start = block * BLOCK_SIZE;
            let block_end = (start + BLOCK_SIZE).min(length);
            let stop = block_end.min(end);
            let part = &mut reply[to_usize(at - offset)..to_usize(stop - offset)];
            let whole = at == start && stop == block_end;
            self.part(template, file, block, to_usize(at - start), whole, part, scratch)
                .map_err(|e| self.report(template, file, block, &e))?;
            at = stop;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn part(
        &self,
        template: &Template,
        file: usize,
        block: u64,
        skip: usize,
        whole: bool,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Some(id) = template.block_id(file, block)? else {
            self.stats.count(Counter::BlocksZero);
            out.fill(0);
            return Ok(());
        };
        if let Some(cached) = self.cache.get(&id) {
            self.stats.count(Counter::BlocksCached);
            out.copy_from_slice(&cached.bytes[skip..skip + out.len()]);
            return Ok(());
        }
        self.stats.count(Counter::BlocksDecoded);
        if whole {
            template.read_block(file, block, scratch, out)?;
            return Ok(());
        }
        let mut buffer = self.cache.buffer();
        let got = template.read_block(file, block, scratch, &mut buffer)?;
        buffer[got..].fill(0);
        out.copy_from_slice(&buffer[skip..skip + out.len()]);
        self.cache.put(id, buffer);
        Ok(())
    }

    fn report(&self, template: &Template, file: usize, block: u64, error: &Error) -> Refusal {
        let refusal = match Refusal::from(error) {
            // A missing pack is damage of the blocks in it.
            Refusal::NoEntry => Refusal::Damaged,
            // The block itself may be intact.
            Refusal::Away => return Refusal::Away,
            other => other,
        };
        if self.reported.len() < MAX_REPORTED && self.reported.insert((*template.digest(), file, block)) {
            let id = template.block_id(file, block).ok().flatten();
            let id = id.map_or_else(|| "unknown".to_owned(), |id| id.to_string());
            let name = template.files().get(file).map_or("?", |f| f.name.as_str());
            log::error!(
                "template {} file {name} offset {}: {error}; reads of that block, digest {id}, fail with EIO",
                template.digest(),
                block * BLOCK_SIZE
            );
        }
        refusal
    }
}

/// Implements `SEEK_DATA` and `SEEK_HOLE`, with the granularity of blocks.
///
/// # Errors
/// Returns [`Refusal::NoPosition`] (ENXIO) beyond the end of the file, and for `SEEK_DATA` beyond the last data;
/// [`Refusal::Invalid`] for other values of `whence`.
pub fn seek(template: &Template, file: usize, offset: i64, whence: i32) -> Result<i64, Refusal> {
    let length = template.files().get(file).ok_or(Refusal::Stale)?.size.get();
    let from = u64::try_from(offset).map_err(|_| Refusal::NoPosition)?;
    let want_data = match whence {
        libc::SEEK_DATA => true,
        libc::SEEK_HOLE => false,
        _ => return Err(Refusal::Invalid),
    };
    if from >= length {
        return Err(Refusal::NoPosition);
    }
    for block in from / BLOCK_SIZE..template.block_count(file) {
        let is_data = template.block_id(file, block).map_err(|e| Refusal::from(&e))?.is_some();
        if is_data == want_data {
            return Ok((block * BLOCK_SIZE).max(from).cast_signed());
        }
    }
    if want_data { Err(Refusal::NoPosition) } else { Ok(length.cast_signed()) }
}

struct CachedBlock {
    bytes: Box<[u8]>,
    used: AtomicBool,
}

/// Decompressed blocks by digest, limited in number. Evicts by the clock algorithm: a block that was used since the
/// last visit gets a second chance.
struct BlockCache {
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
    fn new(keep: Bytes) -> BlockCache {
        BlockCache {
            blocks: DashMap::new(),
            order: Mutex::new(VecDeque::new()),
            free: Mutex::new(Vec::new()),
            max_blocks: keep.as_usize() / BLOCK,
        }
    }

    fn get(&self, id: &Digest) -> Option<Arc<CachedBlock>> {
        let cached = Arc::clone(&*self.blocks.get(id)?);
        cached.used.store(true, Ordering::Relaxed);
        Some(cached)
    }

    /// Returns a buffer for a block, reused if possible: its pages are then present.
    fn buffer(&self) -> Box<[u8]> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| vec![0; BLOCK].into_boxed_slice())
    }

    fn put(&self, id: Digest, bytes: Box<[u8]>) {
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
