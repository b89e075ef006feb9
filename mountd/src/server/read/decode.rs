//! Serving by decode: answers READs from compressed blocks, each verified before a byte of it is sent.
//!
//! A block that is requested completely is decompressed straight into the reply. A block that is requested in part is
//! cached for a while, as the kernel usually requests the rest next; the kernel's page cache holds everything else.
//! Threads that need parts of the same block at the same time wait for the one that decompresses the block.

use std::cell::RefCell;
use std::sync::Arc;

use dashmap::DashSet;
use quick_cache::sync::Cache;
use stencilfs::error::{Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Template};
use stencilfs::sys::memory::memfd::LockedBuffer;
use stencilfs::units::{Bytes, to_usize};

use crate::protocol::stats::{Counter, Stats};
use crate::server::read::reply_buffers::Replies;
use crate::server::refusal::Refusal;

/// Largest number of damaged blocks that are logged. Further ones are only counted.
const MAX_REPORTED: usize = 4096;

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
pub struct Decoder {
    /// Decompressed blocks, by their hashes.
    cache: Cache<Digest, Arc<Vec<u8>>>,
    stats: Stats,
    replies: Replies,
    /// Damaged blocks that were already logged.
    reported: DashSet<(Digest, usize, u64)>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Decoder({} blocks cached)", self.cache.len())
    }
}

impl Decoder {
    /// Creates a decoder that caches at most `max_bytes` bytes of decompressed blocks. `replies` are buffers of
    /// [`MAX_READ`] bytes, from which replies are sent.
    pub fn new(max_bytes: Bytes, stats: Stats, replies: Replies) -> Decoder {
        let cache = Cache::new(to_usize(max_bytes.get() / BLOCK_SIZE));
        Decoder { cache, stats, replies, reported: DashSet::new() }
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
            let is_missing = |block: &u64| {
                let id = template.block_id(file, *block).ok().flatten();
                id.is_none_or(|id| self.cache.peek(&id).is_none())
            };
            let following = (block + 1..end.div_ceil(BLOCK_SIZE)).take_while(is_missing);
            scratch.announce(following.count() as u64);
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
        if whole && self.cache.peek(&id).is_none() {
            self.stats.count(Counter::BlocksDecoded);
            template.read_block(file, block, scratch, out)?;
            return Ok(());
        }
        let mut was_cached = true;
        let cached = self.cache.get_or_insert_with(&id, || {
            was_cached = false;
            let mut bytes = vec![0; to_usize(BLOCK_SIZE)];
            template.read_block(file, block, scratch, &mut bytes)?;
            Ok::<Arc<Vec<u8>>, Error>(Arc::new(bytes))
        })?;
        self.stats.count(if was_cached { Counter::BlocksCached } else { Counter::BlocksDecoded });
        out.copy_from_slice(&cached[skip..skip + out.len()]);
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
                template:% = template.digest(), file = name;
                "template {} file {name} offset {}: {error}; reads of that block, digest {id}, fail with EIO",
                template.digest(),
                block * BLOCK_SIZE
            );
        }
        refusal
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use stencilfs::control::ServeMode;

    use super::*;
    use crate::server::testing::{BLOCK, World, reply};

    /// Threads that need parts of the same block at the same time: one decodes, the others wait for the block.
    #[test]
    fn a_block_is_decoded_once_for_readers_of_its_parts() {
        const BLOCKS: usize = 200;
        let world = World::new(ServeMode::Decode);
        let bytes: Vec<u8> = (0..BLOCKS * BLOCK).map(|at| (at / 5 * 7 + at / BLOCK) as u8).collect();
        let digest = world.import("big:1", &bytes);
        let ino = world.find(&format!("by-id/{digest}/memory")).unwrap().attributes.ino;
        let together = Barrier::new(2);
        let read_all = |page: usize| {
            for block in 0..BLOCKS {
                together.wait();
                let start = block * BLOCK + page * 4096;
                assert!(reply(&world.read(ino, start as u64, 4096)).unwrap() == bytes[start..start + 4096]);
            }
        };
        std::thread::scope(|threads| {
            threads.spawn(|| read_all(3));
            read_all(9);
        });
        let stats = &world.fs.stats;
        assert_eq!(stats.get(Counter::BlocksDecoded), BLOCKS as u64);
        assert_eq!(stats.get(Counter::BlocksCached), BLOCKS as u64);
    }
}
