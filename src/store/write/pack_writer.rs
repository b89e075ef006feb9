//! Writes packs into a session: records are appended, then the index and the header are written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use rustix::fs::{Advice, fadvise};

use super::block_index::{BlockIndex, Place};
use crate::error::{Error, Result};
use crate::store::disk::pack::pack_path;
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{create, random};
use crate::store::format::pack::{IndexEntry, PackHeader};
use crate::store::format::{PackId, Stored};
use crate::store::{BLOCK_SIZE, Digest};
use crate::sys::process::threads;
use crate::units::to_usize;

/// A pack is closed at this size in bytes or this number of blocks. The limits bound memory use and the effect of
/// damage.
pub(in crate::store) const PACK_BYTES: u64 = 64 << 20;
const PACK_BLOCKS: usize = 32 << 10;

/// Maximum number of closed packs that are being synced while the next pack is filled.
const MAX_SYNCING: usize = 2;

/// Appends records to packs in a directory, and adds each record to the block index.
pub(in crate::store) struct PackWriter<'a> {
    directory: &'a StorePath,
    index: &'a BlockIndex,
    pack: Option<OpenPack>,
    syncing: Vec<JoinHandle<Result<()>>>,
    written: Packed,
}

/// Complete and synced packs, in the session's directory.
#[derive(Debug, Default)]
pub(in crate::store) struct Packed {
    pub packs: Vec<PackId>,
    /// Bytes of the blocks before compression.
    pub new_bytes: u64,
    /// Bytes of the records.
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
    pub fn new(directory: &'a StorePath, index: &'a BlockIndex) -> PackWriter<'a> {
        PackWriter { directory, index, pack: None, syncing: Vec::new(), written: Packed::default() }
    }

    /// Appends the record of a block. Ignores offset and length in `stored`.
    pub fn append(&mut self, hash: Digest, record: &[u8], stored: Stored) -> Result<Place> {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => OpenPack::create(self.directory)?,
        };
        let field = |n: u64| {
            u32::try_from(n).map_err(|_| Error::failed("a record does not fit into a pack").at(&pack.path))
        };
        let stored = Stored { offset: field(pack.length)?, length: field(record.len() as u64)?, ..stored };
        let place = Place { pack: pack.id, stored };
        pack.file.write_all(record).map_err(|e| Error::io("cannot write", &pack.path, e))?;
        pack.length += record.len() as u64;
        pack.entries.push(IndexEntry { hash, stored });
        self.index.add(hash, place);
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
        self.index.finish_pack(&path, id)?;
        self.written.packs.push(id);
        if self.syncing.len() == MAX_SYNCING {
            join(self.syncing.remove(0))?;
        }
        self.syncing.push(threads::start(move || {
            file.sync_all().map_err(|e| Error::io("cannot write", &path, e))?;
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            Ok(())
        })?);
        Ok(())
    }

    /// Completes the last pack and waits until all packs are synced.
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
    sync.join().unwrap_or_else(|_| Err(Error::failed("a thread that syncs packs panicked")))
}

impl OpenPack {
    fn create(directory: &StorePath) -> Result<OpenPack> {
        let id = PackId(random()?);
        let path = pack_path(directory, id);
        let mut file = BufWriter::with_capacity(1 << 20, create(&path)?);
        // Until the header is written at the end, the file is not a valid pack.
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
        let header = PackHeader::new(self.id, self.length, self.entries.len() as u64, Digest::of(&index));
        index.resize(to_usize(header.file_length() - header.index_offset), 0);
        self.file.write_all(&index).map_err(fail)?;
        let file = self.file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.write_all_at(&header.encode(), 0).map_err(fail)?;
        Ok(file)
    }
}
