//! Reads templates. Every block is verified against its hash before a byte of the block is returned.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::json;

use super::tables::{open_image, open_placement};
use super::tree::CheckedTable;
use crate::error::{Error, Result};
use crate::store::disk::open::no_template;
use crate::store::disk::pack::PackIndex;
use crate::store::disk::path::{StorePath, is_misplaced};
use crate::store::format::image::{HASH_LEN, ImageFile, ImageHeader};
use crate::store::format::placement::{Front, Row};
use crate::store::format::{Invalid, PackId, Stored};
use crate::store::{BLOCK_SIZE, Digest, Policy, Scratch, Store, TemplateFile};
use crate::units::{Bytes, FileOffset, to_usize};

/// An open template. Reads continue to work after the template was removed from the store, while its packs exist.
#[derive(Debug)]
pub struct Template {
    store: Store,
    digest: Digest,
    files: Vec<TemplateFile>,
    header: ImageHeader,
    policy: Policy,
    tables: RwLock<Arc<Tables>>,
}

/// The tables of a template. A collector may replace the placement at any time, a repair the image too.
#[derive(Debug)]
struct Tables {
    /// The hashes of the blocks.
    image: Arc<CheckedTable>,
    /// Where the blocks are stored.
    front: Front,
    rows: CheckedTable,
}

impl Store {
    /// Opens a template: reads its header and the roots of its tables. Blocks are read on demand.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code), [`Code::Damage`](crate::error::Code), or the errors of
    /// [`Store::check_reachable`].
    pub fn template(&self, digest: &Digest) -> Result<Template> {
        self.despite_outage(|| Template::open(self.clone(), digest))
    }
}

impl Template {
    pub(in crate::store) fn open(store: Store, digest: &Digest) -> Result<Template> {
        let dir = store.image_dir(digest);
        let dir = dir.opened().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => no_template(store.dir(), digest),
            _ if is_misplaced(&e) => Invalid::damage("not a directory").in_file("template", &dir),
            _ => dir.error("cannot open template", e),
        })?;
        let (front, image_values, rows) = open_placement(&dir.join("placement"), digest)?;
        let (header, image) = open_image(&dir.join("image"), digest, &front, image_values)?;
        let policy = Policy::read(&dir.join("policy"))?;
        let files = header
            .files()
            .iter()
            .zip(&front.files)
            .map(|(file, stats)| TemplateFile {
                name: file.name.clone(),
                kind: file.kind,
                size: Bytes::new(file.size),
                data_bytes: Bytes::new(stats.data_bytes),
            })
            .collect();
        let tables = RwLock::new(Arc::new(Tables { image: Arc::new(image), front, rows }));
        Ok(Template { store, digest: *digest, files, header, policy, tables })
    }

    /// Returns the digest of the template.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Returns the files, sorted by name. Methods name a file by its index in this list.
    pub fn files(&self) -> &[TemplateFile] {
        &self.files
    }

    /// Returns the index of a file.
    pub fn file(&self, name: &str) -> Option<usize> {
        self.files.iter().position(|f| f.name == name)
    }

    /// Same as [`Template::file`], for a caller that needs the file.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if there is no such file.
    pub fn find_file(&self, name: &str) -> Result<usize> {
        self.file(name).ok_or_else(|| {
            let names: Vec<&str> = self.files().iter().map(|f| f.name.as_str()).collect();
            Error::not_found(format!("no file '{name}' in the template"))
                .hint(format!("name one of these files: {}", names.join(", ")))
        })
    }

    /// Returns the policy at the time of opening.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Returns the size of all files.
    pub fn size(&self) -> Bytes {
        self.files.iter().map(|f| f.size).sum()
    }

    /// Returns the bytes of all files in 4 KiB pages that are not zero.
    pub fn data_bytes(&self) -> Bytes {
        self.files.iter().map(|f| f.data_bytes).sum()
    }

    /// Returns the bytes of the template's records in packs, including records shared with other templates.
    pub fn stored_bytes(&self) -> Bytes {
        Bytes::new(self.tables().front.files.iter().map(|f| f.stored_bytes).sum())
    }

    /// Returns the paths of the packs that hold the template's blocks.
    pub fn packs(&self) -> Vec<StorePath> {
        self.pack_ids().into_iter().map(|id| self.store.packs().path(id)).collect()
    }

    pub(in crate::store) fn store(&self) -> &Store {
        &self.store
    }

    pub(in crate::store) fn pack_ids(&self) -> Vec<PackId> {
        self.tables().front.packs.clone()
    }

    fn tables(&self) -> Arc<Tables> {
        Arc::clone(&self.tables.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `work` with the tables. A collector may have moved blocks and removed packs since the tables were opened,
    /// and an import may have repaired them, so failed work is repeated while the store has other tables.
    fn with_tables<T>(&self, mut work: impl FnMut(&Tables) -> Result<T>) -> Result<T> {
        let mut tables = self.tables();
        self.store.despite_outage(|| {
            loop {
                match work(&tables) {
                    Err(error) => match self.newer(&tables) {
                        Some(newer) => tables = newer,
                        None => return Err(error),
                    },
                    done => return done,
                }
            }
        })
    }

    /// Returns the current tables if they differ from `old`.
    fn newer(&self, old: &Arc<Tables>) -> Option<Arc<Tables>> {
        let current = self.tables();
        if !Arc::ptr_eq(&current, old) {
            return Some(current);
        }
        // The placement is opened without the lock: a store that hangs must not block readers of cached blocks.
        let (front, values, rows) = open_placement(&self.placement_path(), &self.digest).ok()?;
        let image = open_image(&self.directory().join("image"), &self.digest, &front, values);
        let image = image.ok().map(|(_, image)| image).filter(|image| !image.is_same_file(&old.image));
        if front == old.front && rows.is_same_file(&old.rows) && image.is_none() {
            return None;
        }
        let image = image.map_or_else(|| Arc::clone(&old.image), Arc::new);
        let newer = Arc::new(Tables { image, front, rows });
        *self.tables.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&newer);
        Some(newer)
    }

    /// Returns a description of the template as JSON. The text depends only on the content and may be cached forever.
    pub fn manifest_json(&self) -> String {
        let value = json!({
            "schema": 1,
            "digest": self.digest,
            "block_size": BLOCK_SIZE,
            "files": self.files,
        });
        format!("{value:#}\n")
    }

    /// Returns the number of blocks of a file; the last block may be shorter than [`BLOCK_SIZE`].
    pub fn block_count(&self, file: usize) -> u64 {
        self.header.files().get(file).map_or(0, ImageFile::blocks)
    }

    /// Returns the hash of a plain block (zero-padded to [`BLOCK_SIZE`]), or `None` for a zero block. Equal blocks of
    /// all templates have equal hashes, so the hash may serve as a cache key.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if this part of the table is damaged, or a usage error if the file
    /// has no such block.
    pub fn block_id(&self, file: usize, block: u64) -> Result<Option<Digest>> {
        let (number, _) = self.locate(file, block)?;
        self.with_tables(|tables| self.block_hash(tables, number))
    }

    /// Reads and verifies one whole block. Fills the front of `out` and returns the length of the block in its file:
    /// [`BLOCK_SIZE`], or less for the last block. After an error `out` holds no byte of the block.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) with the pack, the offset, and the values found and expected.
    /// Returns a usage error if there is no such block or `out` is too short.
    pub fn read_block(
        &self,
        file: usize,
        block: u64,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<usize> {
        let (number, length) = self.locate(file, block)?;
        let have = out.len();
        let out = out.get_mut(..length).ok_or_else(|| {
            Error::usage(format!("buffer too short: length is {have}, expected at least {length} bytes"))
        })?;
        self.read_part(number, 0, scratch, out).map(|()| length)
    }

    /// Fills `out` with the bytes at `offset` of a file. All returned bytes are verified.
    ///
    /// # Errors
    /// Same as [`Template::read_block`]. Also returns a usage error if the range exceeds the file.
    pub fn read_range(
        &self,
        file: usize,
        offset: FileOffset,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<()> {
        let mut position = offset.get();
        let mut out = out;
        while !out.is_empty() {
            let (block, within) = (position / BLOCK_SIZE, (position % BLOCK_SIZE) as usize);
            let (number, length) = self.locate(file, block)?;
            if within >= length {
                return Err(Error::usage(format!("offset {position} is beyond the end of file {file}")));
            }
            let (now, rest) = out.split_at_mut(out.len().min(length - within));
            self.read_part(number, within, scratch, now)?;
            position += now.len() as u64;
            out = rest;
        }
        Ok(())
    }

    /// Fills `out` with the bytes at `within` of a block. A whole block is decoded in place.
    fn read_part(&self, number: u64, within: usize, scratch: &mut Scratch, out: &mut [u8]) -> Result<()> {
        let Scratch { following, buffer, decoder, plain } = scratch;
        self.with_tables(|tables| {
            let Some((hash, id, stored)) = self.stored(tables, number)? else {
                out.fill(0);
                return Ok(());
            };
            let end = match buffer.holds(id, stored) {
                true => stored.range().end,
                false => self.run_end(tables, number, *following, (id, stored)),
            };
            let pack = self.store.pack(id)?;
            let record = pack.record(stored, end, buffer).map_err(|e| self.store.unreadable(id, e))?;
            let decoded = if out.len() as u64 == BLOCK_SIZE {
                decoder.block(stored.kind, record, &hash, out)
            } else {
                plain.resize(to_usize(BLOCK_SIZE), 0);
                let decoded = decoder.block(stored.kind, record, &hash, plain);
                decoded.map(|()| out.copy_from_slice(&plain[within..within + out.len()]))
            };
            decoded.map_err(|why| {
                buffer.forget();
                pack.mismatch(stored, &why)
            })
        })
    }

    /// Returns the offset in the pack up to which the records of a block and of the `following` blocks lie next to each
    /// other.
    fn run_end(&self, tables: &Tables, number: u64, following: u64, (id, stored): (PackId, Stored)) -> u64 {
        let mut end = stored.range().end;
        for next in (number + 1..).take(to_usize(following)) {
            match self.stored(tables, next) {
                Ok(Some((_, pack, next))) if pack == id && next.range().start == end => {
                    end = next.range().end
                }
                // A zero block has no record.
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => break,
            }
        }
        end
    }

    /// Reads and verifies one block, and appends its record, as it is stored, to `out`. Returns `None` for a zero
    /// block.
    pub(in crate::store) fn read_record(
        &self,
        file: usize,
        block: u64,
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<Option<(Digest, Stored)>> {
        let (number, _) = self.locate(file, block)?;
        self.with_tables(|tables| {
            let Some((hash, id, stored)) = self.stored(tables, number)? else { return Ok(None) };
            let pack = self.store.pack(id)?;
            let record = scratch.verify(&pack, stored, &hash).map_err(|e| self.store.unreadable(id, e))?;
            out.extend_from_slice(record);
            Ok(Some((hash, stored)))
        })
    }

    /// Passes the bytes of the image to `each`, in verified parts.
    pub(in crate::store) fn read_image(&self, each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.tables().image.read_all(each)
    }

    /// Returns the length of the image in bytes.
    pub(in crate::store) fn image_length(&self) -> u64 {
        self.header.image_length()
    }

    /// Returns the hash and place of a block, or `None` for a zero block.
    pub(in crate::store) fn place(
        &self,
        file: usize,
        block: u64,
    ) -> Result<Option<(Digest, PackId, Stored)>> {
        let (number, _) = self.locate(file, block)?;
        self.with_tables(|tables| self.stored(tables, number))
    }

    /// Passes the hashes and places of all blocks of a file to `work`, in order and from the same version of the
    /// tables, and returns its result. If a table turns out to be outdated, `work` is called again.
    pub(in crate::store) fn with_places<T>(
        &self,
        file: usize,
        mut work: impl FnMut(&mut dyn Iterator<Item = Result<Option<(Digest, PackId, Stored)>>>) -> Result<T>,
    ) -> Result<T> {
        let count = self.block_count(file);
        let first = if count == 0 { 0 } else { self.locate(file, 0)?.0 };
        self.with_tables(|tables| work(&mut (first..first + count).map(|number| self.stored(tables, number))))
    }

    /// Verifies both tables as a whole. Returns one result for the image and one for the placement.
    pub(in crate::store) fn check_tables(&self) -> [Result<()>; 2] {
        [|t: &Tables| t.image.check_all(), |t: &Tables| t.rows.check_all()]
            .map(|check| self.with_tables(check))
    }

    /// Verifies the tables, and the headers and indexes of the packs. Reads no block.
    pub(in crate::store) fn check(&self) -> Result<()> {
        self.check_tables().into_iter().collect::<Result<()>>()?;
        self.with_tables(|tables| {
            let mut packs = tables.front.packs.iter();
            packs.try_for_each(|id| PackIndex::open(&self.store.packs().path(*id), *id).map(drop))
        })
    }

    /// Returns the front of the placement. Placements with different content have different fronts.
    pub(in crate::store) fn front(&self) -> Front {
        self.tables().front.clone()
    }

    /// Returns the hashes of unreadable blocks that have another place in the placement file `other`.
    pub(in crate::store) fn unreadable_unlike(&self, other: &StorePath) -> Result<BTreeSet<Digest>> {
        let (front, _, rows) = open_placement(other, &self.digest)?;
        let image = Arc::clone(&self.tables().image);
        let (other, mut scratch) = (Tables { image, front, rows }, Scratch::default());
        let mut unreadable = BTreeSet::new();
        for file in 0..self.files.len() {
            for block in 0..self.block_count(file) {
                let Some((hash, id, stored)) = self.place(file, block)? else { continue };
                let (number, _) = self.locate(file, block)?;
                if self.stored(&other, number)? == Some((hash, id, stored)) || unreadable.contains(&hash) {
                    continue;
                }
                let read =
                    self.store.pack(id).and_then(|pack| scratch.verify(&pack, stored, &hash).map(drop));
                if let Err(e) = read {
                    log::warn!("{e}; repairing the template");
                    unreadable.insert(hash);
                }
            }
        }
        Ok(unreadable)
    }

    /// Returns the template's directory in the store.
    pub(in crate::store) fn directory(&self) -> StorePath {
        self.store.image_dir(&self.digest)
    }

    /// Returns the blocks of a file that are not zero, as ranges of block indexes in ascending order.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if the table is damaged.
    pub fn data_ranges(&self, file: usize) -> Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in 0..self.block_count(file) {
            if self.block_id(file, block)?.is_some() {
                match ranges.last_mut() {
                    Some(last) if last.end == block => last.end += 1,
                    _ => ranges.push(block..block + 1),
                }
            }
        }
        Ok(ranges)
    }

    /// Returns the blocks of a file that are not zero, as byte ranges in ascending order. The last range can end beyond
    /// the end of the file.
    ///
    /// # Errors
    /// Same as [`Template::data_ranges`].
    pub fn data_byte_ranges(&self, file: usize) -> Result<Vec<Range<u64>>> {
        let blocks = self.data_ranges(file)?;
        Ok(blocks.into_iter().map(|blocks| blocks.start * BLOCK_SIZE..blocks.end * BLOCK_SIZE).collect())
    }

    /// Returns a bit mask of the sixteen 4 KiB pages of a block that are not zero, lowest bit first; 0 for a zero
    /// block. Reads only the tables, no block.
    ///
    /// # Errors
    /// Same as [`Template::block_id`].
    pub fn data_pages(&self, file: usize, block: u64) -> Result<u16> {
        let (number, _) = self.locate(file, block)?;
        Ok(self.with_tables(|tables| self.row(tables, number))?.map_or(0, |row| row.stored.data_pages))
    }

    /// Returns the files of the store that hold this template: its tables, and the packs with its blocks, which may
    /// hold blocks of other templates too.
    pub fn store_files(&self) -> Vec<StorePath> {
        let dir = self.directory();
        [dir.join("image"), dir.join("placement")].into_iter().chain(self.packs()).collect()
    }

    /// Returns the index of the block in the tables, and its length in bytes.
    fn locate(&self, file: usize, block: u64) -> Result<(u64, usize)> {
        let found = self.header.files().get(file).filter(|f| block < f.blocks());
        let found = found.ok_or_else(|| {
            Error::usage(format!("no block {block} in file {file} of template {}", self.digest))
        })?;
        let length = (found.size - block * BLOCK_SIZE).min(BLOCK_SIZE);
        Ok((found.first_block + block, length as usize))
    }

    fn block_hash(&self, tables: &Tables, number: u64) -> Result<Option<Digest>> {
        let offset = ImageHeader::table_offset(self.files.len()) + number * HASH_LEN;
        let hash = tables.image.entry::<32>(offset)?;
        Ok((hash != [0; 32]).then_some(Digest::new(hash)))
    }

    /// Returns the hash and place of a block, or `None` for a zero block.
    fn stored(&self, tables: &Tables, number: u64) -> Result<Option<(Digest, PackId, Stored)>> {
        let Some(hash) = self.block_hash(tables, number)? else { return Ok(None) };
        let damage = |why: String| Invalid::Damage(why).in_file("placement", self.placement_path());
        let row = self.row(tables, number)?;
        let row = row.ok_or_else(|| damage(format!("no place for block {number} with hash {hash}")))?;
        let id = tables.front.packs.get(row.pack as usize).ok_or_else(|| {
            damage(format!(
                "block {number} has pack index {}, but the number of packs is {}",
                row.pack,
                tables.front.packs.len()
            ))
        })?;
        Ok(Some((hash, *id, row.stored)))
    }

    fn row(&self, tables: &Tables, number: u64) -> Result<Option<Row>> {
        let bytes = tables.rows.entry::<{ Row::LEN }>(number * Row::LEN as u64)?;
        Row::decode(&bytes).map_err(|e| e.in_file("placement", self.placement_path()))
    }

    fn placement_path(&self) -> StorePath {
        self.directory().join("placement")
    }
}
