//! Makes backings: fill, freeze, verify, register. A backing is served only after the last step.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use stencilfs::error::{Code, Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Template};
use stencilfs::sys::process::threads;
use stencilfs::units::{Bytes, HUGE_PAGE_SIZE, to_usize};

use crate::protocol::fds;
use crate::protocol::link::{Link, unexpected};
use crate::protocol::stats::{Counter, Stats};
use crate::protocol::{Cache, FileKey, ServerReply, ServerRequest};
use crate::server::read::outage::{STORE_TIMEOUT, retry_while};
use crate::server::tree::condemned::Condemned;

/// Backings are written in aligned pieces of this many bytes, so that the page cache holds them in folios that the CPU
/// can map with one entry.
const PIECE: u64 = HUGE_PAGE_SIZE;
const BLOCKS_PER_PIECE: u64 = PIECE / BLOCK_SIZE;

/// Largest number of threads for one backing. Each thread has a buffer for a piece and a buffer for compressed blocks.
const MAX_THREADS: usize = 16;

/// Interval of progress reports to the supervisor, in bytes.
const PROGRESS_INTERVAL: u64 = 64 << 20;

/// Makes backings in one location.
#[derive(Debug)]
pub struct Hydrator {
    cache: Cache,
    link: Arc<Link>,
    stats: Stats,
    condemned: Arc<Condemned>,
    threads: usize,
}

impl Hydrator {
    /// Creates a hydrator for backings in `cache`, with `threads` threads for each backing.
    pub fn new(
        cache: Cache,
        link: Arc<Link>,
        stats: Stats,
        condemned: Arc<Condemned>,
        threads: usize,
    ) -> Hydrator {
        Hydrator { cache, link, stats, condemned, threads: threads.clamp(1, MAX_THREADS) }
    }

    /// Returns the location of the backings.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Returns the list of condemned templates, which get no backings.
    pub fn condemned(&self) -> &Condemned {
        &self.condemned
    }

    /// Returns the link to the supervisor.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Makes the backing of a file, and returns its id. `evict` must stop serving the given backings and close those
    /// that no process uses.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`] if the backing does not fit into the cache, [`Code::Damage`] if the store is damaged,
    /// and an error if the file system of the cache fails.
    pub fn hydrate(
        &self,
        template: &Template,
        file: usize,
        key: &FileKey,
        evict: impl Fn(Vec<FileKey>) -> Result<()>,
    ) -> Result<(u32, OwnedFd)> {
        self.expect_not_condemned(template)?;
        let size = template.files().get(file).map_or(Bytes::ZERO, |f| f.size);
        let pieces = pieces(template, file, size)?;
        let bytes: u64 = pieces.iter().map(|p| p.end - p.start).sum();
        let backing = match self.reserve(key, size, bytes, evict)? {
            Reservation::Empty(file) => file,
            Reservation::Ready(id, file) => return Ok((id, file)),
        };
        self.fill(template, file, key, &backing, &pieces)?;
        self.link.request_done(&ServerRequest::Freeze { key: key.clone() })?;
        self.verify(template, file, &backing, size, &pieces)?;
        match self.link.request(
            &ServerRequest::Register { key: key.clone(), identity: fds::identity(&backing)? },
            None,
        )? {
            (ServerReply::Registered(id), _) => Ok((id, backing.into())),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn expect_not_condemned(&self, template: &Template) -> Result<()> {
        match self.condemned.holds(template.digest()) {
            true => Err(Error::not_found("the template is condemned")),
            false => Ok(()),
        }
    }

    /// Reserves space and returns an empty file. The supervisor creates the file, as the sandbox forbids the server to
    /// do so.
    fn reserve(
        &self,
        key: &FileKey,
        size: Bytes,
        bytes: u64,
        evict: impl Fn(Vec<FileKey>) -> Result<()>,
    ) -> Result<Reservation> {
        let request = ServerRequest::Reserve { key: key.clone(), size: size.get(), data_bytes: bytes };
        let mut reply = self.link.request(&request, None)?;
        if let (ServerReply::Evict(keys), _) = reply {
            evict(keys)?;
            reply = self.link.request(&request, None)?;
        }
        match reply {
            (ServerReply::Created, Some(file)) => Ok(Reservation::Empty(file.into())),
            (ServerReply::Registered(id), Some(file)) => Ok(Reservation::Ready(id, file)),
            (ServerReply::Evict(_), _) => Err(Error::try_again(format!(
                "the backing needs {}, and the cache is full of backings in use",
                Bytes::new(bytes)
            ))),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Makes the supervisor close those of the given backings that no process uses. Returns the closed backings.
    ///
    /// # Errors
    /// Returns an error if the supervisor refuses.
    pub fn evict(&self, keys: Vec<FileKey>) -> Result<Vec<FileKey>> {
        match self.link.request(&ServerRequest::Evict { keys }, None)? {
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
            self.expect_not_condemned(template)?;
            let buffer = &mut buffer[..to_usize(piece.end - piece.start)];
            for (i, part) in buffer.chunks_mut(to_usize(BLOCK_SIZE)).enumerate() {
                let block = piece.start / BLOCK_SIZE + i as u64;
                retry_while(
                    STORE_TIMEOUT,
                    |e: &Error| e.code() == Code::TryAgain,
                    || template.read_block(file, block, scratch, part),
                )?;
            }
            backing.write_all_at(buffer, piece.start).map_err(|e| cannot_fill(&self.cache, e))?;
            let length = buffer.len() as u64;
            self.stats.add(Counter::HydratedBytes, length);
            let before = filled.fetch_add(length, Ordering::Relaxed);
            if before / PROGRESS_INTERVAL != (before + length) / PROGRESS_INTERVAL {
                let bytes = before + length;
                self.link.request_done(&ServerRequest::Progress { key: key.clone(), bytes })?;
            }
            Ok(())
        })
    }

    /// Compares each block of a frozen backing with its hash, and checks that all pieces without data are holes.
    fn verify(
        &self,
        template: &Template,
        file: usize,
        backing: &File,
        size: Bytes,
        pieces: &[Range<u64>],
    ) -> Result<()> {
        self.in_parallel(pieces, |piece, _, buffer| {
            self.expect_not_condemned(template)?;
            let length = to_usize(piece.end - piece.start);
            // A hash covers a whole block, with zeros beyond the end of the file.
            buffer[length..].fill(0);
            backing
                .read_exact_at(&mut buffer[..length], piece.start)
                .map_err(|e| Error::failed("cannot read the backing to verify it").because(e))?;
            for (i, part) in buffer.chunks(to_usize(BLOCK_SIZE)).enumerate() {
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
                        "the backing differs from the data written to it, at offset {}",
                        block * BLOCK_SIZE
                    )));
                }
            }
            Ok(())
        })?;
        let mut at = 0;
        for gap_end in pieces.iter().map(|p| p.start).chain([size.get()]) {
            if at < gap_end && !is_hole(backing, at..gap_end)? {
                return Err(Error::damage(format!("the backing has data in a hole, after offset {at}")));
            }
            at = pieces.iter().find(|p| p.start == gap_end).map_or(gap_end, |p| p.end);
        }
        Ok(())
    }

    /// Runs `work` on each piece; stops all threads at the first error.
    fn in_parallel(
        &self,
        pieces: &[Range<u64>],
        work: impl Fn(&Range<u64>, &mut Scratch, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let run = || {
            let mut scratch = Scratch::default();
            let mut buffer = vec![0; to_usize(PIECE)];
            while !failed.load(Ordering::Relaxed) {
                let index = to_usize(next.fetch_add(1, Ordering::Relaxed));
                let Some(piece) = pieces.get(index) else { break };
                if let Err(error) = work(piece, &mut scratch, &mut buffer) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        let threads = self.threads.min(pieces.len().max(1));
        threads::share(threads, run)
    }
}

/// The supervisor's reply to a reservation.
enum Reservation {
    /// An empty file, to be filled.
    Empty(File),
    /// A backing that the previous server registered after the start of this server.
    Ready(u32, OwnedFd),
}

/// Returns the aligned pieces of a file that hold data, in order; the last one may end with the file.
fn pieces(template: &Template, file: usize, size: Bytes) -> Result<Vec<Range<u64>>> {
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for blocks in template.data_ranges(file)? {
        for index in blocks.start / BLOCKS_PER_PIECE..=(blocks.end - 1) / BLOCKS_PER_PIECE {
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
        Err(e) => Err(Error::failed("cannot search the backing for holes").because(e.into())),
    }
}
