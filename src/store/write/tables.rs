//! Writes the two tables of a template, image and placement, one row per block.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

use super::block_index::Place;
use crate::error::{Error, Result};
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{create, make_directory};
use crate::store::format::PackId;
use crate::store::format::image::ImageHeader;
use crate::store::format::placement::{FileStats, Front, Row};
use crate::store::read::tree::TreeWriter;
use crate::store::{Digest, FileKind, TemplateFile};
use crate::units::{Bytes, PAGE_SIZE, to_usize};

/// Length of a block's hash in the image, in bytes.
const HASH_LENGTH: u64 = 32;

/// Writes the tables from the blocks of all files, one file after another.
pub(in crate::store) struct TableWriter {
    directory: StorePath,
    files: Vec<(String, FileKind, Option<u64>, FileStats)>,
    /// Order in which the files are written; in the image the files are sorted by name.
    order: Vec<usize>,
    /// Number of finished files.
    done: usize,
    /// First block and number of blocks of each file, in the order in which the blocks were written.
    spans: Vec<(u64, u64)>,
    hashes: BufWriter<File>,
    rows: BufWriter<File>,
    block_count: u64,
    numbers: HashMap<PackId, u32>,
}

/// Complete and synced tables, in the writer's directory.
pub(in crate::store) struct Tables {
    pub digest: Digest,
    pub files: Vec<TemplateFile>,
}

impl TableWriter {
    /// Creates a writer for these files, which must be sorted by name, in the new directory `directory`. Two temporary
    /// files beside the directory exist until `finish`.
    pub fn new(
        directory: &StorePath,
        files: impl IntoIterator<Item = (String, FileKind)>,
    ) -> Result<TableWriter> {
        make_directory(directory)?;
        let empty = FileStats { data_bytes: 0, stored_bytes: 0 };
        let files: Vec<_> = files.into_iter().map(|(name, kind)| (name, kind, None, empty)).collect();
        let part = |name| Ok(BufWriter::with_capacity(256 << 10, create(&beside(directory, name))?));
        Ok(TableWriter {
            directory: directory.clone(),
            order: (0..files.len()).collect(),
            done: 0,
            spans: vec![(0, 0); files.len()],
            files,
            hashes: part("hashes")?,
            rows: part("rows")?,
            block_count: 0,
            numbers: HashMap::new(),
        })
    }

    /// Sets the order in which files are written; by default they are written in sorted order.
    pub fn in_order(self, order: Vec<usize>) -> TableWriter {
        TableWriter { order, ..self }
    }

    /// Returns the index of the file whose blocks are being written.
    fn current(&self) -> usize {
        self.order[self.done]
    }

    fn error(&self, error: std::io::Error) -> Error {
        Error::io("cannot write", &self.directory, error)
    }

    /// Appends zero blocks.
    pub fn zeros(&mut self, blocks: u64) -> Result<()> {
        const ZEROS: [u8; 8192] = [0; 8192];
        let mut left = blocks;
        while left > 0 {
            let now = left.min(256) as usize;
            self.hashes.write_all(&ZEROS[..now * to_usize(HASH_LENGTH)]).map_err(|e| self.error(e))?;
            self.rows.write_all(&ZEROS[..now * Row::LEN]).map_err(|e| self.error(e))?;
            left -= now as u64;
        }
        self.block_count += blocks;
        Ok(())
    }

    /// Appends the block with this hash and place.
    pub fn block(&mut self, hash: &Digest, place: Place) -> Result<()> {
        let at = self.current();
        let stats = &mut self.files[at].3;
        stats.data_bytes += u64::from(place.stored.data_pages.count_ones()) * PAGE_SIZE;
        stats.stored_bytes += u64::from(place.stored.length);
        let next = u32::try_from(self.numbers.len())
            .map_err(|_| Error::failed("the template is in too many packs"))?;
        let pack = *self.numbers.entry(place.pack).or_insert(next);
        let mut row = Vec::with_capacity(Row::LEN);
        Row::encode(Some(Row { pack, stored: place.stored }), &mut row);
        self.hashes.write_all(hash.bytes()).map_err(|e| self.error(e))?;
        self.rows.write_all(&row).map_err(|e| self.error(e))?;
        self.block_count += 1;
        Ok(())
    }

    /// Ends the current file with its size in bytes. The next block belongs to the next file.
    pub fn end_file(&mut self, size: u64) {
        let at = self.current();
        self.files[at].2 = Some(size);
        let start = self.spans.iter().map(|(_, count)| count).sum();
        self.spans[at] = (start, self.block_count - start);
        self.done += 1;
    }

    /// Completes and syncs both tables.
    pub fn finish(self) -> Result<Tables> {
        let directory = &self.directory;
        let fail = |e| Error::io("cannot write", directory, e);
        let sizes = self.files.iter().map(|(name, kind, size, _)| (name.clone(), *kind, size.unwrap_or(0)));
        let header = ImageHeader::new(sizes).map_err(|e| e.in_file("image", directory))?;
        if header.block_count() != self.block_count {
            let got = self.block_count;
            return Err(Error::failed(format!(
                "cannot write image: number of blocks is {got}, expected {}",
                header.block_count()
            )));
        }
        let hashes = self.hashes.into_inner().map_err(|e| fail(e.into_error()))?;
        let mut image = BufWriter::with_capacity(256 << 10, create(&directory.join("image"))?);
        let mut image_tree = TreeWriter::default();
        let mut put = |part: &[u8]| {
            image_tree.update(part);
            image.write_all(part)
        };
        put(&header.encode())
            .and_then(|()| copy_spans(&hashes, &self.spans, HASH_LENGTH, &mut put))
            .map_err(fail)?;
        image.into_inner().map_err(|e| fail(e.into_error()))?.sync_all().map_err(fail)?;
        let (image_values, digest) = image_tree.finish();

        let rows = self.rows.into_inner().map_err(|e| fail(e.into_error()))?;
        let mut rows_tree = TreeWriter::default();
        let tree_row = |part: &[u8]| {
            rows_tree.update(part);
            Ok(())
        };
        copy_spans(&rows, &self.spans, Row::LEN as u64, tree_row).map_err(fail)?;
        let (rows_values, rows_root) = rows_tree.finish();
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
        let mut placement = BufWriter::with_capacity(256 << 10, create(&directory.join("placement"))?);
        placement.write_all(&front.encode()).map_err(fail)?;
        copy_spans(&rows, &self.spans, Row::LEN as u64, |part| placement.write_all(part)).map_err(fail)?;
        for value in image_values.iter().chain(&rows_values) {
            placement.write_all(value).map_err(fail)?;
        }
        placement.into_inner().map_err(|e| fail(e.into_error()))?.sync_all().map_err(fail)?;
        for name in ["hashes", "rows"] {
            beside(directory, name).remove_file().map_err(fail)?;
        }

        let files = header.files().iter().zip(&front.files).map(|(file, stats)| TemplateFile {
            name: file.name.clone(),
            kind: file.kind,
            size: Bytes::new(file.size),
            data_bytes: Bytes::new(stats.data_bytes),
        });
        Ok(Tables { digest, files: files.collect() })
    }
}

/// Returns the path of a file beside the directory, with the directory's name and this extension.
fn beside(directory: &StorePath, extension: &str) -> StorePath {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    directory.with_file_name(format!("{name}.{extension}"))
}

/// Copies these spans of a table with entries of `size` bytes, one after another.
fn copy_spans(
    table: &File,
    spans: &[(u64, u64)],
    size: u64,
    mut each: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut part = vec![0; 256 << 10];
    for (start, count) in spans {
        let (mut at, end) = (start * size, (start + count) * size);
        while at < end {
            let now = to_usize((end - at).min(part.len() as u64));
            table.read_exact_at(&mut part[..now], at)?;
            each(&part[..now])?;
            at += now as u64;
        }
    }
    Ok(())
}
