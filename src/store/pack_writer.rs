//! Writing packs into a session: records are appended, the index and the header come last.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use rustix::fs::{Advice, fadvise};

use super::format::pack::{IndexEntry, PackHeader};
use super::format::{PackId, Stored};
use super::known::{Known, Place};
use super::pack::pack_path;
use super::path::StorePath;
use super::publish::{create, random};
use super::{BLOCK_SIZE, Digest};
use crate::error::{Error, Result};
use crate::sys::threads;

/// A pack is closed when it has this many bytes or blocks; both bound memory and what damage can hit.
pub(super) const PACK_BYTES: u64 = 64 << 20;
const PACK_BLOCKS: usize = 32 << 10;

/// Packs that may be on their way to the disk while the next one is filled.
const SYNCING: usize = 2;

/// Appends records to packs in a folder; what it has written is found in `known` at once.
pub(super) struct PackWriter<'a> {
    folder: &'a StorePath,
    known: &'a Known,
    pack: Option<OpenPack>,
    syncing: Vec<JoinHandle<Result<()>>>,
    written: Packed,
}

/// Complete packs, on the disk under names of the session.
#[derive(Debug, Default)]
pub(super) struct Packed {
    pub packs: Vec<PackId>,
    /// Bytes of the blocks in them before compression.
    pub new_bytes: u64,
    /// Bytes of their records.
    pub stored_bytes: u64,
}

struct OpenPack {
    id: PackId,
    path: StorePath,
    file: BufWriter<File>,
    length: u64,
    entries: Vec<IndexEntry>,
}

impl<'a> PackWriter<'a> {
    pub fn new(folder: &'a StorePath, known: &'a Known) -> PackWriter<'a> {
        PackWriter { folder, known, pack: None, syncing: Vec::new(), written: Packed::default() }
    }

    /// Appends the record of a block. The offset in `stored` is not looked at.
    pub fn append(&mut self, hash: Digest, record: &[u8], stored: Stored) -> Result<Place> {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => OpenPack::create(self.folder)?,
        };
        let stored = Stored { offset: pack.length as u32, length: record.len() as u32, ..stored };
        let place = Place { pack: pack.id, stored };
        pack.file.write_all(record).map_err(|e| Error::io("cannot write", &pack.path, e))?;
        pack.length += record.len() as u64;
        pack.entries.push(IndexEntry { hash, stored });
        self.known.add(hash, place);
        self.written.new_bytes += BLOCK_SIZE;
        self.written.stored_bytes += record.len() as u64;
        if pack.length >= PACK_BYTES || pack.entries.len() >= PACK_BLOCKS {
            self.close(pack)?;
        } else {
            self.pack = Some(pack);
        }
        Ok(place)
    }

    fn close(&mut self, pack: OpenPack) -> Result<()> {
        let (id, path) = (pack.id, pack.path.clone());
        let file = pack.finish()?;
        self.known.finish_pack(&path, id)?;
        self.written.packs.push(id);
        if self.syncing.len() == SYNCING {
            join(self.syncing.remove(0))?;
        }
        self.syncing.push(threads::start(move || {
            file.sync_all().map_err(|e| Error::io("cannot write", &path, e))?;
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            Ok(())
        })?);
        Ok(())
    }

    /// Completes the last pack and waits until all are on the disk.
    pub fn finish(mut self) -> Result<Packed> {
        if let Some(pack) = self.pack.take() {
            self.close(pack)?;
        }
        for sync in std::mem::take(&mut self.syncing) {
            join(sync)?;
        }
        Ok(self.written)
    }
}

fn join(sync: JoinHandle<Result<()>>) -> Result<()> {
    sync.join().unwrap_or_else(|_| Err(Error::failed("the thread that writes packs has panicked")))
}

impl OpenPack {
    fn create(folder: &StorePath) -> Result<OpenPack> {
        let id = PackId(random()?);
        let path = pack_path(folder, id);
        let mut file = BufWriter::with_capacity(1 << 20, create(&path)?);
        // The header is written last: until then the file is no pack.
        file.write_all(&[0; PackHeader::LEN]).map_err(|e| Error::io("cannot write", &path, e))?;
        Ok(OpenPack { id, path, file, length: PackHeader::LEN as u64, entries: Vec::new() })
    }

    fn finish(mut self) -> Result<File> {
        let fail = |e| Error::io("cannot write", &self.path, e);
        self.entries.sort_unstable_by_key(|entry| entry.hash);
        let mut index = Vec::with_capacity(self.entries.len() * IndexEntry::LEN);
        for entry in &self.entries {
            entry.encode(&mut index);
        }
        self.file.write_all(&index).map_err(fail)?;
        let file = self.file.into_inner().map_err(|e| fail(e.into_error()))?;
        let header = PackHeader::new(self.id, self.length, self.entries.len() as u64, Digest::of(&index));
        file.write_all_at(&header.encode(), 0).map_err(fail)?;
        Ok(file)
    }
}
