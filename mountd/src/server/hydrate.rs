//! Makes backings: fill, freeze, verify, register. Nothing is served from one before the last step.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use stencilfs::error::{Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Template};
use stencilfs::sys::threads;
use stencilfs::units::{Bytes, HUGE_PAGE_SIZE};

use crate::protocol::fds;
use crate::protocol::link::{Link, unexpected};
use crate::protocol::stats::{Counter, Stats};
use crate::protocol::{Cache, FileKey, ServerReply, ServerRequest};
use crate::server::condemned::Condemned;
use crate::server::store_outage::patiently;

/// Backings are written in pieces of this many bytes, at multiples of it: the page cache then holds them in folios that
/// a processor can map as one.
const PIECE: u64 = HUGE_PAGE_SIZE;
const BLOCKS: u64 = PIECE / BLOCK_SIZE;

/// Each has a buffer of one piece and one for compressed blocks.
const MOST_THREADS: usize = 16;

/// The supervisor hears of every so many bytes.
const PROGRESS: u64 = 64 << 20;

/// Makes backings in one place.
#[derive(Debug)]
pub struct Hydrator {
    cache: Cache,
    link: Arc<Link>,
    stats: Stats,
    condemned: Arc<Condemned>,
    threads: usize,
}

impl Hydrator {
    /// Makes backings there, with so many threads each.
    pub fn new(
        cache: Cache,
        link: Arc<Link>,
        stats: Stats,
        condemned: Arc<Condemned>,
        threads: usize,
    ) -> Hydrator {
        Hydrator { cache, link, stats, condemned, threads: threads.clamp(1, MOST_THREADS) }
    }

    /// Where backings are made.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// What is about to be removed: no backing is made of it.
    pub fn condemned(&self) -> &Condemned {
        &self.condemned
    }

    /// The way to the supervisor.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Makes the backing of a file and gives its id. `evict` stops handing out backings, and closes those unused.
    ///
    /// # Errors
    /// [`Code::TryAgain`](stencilfs::error::Code::TryAgain) where it does not fit, damage of the store, or a failure of
    /// the cache's filesystem.
    pub fn hydrate(
        &self,
        template: &Template,
        file: usize,
        key: &FileKey,
        evict: impl Fn(Vec<FileKey>) -> Result<()>,
    ) -> Result<(u32, OwnedFd)> {
        self.check(template)?;
        let size = template.files().get(file).map_or(Bytes::ZERO, |f| f.size);
        let pieces = pieces(template, file, size)?;
        let bytes: u64 = pieces.iter().map(|p| p.end - p.start).sum();
        let backing = match self.reserve(key, size, bytes, evict)? {
            Room::Empty(file) => file,
            Room::Ready(id, file) => return Ok((id, file)),
        };
        self.fill(template, file, key, &backing, &pieces)?;
        self.link.call_done(&ServerRequest::Freeze { key: key.clone() })?;
        self.verify(template, file, &backing, size, &pieces)?;
        match self
            .link
            .call(&ServerRequest::Register { key: key.clone(), identity: fds::identity(&backing)? }, None)?
        {
            (ServerReply::Registered(id), _) => Ok((id, backing.into())),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn check(&self, template: &Template) -> Result<()> {
        match self.condemned.holds(template.digest()) {
            true => Err(Error::not_found("it is about to be removed")),
            false => Ok(()),
        }
    }

    /// Room, and the file in it: the supervisor makes it, since a server may make none.
    fn reserve(
        &self,
        key: &FileKey,
        size: Bytes,
        bytes: u64,
        evict: impl Fn(Vec<FileKey>) -> Result<()>,
    ) -> Result<Room> {
        let ask = ServerRequest::Reserve { key: key.clone(), size: size.get(), data_bytes: bytes };
        let mut answer = self.link.call(&ask, None)?;
        if let (ServerReply::Evict(keys), _) = answer {
            evict(keys)?;
            answer = self.link.call(&ask, None)?;
        }
        match answer {
            (ServerReply::Created, Some(file)) => Ok(Room::Empty(file.into())),
            (ServerReply::Registered(id), Some(file)) => Ok(Room::Ready(id, file)),
            (ServerReply::Evict(_), _) => Err(Error::try_again(format!(
                "its backing needs {}, and the cache is full of backings in use",
                Bytes::new(bytes)
            ))),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Has the supervisor close those of these backings that nobody uses, and says which it closed.
    ///
    /// # Errors
    /// When the supervisor refuses.
    pub fn evict(&self, keys: Vec<FileKey>) -> Result<Vec<FileKey>> {
        match self.link.call(&ServerRequest::Evict { keys }, None)? {
            (ServerReply::Evicted(keys), _) => Ok(keys),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn fill(
        &self,
        template: &Template,
        file: usize,
        key: &FileKey,
        backing: &File,
        pieces: &[Range<u64>],
    ) -> Result<()> {
        let filled = AtomicU64::new(0);
        self.in_parallel(pieces, |piece, scratch, buffer| {
            self.check(template)?;
            let buffer = &mut buffer[..(piece.end - piece.start) as usize];
            for (i, part) in buffer.chunks_mut(BLOCK_SIZE as usize).enumerate() {
                let block = piece.start / BLOCK_SIZE + i as u64;
                patiently(|| template.read_block(file, block, scratch, part))?;
            }
            backing.write_all_at(buffer, piece.start).map_err(|e| cannot_fill(&self.cache, e))?;
            let length = buffer.len() as u64;
            self.stats.add(Counter::HydratedBytes, length);
            let before = filled.fetch_add(length, Ordering::Relaxed);
            if before / PROGRESS != (before + length) / PROGRESS {
                let bytes = before + length;
                self.link.call_done(&ServerRequest::Progress { key: key.clone(), bytes })?;
            }
            Ok(())
        })
    }

    /// Compares every block of a frozen backing with its hash, and every piece without data with nothing.
    fn verify(
        &self,
        template: &Template,
        file: usize,
        backing: &File,
        size: Bytes,
        pieces: &[Range<u64>],
    ) -> Result<()> {
        self.in_parallel(pieces, |piece, _, buffer| {
            self.check(template)?;
            let length = (piece.end - piece.start) as usize;
            // A hash is over a whole block, zeros behind the end of the file.
            buffer[length..].fill(0);
            backing
                .read_exact_at(&mut buffer[..length], piece.start)
                .map_err(|e| Error::failed("cannot read the backing again").because(e))?;
            for (i, part) in buffer.chunks(BLOCK_SIZE as usize).enumerate() {
                let block = piece.start / BLOCK_SIZE + i as u64;
                if block * BLOCK_SIZE >= piece.end {
                    break;
                }
                let good = match template.block_id(file, block)? {
                    Some(hash) => Digest::of(part) == hash,
                    None => part.iter().all(|&b| b == 0),
                };
                if !good {
                    return Err(Error::damage(format!(
                        "the backing holds other bytes than were written to it, at offset {}",
                        block * BLOCK_SIZE
                    )));
                }
            }
            Ok(())
        })?;
        let mut at = 0;
        for gap_end in pieces.iter().map(|p| p.start).chain([size.get()]) {
            if at < gap_end && !is_hole(backing, at..gap_end)? {
                return Err(Error::damage(format!(
                    "the backing holds data where there is none, behind offset {at}"
                )));
            }
            at = pieces.iter().find(|p| p.start == gap_end).map_or(gap_end, |p| p.end);
        }
        Ok(())
    }

    /// Runs `work` on every piece; the first error stops all.
    fn in_parallel(
        &self,
        pieces: &[Range<u64>],
        work: impl Fn(&Range<u64>, &mut Scratch, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let one = || {
            let mut scratch = Scratch::default();
            let mut buffer = vec![0; PIECE as usize];
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed) as usize;
                let Some(piece) = pieces.get(index) else { break };
                if let Err(error) = work(piece, &mut scratch, &mut buffer) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        let threads = self.threads.min(pieces.len().max(1));
        threads::share(threads, one)
    }
}

/// What the supervisor gives for a backing.
enum Room {
    /// An empty file.
    Empty(File),
    /// What the server before has registered since this one began.
    Ready(u32, OwnedFd),
}

/// The aligned pieces of a file that hold data, in order; the last one ends with the file.
fn pieces(template: &Template, file: usize, size: Bytes) -> Result<Vec<Range<u64>>> {
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for blocks in template.data_ranges(file)? {
        for index in blocks.start / BLOCKS..=(blocks.end - 1) / BLOCKS {
            let start = index * PIECE;
            if pieces.last().is_none_or(|last| last.start != start) {
                pieces.push(start..(start + PIECE).min(size.get()));
            }
        }
    }
    Ok(pieces)
}

fn cannot_fill(cache: &Cache, error: std::io::Error) -> Error {
    match cache {
        Cache::Directory(dir) => Error::io("cannot fill the backing", dir, error),
        Cache::Memory | Cache::Nowhere(_) => {
            Error::failed("cannot fill the backing in memory").because(error)
        }
    }
}

fn is_hole(file: &File, range: Range<u64>) -> Result<bool> {
    match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(data) => Ok(data >= range.end),
        Err(rustix::io::Errno::NXIO) => Ok(true),
        Err(e) => Err(Error::failed("cannot look for holes in the backing").because(e.into())),
    }
}
