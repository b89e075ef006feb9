//! Takes batches in order, writes packs and tables into the session.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;

use rustix::fs::{Advice, fadvise};

use super::Work;
use super::known::{Known, Place};
use super::reader::Input;
use super::worker::{Batch, Block, Outcome};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::format::image::ImageHeader;
use crate::store::format::pack::{IndexEntry, PackHeader};
use crate::store::format::placement::{FileStats, Front, Row};
use crate::store::format::{PackId, Stored};
use crate::store::pack::pack_path;
use crate::store::publish::{Session, inherit_owner, make_folder, random};
use crate::store::tree::TreeWriter;
use crate::store::{BLOCK_SIZE, Digest, FileKind, TemplateFile};
use crate::units::{Bytes, PAGE_SIZE};

/// A pack is closed when it has this many bytes or blocks; both bound memory and what damage can hit.
const PACK_BYTES: u64 = 64 << 20;
const PACK_BLOCKS: usize = 32 << 10;

/// Packs that may be on their way to the disk while the next one is filled.
const SYNCING: usize = 2;

/// A complete template in the session's folder `image`, and its new packs beside it.
pub(super) struct Written {
    pub digest: Digest,
    pub files: Vec<TemplateFile>,
    pub packs: Vec<PackId>,
    pub new_bytes: u64,
    pub stored_bytes: u64,
}

pub(super) struct Writer<'a> {
    session: &'a Session,
    known: &'a Known,
    files: Vec<(String, FileKind, Option<u64>, FileStats)>,
    current: usize,
    image: BufWriter<File>,
    rows: BufWriter<File>,
    rows_tree: TreeWriter,
    block_count: u64,
    pack: Option<OpenPack>,
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u32>,
    syncing: Vec<JoinHandle<Result<()>>>,
    new_bytes: u64,
    stored_bytes: u64,
}

struct OpenPack {
    id: PackId,
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
    entries: Vec<IndexEntry>,
}

fn create(path: &Path) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| Error::io("cannot create", path, e))?;
    inherit_owner(path)?;
    Ok(file)
}

impl<'a> Writer<'a> {
    pub fn new(session: &'a Session, inputs: &[Input], known: &'a Known) -> Result<Writer<'a>> {
        let folder = session.path().join("image");
        make_folder(&folder)?;
        let mut image = create(&folder.join("image"))?;
        image
            .seek(SeekFrom::Start(ImageHeader::table_offset(inputs.len())))
            .map_err(|e| Error::io("cannot write", &folder, e))?;
        let none = FileStats { data_bytes: 0, stored_bytes: 0 };
        Ok(Writer {
            session,
            known,
            files: inputs.iter().map(|i| (i.name.clone(), i.kind, None, none)).collect(),
            current: 0,
            image: BufWriter::with_capacity(256 << 10, image),
            rows: BufWriter::with_capacity(256 << 10, create(&session.path().join("rows"))?),
            rows_tree: TreeWriter::default(),
            block_count: 0,
            pack: None,
            packs: Vec::new(),
            numbers: HashMap::new(),
            syncing: Vec::new(),
            new_bytes: 0,
            stored_bytes: 0,
        })
    }

    /// Until the reader and all workers have gone, or something failed.
    pub fn run(
        &mut self,
        done: &Receiver<(u64, Result<Work>)>,
        give_back: &Sender<Batch>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut waiting: BTreeMap<u64, Work> = BTreeMap::new();
        let mut next = 0;
        while let Ok((sequence, work)) = done.recv() {
            waiting.insert(sequence, work?);
            while let Some(work) = waiting.remove(&next) {
                next += 1;
                match work {
                    Work::Zeros(blocks) => {
                        self.zeros(blocks)?;
                        progress.advance(Bytes::new(blocks * BLOCK_SIZE));
                    }
                    Work::End(size) => {
                        self.files[self.current].2 = Some(size);
                        self.current += 1;
                    }
                    Work::Data(batch) => {
                        for block in &batch.blocks {
                            self.block(block, &batch.records)?;
                        }
                        progress.advance(Bytes::new(batch.length as u64));
                        // The reader may have gone already: then nobody needs it.
                        let _ = give_back.send(batch);
                    }
                }
            }
        }
        Ok(())
    }

    fn session_error(&self, error: std::io::Error) -> Error {
        Error::io("cannot write", self.session.path(), error)
    }

    fn zeros(&mut self, blocks: u64) -> Result<()> {
        const ZEROS: [u8; 8192] = [0; 8192];
        let mut left = blocks;
        while left > 0 {
            let now = left.min(256) as usize;
            self.image.write_all(&ZEROS[..now * 32]).map_err(|e| self.session_error(e))?;
            self.rows.write_all(&ZEROS[..now * Row::LEN]).map_err(|e| self.session_error(e))?;
            self.rows_tree.update(&ZEROS[..now * Row::LEN]);
            left -= now as u64;
        }
        self.block_count += blocks;
        Ok(())
    }

    fn block(&mut self, block: &Block, records: &[u8]) -> Result<()> {
        let (hash, place) = match &block.outcome {
            Outcome::Zero => return self.zeros(1),
            Outcome::Known(hash, place) => (*hash, *place),
            Outcome::New { hash, kind, chunk_shift, record } => {
                // The same block may have come in a batch that was worked on at the same time.
                let place = match self.known.find_own(hash) {
                    Some(place) => place,
                    None => self.append(*hash, &records[record.clone()], |offset, length| Stored {
                        offset,
                        length,
                        kind: *kind,
                        chunk_shift: *chunk_shift,
                        data_pages: block.data_pages,
                    })?,
                };
                (*hash, place)
            }
        };
        let stats = &mut self.files[self.current].3;
        stats.data_bytes += u64::from(block.data_pages.count_ones()) * PAGE_SIZE;
        stats.stored_bytes += u64::from(place.stored.length);
        let next = self.numbers.len() as u32;
        let pack = *self.numbers.entry(place.pack).or_insert(next);
        let mut row = Vec::with_capacity(Row::LEN);
        Row::encode(Some(Row { pack, stored: place.stored }), &mut row);
        self.image.write_all(hash.bytes()).map_err(|e| self.session_error(e))?;
        self.rows.write_all(&row).map_err(|e| self.session_error(e))?;
        self.rows_tree.update(&row);
        self.block_count += 1;
        Ok(())
    }

    fn append(&mut self, hash: Digest, record: &[u8], stored: impl Fn(u32, u32) -> Stored) -> Result<Place> {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => OpenPack::create(self.session)?,
        };
        let stored = stored(pack.length as u32, record.len() as u32);
        let place = Place { pack: pack.id, stored };
        pack.file.write_all(record).map_err(|e| Error::io("cannot write", &pack.path, e))?;
        pack.length += record.len() as u64;
        pack.entries.push(IndexEntry { hash, stored });
        self.known.add(hash, place);
        self.new_bytes += BLOCK_SIZE;
        self.stored_bytes += record.len() as u64;
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
        self.packs.push(id);
        if self.syncing.len() == SYNCING {
            join(self.syncing.remove(0))?;
        }
        self.syncing.push(std::thread::spawn(move || {
            file.sync_all().map_err(|e| Error::io("cannot write", &path, e))?;
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            Ok(())
        }));
        Ok(())
    }

    /// Completes packs and tables; everything is on the disk afterwards, under names of the session.
    pub fn finish(mut self) -> Result<Written> {
        if let Some(pack) = self.pack.take() {
            self.close(pack)?;
        }
        for sync in std::mem::take(&mut self.syncing) {
            join(sync)?;
        }
        let folder = self.session.path().join("image");
        let fail = |e| Error::io("cannot write", &folder, e);
        let sizes = self.files.iter().map(|(name, kind, size, _)| (name.clone(), *kind, size.unwrap_or(0)));
        let header = ImageHeader::new(sizes).map_err(|e| e.in_file("image", &folder))?;
        if header.block_count() != self.block_count {
            let got = self.block_count;
            return Err(Error::failed(format!("{got} blocks came, expected {}", header.block_count())));
        }
        let image = self.image.into_inner().map_err(|e| fail(e.into_error()))?;
        image.write_all_at(&header.encode(), 0).map_err(fail)?;
        let mut image_tree = TreeWriter::default();
        copy(image.try_clone().map_err(fail)?, |part| {
            image_tree.update(part);
            Ok(())
        })
        .map_err(fail)?;
        image.sync_all().map_err(fail)?;
        let (image_values, digest) = image_tree.finish();

        let (rows_values, rows_root) = self.rows_tree.finish();
        let mut packs: Vec<(u32, PackId)> = self.numbers.iter().map(|(id, number)| (*number, *id)).collect();
        packs.sort_unstable();
        let front = Front {
            digest,
            image_length: header.image_length(),
            block_count: self.block_count,
            rows_root,
            files: self.files.iter().map(|f| f.3).collect(),
            packs: packs.into_iter().map(|(_, id)| id).collect(),
        };
        let mut placement = BufWriter::with_capacity(256 << 10, create(&folder.join("placement"))?);
        placement.write_all(&front.encode()).map_err(fail)?;
        let rows = self.rows.into_inner().map_err(|e| fail(e.into_error()))?;
        copy(rows, |part| placement.write_all(part)).map_err(fail)?;
        for value in image_values.iter().chain(&rows_values) {
            placement.write_all(value).map_err(fail)?;
        }
        placement.into_inner().map_err(|e| fail(e.into_error()))?.sync_all().map_err(fail)?;

        let files = header.files().iter().zip(&front.files).map(|(file, stats)| TemplateFile {
            name: file.name.clone(),
            kind: file.kind,
            size: Bytes::new(file.size),
            data_bytes: Bytes::new(stats.data_bytes),
        });
        Ok(Written {
            digest,
            files: files.collect(),
            packs: self.packs,
            new_bytes: self.new_bytes,
            stored_bytes: self.stored_bytes,
        })
    }
}

fn join(sync: JoinHandle<Result<()>>) -> Result<()> {
    sync.join().unwrap_or_else(|_| Err(Error::failed("the thread that writes packs has panicked")))
}

/// All bytes of a file, from its start.
fn copy(mut file: File, mut each: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut part = vec![0; 256 << 10];
    loop {
        match file.read(&mut part)? {
            0 => return Ok(()),
            length => each(&part[..length])?,
        }
    }
}

impl OpenPack {
    fn create(session: &Session) -> Result<OpenPack> {
        let id = PackId(random()?);
        let path = pack_path(session.path(), id);
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
