//! Makes backings: fill, freeze, verify, register. A backing is served only after the last step.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Advice, SeekFrom, fadvise};
use stencilfs::control::BackingKind;
use stencilfs::error::{Code, Error, Result};
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, StorePath, Template};
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
pub const PIECE: u64 = HUGE_PAGE_SIZE;
const BLOCKS_PER_PIECE: u64 = PIECE / BLOCK_SIZE;

/// Largest number of threads for one backing. Each thread has a buffer for a piece and a buffer for compressed blocks.
const MAX_THREADS: usize = 16;

/// Interval of progress reports to the supervisor, in bytes.
const PROGRESS_INTERVAL: u64 = 64 << 20;

/// The hint for a block that is intact in the store and wrong in the backing.
const INTACT: &str = "the records in the store are intact: mount again; if the error occurs again, use another value of --serve";

/// A registered backing.
#[derive(Debug)]
pub struct Ready {
    /// The id on the FUSE connection.
    pub id: u32,
    /// When its blocks were last compared with their hashes, in seconds since 1970.
    pub verified_at: u64,
    /// The file. The kernel has a reference too; the descriptor is for a supervisor that takes over, and for the scrub.
    pub file: File,
    /// The packs of the template when the backing was made; `None` if an earlier server has made it.
    pub packs: Option<Vec<StorePath>>,
}

/// The file of a backing before its verification.
#[derive(Debug)]
pub enum Prepared {
    /// The previous server has registered the backing after the start of this server.
    Registered(Ready),
    /// The file is frozen.
    Frozen {
        /// The file to verify.
        backing: File,
        /// When it was verified before, if nothing has changed since.
        verified_at: Option<u64>,
        /// The packs of the template.
        packs: Option<Vec<StorePath>>,
    },
}

/// Returns the time in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Makes backings in one location.
#[derive(Debug)]
pub struct Hydrator {
    kind: BackingKind,
    cache: Cache,
    link: Arc<Link>,
    stats: Stats,
    condemned: Arc<Condemned>,
    threads: usize,
}

impl Hydrator {
    /// Creates a hydrator for backings of this kind in `cache`, with `threads` threads for each backing.
    pub fn new(
        (kind, cache): (BackingKind, Cache),
        link: Arc<Link>,
        stats: Stats,
        condemned: Arc<Condemned>,
        threads: usize,
    ) -> Hydrator {
        Hydrator { kind, cache, link, stats, condemned, threads: threads.clamp(1, MAX_THREADS) }
    }

    /// Returns the kind of the backings.
    pub fn kind(&self) -> BackingKind {
        self.kind
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

    /// Makes the file of a backing, up to the step before its verification. `evict` must stop serving the given
    /// backings and close those that no process uses.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`] if the backing does not fit into the cache, [`Code::Damage`] if the store is damaged,
    /// and an error if the file system of the cache fails.
    pub fn prepare(
        &self,
        template: &Template,
        file: usize,
        key: &FileKey,
        evict: impl Fn(Vec<FileKey>) -> Result<()>,
    ) -> Result<Prepared> {
        self.expect_not_condemned(template)?;
        let packs = Some(template.packs());
        let (image, length, bytes) = match self.kind {
            BackingKind::Copy => {
                let size = template.files().get(file).map_or(Bytes::ZERO, |f| f.size);
                (None, size, pieces(template, file)?.iter().map(|p| p.end - p.start).sum())
            }
            BackingKind::Kernel => {
                let image = despite_outage(|| template.kernel_image(file))?;
                let length = image.len() as u64;
                (Some(image), Bytes::new(length), length)
            }
        };
        let filled = match self.reserve(key, length, bytes, evict)? {
            Reservation::Empty(file) => file,
            Reservation::Ready(id, file) => {
                return Ok(Prepared::Registered(Ready { id, verified_at: now(), file: file.into(), packs }));
            }
        };
        match &image {
            None => self.fill(template, file, key, &filled)?,
            Some(image) => filled.write_all_at(image, 0).map_err(|e| cannot_fill(&self.cache, e))?,
        }
        match self.link.request(&ServerRequest::Freeze { key: key.clone() }, None)? {
            (ServerReply::Frozen { verified_at }, Some(backing)) => {
                Ok(Prepared::Frozen { backing: File::from(backing), verified_at, packs })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Verifies a frozen backing, unless it was verified before, and registers it.
    ///
    /// # Errors
    /// Returns [`Code::Damage`] if a block differs from its hash, and an error if the kernel refuses the backing.
    pub fn register(
        &self,
        template: &Template,
        file: usize,
        key: &FileKey,
        prepared: Prepared,
    ) -> Result<Ready> {
        let (backing, verified_at, packs) = match prepared {
            Prepared::Registered(ready) => return Ok(ready),
            Prepared::Frozen { backing, verified_at, packs } => (backing, verified_at, packs),
        };
        let verified_at = match verified_at {
            Some(at) => at,
            None => {
                let at = now();
                self.verify(template, file, &backing, self.threads)?;
                at
            }
        };
        let register = ServerRequest::Register {
            key: key.clone(),
            identity: fds::identity(&backing)?,
            verified_at: (self.kind == BackingKind::Kernel).then_some(verified_at),
        };
        match self.link.request(&register, None)? {
            (ServerReply::Registered(id), _) => Ok(Ready { id, verified_at, file: backing, packs }),
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

    fn fill(&self, template: &Template, file: usize, key: &FileKey, backing: &File) -> Result<()> {
        let filled = AtomicU64::new(0);
        self.in_parallel(&pieces(template, file)?, self.threads, |piece, scratch, buffer| {
            self.expect_not_condemned(template)?;
            let buffer = &mut buffer[..to_usize(piece.end - piece.start)];
            let blocks = piece.start / BLOCK_SIZE..piece.end.div_ceil(BLOCK_SIZE);
            for (block, part) in blocks.clone().zip(buffer.chunks_mut(to_usize(BLOCK_SIZE))) {
                scratch.announce(blocks.end - 1 - block);
                despite_outage(|| template.read_block(file, block, scratch, part))?;
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

    /// Compares each block of a frozen backing with its hash, and checks that all pieces without data are holes. For
    /// kernel decode, the compared bytes are those that the kernel decodes, so that the decoders of the kernel are
    /// verified too.
    ///
    /// # Errors
    /// Returns [`Code::Damage`] if a block differs from its hash, or if there is data in a hole.
    pub fn verify(&self, template: &Template, file: usize, backing: &File, threads: usize) -> Result<()> {
        let pieces = pieces(template, file)?;
        let size = template.files().get(file).map_or(Bytes::ZERO, |f| f.size);
        self.in_parallel(&pieces, threads, |piece, _, buffer| {
            self.expect_not_condemned(template)?;
            self.verify_piece(template, file, backing, piece, buffer)
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

    /// Compares the blocks of a piece. `buffer` has the length of a piece.
    ///
    /// # Errors
    /// Same as [`verify`](Self::verify).
    pub fn verify_piece(
        &self,
        template: &Template,
        file: usize,
        backing: &File,
        piece: &Range<u64>,
        buffer: &mut [u8],
    ) -> Result<()> {
        let length = to_usize(piece.end - piece.start);
        // A hash covers a whole block, with zeros beyond the end of the file.
        buffer[length..].fill(0);
        if let Err(e) = backing.read_exact_at(&mut buffer[..length], piece.start) {
            return Err(self.unreadable(template, file, backing, piece, e));
        }
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
                return Err(self.mismatch(template, file, block));
            }
        }
        if self.kind == BackingKind::Kernel {
            drop_cache(backing, piece);
        }
        Ok(())
    }

    /// Returns the error for a piece that cannot be read. If a record of the store is damaged, the error names the
    /// record. Otherwise the kernel cannot decode an intact record, or the disk has failed.
    fn unreadable(
        &self,
        template: &Template,
        file: usize,
        backing: &File,
        piece: &Range<u64>,
        error: std::io::Error,
    ) -> Error {
        let failed = Error::failed("cannot read the backing to verify it");
        if self.kind == BackingKind::Copy {
            return failed.because(error);
        }
        let blocks = piece.start / BLOCK_SIZE..piece.end.div_ceil(BLOCK_SIZE);
        if let Some(damage) = self.find_damage(template, file, blocks.clone()) {
            return damage;
        }
        // The records that the store has now are intact: the backing decodes other records, or the kernel has a bug.
        let mut block = vec![0; to_usize(BLOCK_SIZE)];
        let cannot_decode = |number: &u64| {
            let start = number * BLOCK_SIZE;
            let length = to_usize((piece.end - start).min(BLOCK_SIZE));
            backing.read_exact_at(&mut block[..length], start).is_err()
        };
        match blocks.into_iter().find(cannot_decode) {
            Some(number) => {
                let offset = number * BLOCK_SIZE;
                Error::damage(format!("the kernel cannot decode the block at offset {offset}: {error}"))
                    .hint(INTACT)
            }
            None => failed.because(error),
        }
    }

    /// Returns the damage of the first of these blocks that is damaged in the store.
    fn find_damage(&self, template: &Template, file: usize, blocks: Range<u64>) -> Option<Error> {
        let mut plain = vec![0; to_usize(BLOCK_SIZE)];
        let mut damage = |block| {
            let read = template.read_block(file, block, &mut Scratch::default(), &mut plain);
            read.err().filter(|error| error.code() == Code::Damage)
        };
        blocks.into_iter().find_map(&mut damage)
    }

    /// Returns the error for a block of a backing that differs from its hash. For kernel decode, the error names the
    /// damaged record of the store, with its pack and offset, if there is one.
    fn mismatch(&self, template: &Template, file: usize, block: u64) -> Error {
        let offset = block * BLOCK_SIZE;
        match self.kind {
            BackingKind::Copy => {
                Error::damage(format!("the backing differs from the data written to it, at offset {offset}"))
            }
            BackingKind::Kernel => self.find_damage(template, file, block..block + 1).unwrap_or_else(|| {
                Error::damage(format!(
                    "the kernel decodes other bytes than those imported at offset {offset}"
                ))
                .hint(INTACT)
            }),
        }
    }

    /// Runs `work` on each piece; stops all threads at the first error.
    fn in_parallel(
        &self,
        pieces: &[Range<u64>],
        threads: usize,
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
        threads::share(threads.min(pieces.len().max(1)), run)
    }
}

/// Repeats `work` during a store outage.
fn despite_outage<T>(work: impl FnMut() -> Result<T>) -> Result<T> {
    retry_while(STORE_TIMEOUT, |e: &Error| e.code() == Code::TryAgain, work)
}

/// The supervisor's reply to a reservation.
enum Reservation {
    /// An empty file, to be filled.
    Empty(File),
    /// A backing that the previous server registered after the start of this server.
    Ready(u32, OwnedFd),
}

/// Returns the aligned pieces of a file that hold data, in order; the last one may end with the file.
pub fn pieces(template: &Template, file: usize) -> Result<Vec<Range<u64>>> {
    let size = template.files().get(file).map_or(Bytes::ZERO, |f| f.size);
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

/// Drops pages of a file that no process maps: processes that map the file decide which pages are cached.
pub fn drop_cache(backing: &File, piece: &Range<u64>) {
    let _ = fadvise(backing, piece.start, NonZeroU64::new(piece.end - piece.start), Advice::DontNeed);
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
