//! Serving by decode: READs answered from stored blocks, each verified before a byte of it leaves.
//!
//! Whole blocks are decoded straight into the reply. Of a block that is asked for in part the rest is kept for a
//! while, since its neighbours are asked for next; the kernel's page cache keeps everything else.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::{DashMap, DashSet};
use stencilfs::error::{Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Template};
use stencilfs::sys::memfd::LockedBuffer;
use stencilfs::units::Bytes;

use crate::protocol::stats::{Counter, Stats};
use crate::server::refusal::Refusal;
use crate::server::reply_buffers::Replies;

/// Damaged blocks that the log names; further ones are counted only.
const MOST_REPORTED: usize = 4096;

const BLOCK: usize = BLOCK_SIZE as usize;

/// Most bytes of one READ.
pub const MAX_READ: usize = 1 << 20;

struct Workspace {
    /// Replies leave from here: a page that had to be fetched while the kernel copies it would end the request with
    /// EIO when the server is killed at that moment.
    reply: LockedBuffer,
    scratch: Scratch,
}

thread_local! {
    static WORKSPACE: RefCell<Option<Workspace>> = const { RefCell::new(None) };
}

/// Answers READs.
#[derive(Debug)]
pub struct Decoder {
    cache: BlockCache,
    stats: Stats,
    replies: Replies,
    /// Blocks whose damage is in the log already.
    reported: DashSet<(Digest, usize, u64)>,
}

impl Decoder {
    /// A decoder that keeps at most so many bytes of decoded blocks, and answers from those buffers of [`MAX_READ`]
    /// bytes.
    pub fn new(keep: Bytes, stats: Stats, replies: Replies) -> Decoder {
        Decoder { cache: BlockCache::new(keep), stats, replies, reported: DashSet::new() }
    }

    /// Makes the bytes at `offset` of a file, fewer than `size` only at its end, and passes them to `send`.
    ///
    /// # Errors
    /// [`Refusal::Damaged`] when a block of the range is not what was stored; nothing is sent then.
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
            let reply = &mut reply[..(end - offset) as usize];
            self.fill(template, file, offset, length, reply, scratch)?;
            self.stats.count(Counter::Reads);
            self.stats.add(Counter::ReadBytes, reply.len() as u64);
            send(reply);
            Ok(())
        })
    }

    fn new_workspace(&self) -> Result<Workspace, Refusal> {
        let Some(reply) = self.replies.take() else {
            log::error!("more threads answer reads than there are reply buffers");
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
            let begin = block * BLOCK_SIZE;
            let block_end = (begin + BLOCK_SIZE).min(length);
            let stop = block_end.min(end);
            let part = &mut reply[(at - offset) as usize..(stop - offset) as usize];
            let whole = at == begin && stop == block_end;
            self.part(template, file, block, (at - begin) as usize, whole, part, scratch)
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
        if let Some(kept) = self.cache.get(&id) {
            self.stats.count(Counter::BlocksCached);
            out.copy_from_slice(&kept.bytes[skip..skip + out.len()]);
            return Ok(());
        }
        self.stats.count(Counter::BlocksDecoded);
        if whole {
            template.read_block(file, block, scratch, out)?;
            return Ok(());
        }
        let mut room = self.cache.room();
        let got = template.read_block(file, block, scratch, &mut room)?;
        room[got..].fill(0);
        out.copy_from_slice(&room[skip..skip + out.len()]);
        self.cache.put(id, room);
        Ok(())
    }

    fn report(&self, template: &Template, file: usize, block: u64, error: &Error) -> Refusal {
        let refusal = match Refusal::from(error) {
            // A pack that is missing is damage of what lies in it.
            Refusal::NoEntry => Refusal::Damaged,
            // Nothing is known of the block.
            Refusal::Away => return Refusal::Away,
            other => other,
        };
        if self.reported.len() < MOST_REPORTED && self.reported.insert((*template.digest(), file, block)) {
            let id = template.block_id(file, block).ok().flatten();
            let id = id.map_or_else(|| "unknown".to_owned(), |id| id.to_string());
            let name = template.files().get(file).map_or("?", |f| f.name.as_str());
            log::error!(
                "template {} file {name} offset {}: {error}; reads of that block, digest {id}, get EIO",
                template.digest(),
                block * BLOCK_SIZE
            );
        }
        refusal
    }
}

/// `SEEK_DATA` and `SEEK_HOLE`, as exact as blocks are.
///
/// # Errors
/// [`Refusal::NoPosition`] behind the end, and for data behind the last; [`Refusal::Invalid`] for other ways to seek.
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
            return Ok((block * BLOCK_SIZE).max(from) as i64);
        }
    }
    if want_data { Err(Refusal::NoPosition) } else { Ok(length as i64) }
}

struct Kept {
    bytes: Box<[u8]>,
    used: AtomicBool,
}

/// Decoded blocks by content, bounded in bytes; what was not used since it was last passed by leaves first.
struct BlockCache {
    blocks: DashMap<Digest, Arc<Kept>>,
    order: Mutex<VecDeque<Digest>>,
    free: Mutex<Vec<Box<[u8]>>>,
    most: usize,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockCache({} of {})", self.blocks.len(), self.most)
    }
}

impl BlockCache {
    fn new(keep: Bytes) -> BlockCache {
        BlockCache {
            blocks: DashMap::new(),
            order: Mutex::new(VecDeque::new()),
            free: Mutex::new(Vec::new()),
            most: keep.as_usize() / BLOCK,
        }
    }

    fn get(&self, id: &Digest) -> Option<Arc<Kept>> {
        let kept = Arc::clone(&*self.blocks.get(id)?);
        kept.used.store(true, Ordering::Relaxed);
        Some(kept)
    }

    /// Memory for a block, touched before where there is some.
    fn room(&self) -> Box<[u8]> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| vec![0; BLOCK].into_boxed_slice())
    }

    fn put(&self, id: Digest, bytes: Box<[u8]>) {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = Arc::new(Kept { bytes, used: AtomicBool::new(false) });
        if self.blocks.insert(id, kept).is_none() {
            order.push_back(id);
        }
        // Each turn either removes one or takes one mark away, so it ends.
        while order.len() > self.most {
            let Some(oldest) = order.pop_front() else { break };
            if self.blocks.get(&oldest).is_some_and(|k| k.used.swap(false, Ordering::Relaxed)) {
                order.push_back(oldest);
                continue;
            }
            let Some((_, kept)) = self.blocks.remove(&oldest) else { continue };
            if let Some(kept) = Arc::into_inner(kept) {
                self.free.lock().unwrap_or_else(PoisonError::into_inner).push(kept.bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let cache = BlockCache::new(Bytes::new(4 * BLOCK_SIZE));
        let id = |n: u32| Digest::of(&n.to_le_bytes());
        for n in 0..100 {
            let mut room = cache.room();
            room[0] = n as u8;
            cache.put(id(n), room);
            assert!(n == 0 || cache.get(&id(0)).is_some(), "the one in use left at {n}");
        }
        assert_eq!(cache.blocks.len(), 4);
        assert_eq!(cache.order.lock().unwrap().len(), 4);
        assert_eq!(cache.get(&id(99)).unwrap().bytes[0], 99);
        assert!(cache.free.lock().unwrap().len() <= 1, "memory is used again");
    }

    #[test]
    fn a_cache_of_nothing_keeps_nothing() {
        let cache = BlockCache::new(Bytes::ZERO);
        let room = cache.room();
        cache.put(Digest::of(b"x"), room);
        assert!(cache.blocks.is_empty());
    }
}
