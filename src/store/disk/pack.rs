//! Reads packs: records with O_DIRECT, indexes by mapping.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Advice, OFlags, fadvise, fcntl_setfl};

use super::path::StorePath;
use crate::error::{Error, Result, errno_text};
use crate::store::Digest;
use crate::store::format::pack::{IndexEntry, PackHeader};
use crate::store::format::{Invalid, PackId, Stored};
use crate::sys::memory::mapped_file::MappedFile;
use crate::units::to_usize;

/// Alignment of direct reads in bytes: the largest logical block size in use.
const ALIGN: u64 = 4096;

/// Maximum number of open packs of a store. Beyond the limit another pack is closed.
const MAX_OPEN: usize = 512;

/// Aligned memory for direct reads, reused between reads. It holds the bytes of the last read.
#[derive(Debug, Default)]
pub(in crate::store) struct AlignedBuffer {
    memory: Vec<u8>,
    held: Option<LoadedRange>,
    /// A run of records whose read has failed: the records are read one by one.
    unreadable: Option<(PackId, Range<u64>)>,
}

/// The bytes of a pack that a buffer holds.
#[derive(Debug)]
struct LoadedRange {
    pack: PackId,
    range: Range<u64>,
    /// Index of the first byte in the memory of the buffer.
    at: usize,
}

impl AlignedBuffer {
    /// Returns the index of an aligned part of the memory with `length` bytes.
    fn take(&mut self, length: usize) -> usize {
        self.held = None;
        let align = to_usize(ALIGN);
        if self.memory.len() < length + align {
            self.memory.resize(length + align, 0);
        }
        self.memory.as_ptr().align_offset(align).min(align)
    }

    /// Returns true if the buffer holds the record.
    pub fn holds(&self, pack: PackId, stored: Stored) -> bool {
        let record = stored.range();
        let is_in = |held: &LoadedRange| {
            held.pack == pack && held.range.start <= record.start && record.end <= held.range.end
        };
        self.held.as_ref().is_some_and(is_in)
    }

    /// Forgets the held bytes: the next read comes from the disk.
    pub fn forget(&mut self) {
        self.held = None;
    }

    /// Returns the bytes of a range that the buffer holds; nothing if the buffer is empty.
    fn get(&self, range: &Range<u64>) -> &[u8] {
        let Some(held) = &self.held else { return &[] };
        let at = held.at + to_usize(range.start - held.range.start);
        &self.memory[at..at + to_usize(range.end - range.start)]
    }
}

/// An open pack with a verified header.
#[derive(Debug)]
pub(in crate::store) struct PackFile {
    path: StorePath,
    file: File,
    direct: AtomicBool,
    header: PackHeader,
}

impl PackFile {
    pub fn open(path: StorePath, id: PackId) -> Result<PackFile> {
        let (file, direct) = match path.file_with(OFlags::RDONLY | OFlags::DIRECT) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                (path.file().map_err(|e| open_error(&path, e))?, false)
            }
            Err(e) => return Err(open_error(&path, e)),
        };
        let mut pack = PackFile {
            file,
            direct: AtomicBool::new(direct),
            header: PackHeader::new(id, 0, 0, Digest::new([0; 32])),
            path,
        };
        let (mut buffer, head) = (AlignedBuffer::default(), 0..PackHeader::LEN as u64);
        pack.load(head.clone(), &mut buffer)?;
        let header = PackHeader::decode(buffer.get(&head)).map_err(|e| e.in_file("pack", &pack.path))?;
        // The file length is not checked here: the records before the cut of a truncated pack are still readable, and
        // every block is verified anyway.
        check_id(&header, id).map_err(|e| e.in_file("pack", &pack.path))?;
        pack.header = header;
        Ok(pack)
    }

    /// Returns the error for a record that does not decode to the stored block.
    pub fn mismatch(&self, stored: Stored, why: &str) -> Error {
        let why = format!("block at offset {} cannot be verified: {why}", stored.offset);
        Invalid::Damage(why)
            .in_file("pack", &self.path)
            .hint("run 'stencil verify' to list the affected templates; import the same memory again to repair them")
    }

    /// Returns the record `stored`: from `buffer`, if the last read covered it. Otherwise reads the record together
    /// with the records behind it, up to the offset `end`: the caller needs these next.
    pub fn record<'a>(&self, stored: Stored, end: u64, buffer: &'a mut AlignedBuffer) -> Result<&'a [u8]> {
        let record = stored.range();
        if record.start < PackHeader::LEN as u64 || record.end > self.header.index_offset {
            let why = format!(
                "record at offset {} (length {}) is outside the records, which end at offset {}",
                record.start, stored.length, self.header.index_offset
            );
            return Err(Invalid::Damage(why).in_file("pack", &self.path));
        }
        if !buffer.holds(self.header.id, stored) {
            let id = self.header.id;
            let is_in = |(pack, range): &(PackId, Range<u64>)| *pack == id && range.contains(&record.start);
            let end = match buffer.unreadable.as_ref().is_some_and(is_in) {
                true => record.end,
                false => end.clamp(record.end, self.header.index_offset),
            };
            let run = record.start..end;
            if run == record {
                self.load(run, buffer)?;
            } else if self.load(run.clone(), buffer).is_err() {
                // A bad sector in the run: the records are read one by one, so that only the damaged one fails, and the
                // device tries the sector no more often than without the run.
                buffer.unreadable = Some((id, run));
                self.load(record.clone(), buffer)?;
            }
        }
        Ok(buffer.get(&record))
    }

    /// Reads a range of the file into `buffer`.
    fn load(&self, range: Range<u64>, buffer: &mut AlignedBuffer) -> Result<()> {
        let (offset, length) = (range.start, to_usize(range.end - range.start));
        let start = offset / ALIGN * ALIGN;
        let end = range.end.next_multiple_of(ALIGN);
        let skip = to_usize(offset - start);
        let at = buffer.take(to_usize(end - start));
        let target = &mut buffer.memory[at..at + to_usize(end - start)];
        let mut have = 0;
        while have < skip + length {
            // A direct read is short only at the end of the file.
            match self.file.read_at(&mut target[have..], start + have as u64) {
                Ok(0) => {
                    let why = format!(
                        "truncated at offset {}, within the record at offset {offset} (length {length})",
                        start + have as u64
                    );
                    return Err(Invalid::Damage(why).in_file("pack", &self.path));
                }
                Ok(count) => have += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if e.raw_os_error() == Some(libc::EINVAL)
                        && self.direct.swap(false, Ordering::Relaxed) =>
                {
                    fcntl_setfl(&self.file, OFlags::empty())
                        .map_err(|e| Error::io("cannot read pack", &self.path, e.into()))?;
                }
                Err(e) => {
                    let why = format!("cannot read at offset {offset}: {}", errno_text(&e));
                    return Err(Invalid::Damage(why).in_file("pack", &self.path));
                }
            }
        }
        if !self.direct.load(Ordering::Relaxed) {
            // Buffered reads would keep the bytes in the page cache twice: for the pack, and for the inode of the
            // mount.
            let _ = fadvise(&self.file, start, std::num::NonZeroU64::new(end - start), Advice::DontNeed);
        }
        buffer.held = Some(LoadedRange { pack: self.header.id, range, at: at + skip });
        Ok(())
    }
}

fn open_error(path: &StorePath, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Invalid::damage("the file is missing").in_file("pack", path),
        _ => path.error("cannot open pack", error),
    }
}

fn check_id(header: &PackHeader, id: PackId) -> std::result::Result<(), Invalid> {
    match header.id == id {
        true => Ok(()),
        false => Err(Invalid::damage(format!("header names pack {}, expected {id}", header.id))),
    }
}

fn check_header(header: &PackHeader, id: PackId, length: u64) -> std::result::Result<(), Invalid> {
    check_id(header, id)?;
    if header.file_length() != length {
        return Err(Invalid::damage(format!("length is {length}, expected {} bytes", header.file_length())));
    }
    Ok(())
}

/// The packs of a store, opened on demand.
#[derive(Debug)]
pub(in crate::store) struct Packs {
    directory: StorePath,
    open: Mutex<HashMap<PackId, Arc<PackFile>>>,
}

impl Packs {
    pub fn new(directory: StorePath) -> Packs {
        Packs { directory, open: Mutex::default() }
    }

    pub fn path(&self, id: PackId) -> StorePath {
        pack_path(&self.directory, id)
    }

    pub fn get(&self, id: PackId) -> Result<Arc<PackFile>> {
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pack) = lock().get(&id) {
            return Ok(pack.clone());
        }
        let pack = Arc::new(PackFile::open(self.path(id), id)?);
        let mut open = lock();
        if open.len() >= MAX_OPEN {
            // Any pack may be closed: a pack is reopened at its next use.
            let victim = open.keys().next().copied();
            victim.map(|v| open.remove(&v));
        }
        open.insert(id, pack.clone());
        Ok(pack)
    }

    /// Closes a pack. Reads in progress are not affected.
    pub fn forget(&self, id: PackId) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Closes packs whose files were removed.
    pub fn close_vanished(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|id, _| self.path(*id).exists());
    }

    /// Returns the identifiers of all packs in the directory, from their file names.
    pub fn ids(&self) -> Result<Vec<PackId>> {
        let names = self.directory.names().map_err(|e| self.directory.error("cannot list packs", e))?;
        let mut ids: Vec<PackId> =
            names.iter().filter_map(|name| parse_name(&name.to_string_lossy())).collect();
        ids.sort_unstable();
        Ok(ids)
    }
}

/// Returns the path of a pack in `directory`.
pub(in crate::store) fn pack_path(directory: &StorePath, id: PackId) -> StorePath {
    directory.join(format!("{id}.pack"))
}

fn parse_name(name: &str) -> Option<PackId> {
    let hex = name.strip_suffix(".pack").filter(|h| h.len() == 32 && h.is_ascii())?;
    let mut id = [0; 16];
    for (byte, at) in id.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some(PackId(id)).filter(|id| id.to_string() == hex)
}

/// The index of one pack, sorted by hash, mapped and verified.
#[derive(Debug)]
pub(in crate::store) struct PackIndex {
    id: PackId,
    map: MappedFile,
    offset: usize,
    count: usize,
}

impl PackIndex {
    /// Maps the index of the pack at `path` and verifies its hash.
    pub fn open(path: &StorePath, id: PackId) -> Result<PackIndex> {
        let invalid = |e: Invalid| e.in_file("pack", path);
        let file = path.file().map_err(|e| open_error(path, e))?;
        let length = file.metadata().map_err(|e| Error::io("cannot stat pack", path, e))?.len();
        let mut head = [0; PackHeader::LEN];
        if length < PackHeader::LEN as u64 {
            return Err(invalid(Invalid::damage(format!(
                "truncated: length is {length}, expected at least {} bytes",
                PackHeader::LEN
            ))));
        }
        file.read_exact_at(&mut head, 0).map_err(|e| Error::io("cannot read pack", path, e))?;
        let header = PackHeader::decode(&head).map_err(invalid)?;
        check_header(&header, id, length).map_err(invalid)?;
        let mut index = vec![0; to_usize(length - header.index_offset)];
        file.read_exact_at(&mut index, header.index_offset)
            .map_err(|e| invalid(Invalid::damage(format!("cannot read the index: {}", errno_text(&e)))))?;
        let padding = index.split_off(to_usize(header.index_end() - header.index_offset));
        if padding.iter().any(|&byte| byte != 0) {
            return Err(invalid(Invalid::damage("the bytes after the index are not zero")));
        }
        let got = Digest::of(&index);
        if got != header.index_hash {
            let why = format!("index has hash {got}, expected {}", header.index_hash);
            return Err(invalid(Invalid::Damage(why)));
        }
        let map = MappedFile::map(&file, length).map_err(|e| Error::io("cannot map pack", path, e))?;
        Ok(PackIndex { id, map, offset: to_usize(header.index_offset), count: to_usize(header.index_count) })
    }

    pub fn id(&self) -> PackId {
        self.id
    }

    pub fn len(&self) -> usize {
        self.count
    }

    fn bytes(&self, index: usize) -> &[u8] {
        &self.map[self.offset + index * IndexEntry::LEN..][..IndexEntry::LEN]
    }

    fn key(&self, index: usize) -> u64 {
        prefix(self.bytes(index))
    }

    /// Returns the entry at position `index`, in the order of hashes.
    pub fn entry(&self, index: usize) -> std::result::Result<IndexEntry, Invalid> {
        IndexEntry::decode(self.bytes(index))
    }

    /// Finds the record of the block with this hash.
    pub fn find(&self, hash: &Digest) -> Option<Stored> {
        let key = prefix(hash.bytes());
        let (mut low, mut high) = (0, self.count);
        // Interpolation search: hashes are evenly distributed, so the first guesses mostly hit.
        let mut guesses = 3;
        while low < high {
            let middle = match guesses {
                0 => low + (high - low) / 2,
                _ => {
                    guesses -= 1;
                    let (first, last) = (self.key(low), self.key(high - 1));
                    if key < first || key > last {
                        return None;
                    }
                    let offset = u128::from(key - first) * (high - 1 - low) as u128;
                    low + (offset / u128::from((last - first).max(1))) as usize
                }
            };
            match self.bytes(middle)[..32].cmp(hash.bytes()) {
                std::cmp::Ordering::Equal => return self.entry(middle).ok().map(|e| e.stored),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }
}

fn prefix(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |first| u64::from_be_bytes(*first))
}
