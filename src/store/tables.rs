//! Writing the tables of a template into a folder: the image and its placement, block by block.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::PackId;
use super::format::image::ImageHeader;
use super::format::placement::{FileStats, Front, Row};
use super::known::Place;
use super::pack_writer::create;
use super::publish::make_folder;
use super::tree::TreeWriter;
use super::{Digest, FileKind, TemplateFile};
use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE};

/// Takes the blocks of all files in the order of the image.
pub(super) struct TableWriter {
    folder: PathBuf,
    files: Vec<(String, FileKind, Option<u64>, FileStats)>,
    current: usize,
    image: BufWriter<File>,
    rows: BufWriter<File>,
    rows_path: PathBuf,
    rows_tree: TreeWriter,
    block_count: u64,
    numbers: HashMap<PackId, u32>,
}

/// Complete tables, on the disk in the writer's folder.
pub(super) struct Tables {
    pub digest: Digest,
    pub files: Vec<TemplateFile>,
}

impl TableWriter {
    /// For these files, sorted by name, in the new folder `folder`. Beside it a file for the rows is made, and removed
    /// at the end.
    pub fn new(folder: &Path, files: impl IntoIterator<Item = (String, FileKind)>) -> Result<TableWriter> {
        make_folder(folder)?;
        let none = FileStats { data_bytes: 0, stored_bytes: 0 };
        let files: Vec<_> = files.into_iter().map(|(name, kind)| (name, kind, None, none)).collect();
        let mut image = create(&folder.join("image"))?;
        image
            .seek(SeekFrom::Start(ImageHeader::table_offset(files.len())))
            .map_err(|e| Error::io("cannot write", folder, e))?;
        let rows_path = folder.with_extension("rows");
        Ok(TableWriter {
            folder: folder.to_owned(),
            files,
            current: 0,
            image: BufWriter::with_capacity(256 << 10, image),
            rows: BufWriter::with_capacity(256 << 10, create(&rows_path)?),
            rows_path,
            rows_tree: TreeWriter::default(),
            block_count: 0,
            numbers: HashMap::new(),
        })
    }

    fn error(&self, error: std::io::Error) -> Error {
        Error::io("cannot write", &self.folder, error)
    }

    /// So many zero blocks.
    pub fn zeros(&mut self, blocks: u64) -> Result<()> {
        const ZEROS: [u8; 8192] = [0; 8192];
        let mut left = blocks;
        while left > 0 {
            let now = left.min(256) as usize;
            self.image.write_all(&ZEROS[..now * 32]).map_err(|e| self.error(e))?;
            self.rows.write_all(&ZEROS[..now * Row::LEN]).map_err(|e| self.error(e))?;
            self.rows_tree.update(&ZEROS[..now * Row::LEN]);
            left -= now as u64;
        }
        self.block_count += blocks;
        Ok(())
    }

    /// The block with that hash, which lies there.
    pub fn block(&mut self, hash: &Digest, place: Place) -> Result<()> {
        let stats = &mut self.files[self.current].3;
        stats.data_bytes += u64::from(place.stored.data_pages.count_ones()) * PAGE_SIZE;
        stats.stored_bytes += u64::from(place.stored.length);
        let next = self.numbers.len() as u32;
        let pack = *self.numbers.entry(place.pack).or_insert(next);
        let mut row = Vec::with_capacity(Row::LEN);
        Row::encode(Some(Row { pack, stored: place.stored }), &mut row);
        self.image.write_all(hash.bytes()).map_err(|e| self.error(e))?;
        self.rows.write_all(&row).map_err(|e| self.error(e))?;
        self.rows_tree.update(&row);
        self.block_count += 1;
        Ok(())
    }

    /// The file has ended, at this size; the next block is of the next file.
    pub fn end_file(&mut self, size: u64) {
        self.files[self.current].2 = Some(size);
        self.current += 1;
    }

    /// Completes both tables; they are on the disk afterwards.
    pub fn finish(self) -> Result<Tables> {
        let folder = &self.folder;
        let fail = |e| Error::io("cannot write", folder, e);
        let sizes = self.files.iter().map(|(name, kind, size, _)| (name.clone(), *kind, size.unwrap_or(0)));
        let header = ImageHeader::new(sizes).map_err(|e| e.in_file("image", folder))?;
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
        std::fs::remove_file(&self.rows_path).map_err(fail)?;

        let files = header.files().iter().zip(&front.files).map(|(file, stats)| TemplateFile {
            name: file.name.clone(),
            kind: file.kind,
            size: Bytes::new(file.size),
            data_bytes: Bytes::new(stats.data_bytes),
        });
        Ok(Tables { digest, files: files.collect() })
    }
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
