//! Floors that this program computes itself: what import and verification cannot do without, on all processors.

use std::fs::File;
use std::io::{self, Write};
use std::num::NonZero;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use rustix::fs::OFlags;
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::threads;
use stencilfs::units::to_usize;

use super::inputs::scattered;

/// Size of a block of the store.
const BLOCK: usize = 64 << 10;

/// Alignment of direct reads.
const DIRECT: usize = 4096;

/// Blocks that a thread takes at a time: 1 MiB.
const BATCH: usize = 16;

/// Compression of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    Lz4,
    /// Level 3.
    Zstd,
}

/// Compresses blocks and reuses the tables.
struct Compressor {
    table: CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Compressor {
    fn new(codec: Codec) -> io::Result<Compressor> {
        let zstd = (codec == Codec::Zstd).then(|| zstd::bulk::Compressor::new(3)).transpose()?;
        let size = get_maximum_output_size(BLOCK).max(zstd::zstd_safe::compress_bound(BLOCK));
        Ok(Compressor { table: CompressTable::large(), zstd, out: vec![0; size] })
    }

    /// Returns the compressed block, or the block itself if that is not larger.
    fn compress<'a>(&'a mut self, block: &'a [u8]) -> io::Result<&'a [u8]> {
        let length = match &mut self.zstd {
            None => {
                compress_into_with_table(block, &mut self.out, &mut self.table).map_err(io::Error::other)?
            }
            Some(zstd) => zstd.compress_to_buffer(block, &mut self.out[..])?,
        };
        Ok(if length < block.len() { &self.out[..length] } else { block })
    }
}

/// Looks for zero pages in each block of a file, hashes the block and compresses it, by `threads` threads. Returns the
/// sum of the compressed lengths.
pub fn encode(path: &Path, codec: Codec, threads: usize, hashes: bool) -> Result<u64> {
    let open = || {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok((file, length))
    };
    let (file, length) = open().map_err(|e| Error::io("cannot compress", path, e))?;
    in_parallel(threads, length.div_ceil((BLOCK * BATCH) as u64), || {
        let mut compressor = Compressor::new(codec)?;
        let (file, mut data) = (&file, vec![0; BLOCK * BATCH]);
        Ok(move |batch: u64| {
            let start = batch * (BLOCK * BATCH) as u64;
            let part = &mut data[..to_usize((length - start).min((BLOCK * BATCH) as u64))];
            file.read_exact_at(part, start)?;
            let mut total = 0;
            for block in part.chunks(BLOCK) {
                let zeros = block.chunks(4096).filter(|page| page.iter().all(|byte| *byte == 0)).count();
                if hashes {
                    std::hint::black_box((zeros, blake3::hash(block)));
                }
                total += compressor.compress(block)?.len() as u64;
            }
            Ok(total)
        })
    })
    .map_err(|e| e.at(path))
}

/// A file of compressed blocks, as a store has them in its packs.
pub struct Packed {
    file: File,
    /// Offset and stored length of each block.
    blocks: Vec<(u64, usize)>,
}

impl Packed {
    /// Writes the blocks of an image, which must be a multiple of the block size, compressed by LZ4.
    pub fn write(image: &Path, path: &Path) -> Result<Packed> {
        let write = || -> io::Result<Packed> {
            let source = File::open(image)?;
            let (mut out, mut blocks, mut offset) = (io::BufWriter::new(File::create(path)?), Vec::new(), 0);
            let (mut compressor, mut block) = (Compressor::new(Codec::Lz4)?, vec![0; BLOCK]);
            for index in 0..source.metadata()?.len() / BLOCK as u64 {
                source.read_exact_at(&mut block, index * BLOCK as u64)?;
                let record = compressor.compress(&block)?;
                out.write_all(record)?;
                blocks.push((offset, record.len()));
                offset += record.len() as u64;
            }
            out.into_inner()?.sync_all()?;
            Ok(Packed { file: File::open(path)?, blocks })
        };
        write().map_err(|e| Error::io("cannot write", path, e))
    }

    /// Reads blocks anywhere with `O_DIRECT`, decodes and hashes them, one after the other. Returns the time of each in
    /// microseconds, in ascending order.
    pub fn verify_anywhere(&self, path: &Path, seed: u64, count: u64) -> Result<Vec<f64>> {
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        let open = || File::options().read(true).custom_flags(flags).open(path);
        let measure = || -> io::Result<Vec<f64>> {
            let (file, mut buffer, mut out) = (open()?, vec![0; BLOCK + 3 * DIRECT], vec![0; BLOCK]);
            let skip = buffer.as_ptr().align_offset(DIRECT);
            let buffer = &mut buffer[skip..];
            let mut times = Vec::new();
            for index in 0..count {
                let (offset, length) =
                    self.blocks[to_usize(scattered(seed << 32 | index)) % self.blocks.len()];
                let began = Instant::now();
                let skip = to_usize(offset) % DIRECT;
                let want = (skip + length).next_multiple_of(DIRECT);
                let read = file.read_at(&mut buffer[..want], offset - skip as u64)?;
                let record = buffer[..read].get(skip..skip + length).ok_or(io::ErrorKind::UnexpectedEof)?;
                std::hint::black_box(blake3::hash(decode(record, &mut out)?));
                times.push(began.elapsed().as_secs_f64() * 1e6);
            }
            times.sort_by(f64::total_cmp);
            Ok(times)
        };
        measure().map_err(|e| Error::io("cannot read blocks of", path, e))
    }

    /// Reads, decodes and hashes all blocks on all processors. Returns the number of decoded bytes.
    pub fn verify(&self) -> Result<u64> {
        let batches = self.blocks.chunks(BATCH).collect::<Vec<_>>();
        in_parallel(processors(), batches.len() as u64, || {
            let (batches, file) = (&batches, &self.file);
            let (mut records, mut out) = (Vec::new(), vec![0; BLOCK]);
            Ok(move |batch: u64| {
                let blocks = batches[to_usize(batch)];
                let (first, last) = (blocks[0], blocks[blocks.len() - 1]);
                records.resize(to_usize(last.0 - first.0) + last.1, 0);
                file.read_exact_at(&mut records, first.0)?;
                let mut total = 0;
                for (offset, length) in blocks {
                    let record = &records[to_usize(offset - first.0)..][..*length];
                    let plain = decode(record, &mut out)?;
                    std::hint::black_box(blake3::hash(plain));
                    total += plain.len() as u64;
                }
                Ok(total)
            })
        })
    }
}

/// Returns the plain block of a record.
fn decode<'a>(record: &'a [u8], out: &'a mut [u8]) -> io::Result<&'a [u8]> {
    if record.len() == BLOCK {
        return Ok(record);
    }
    let length = decompress_into(record, out).map_err(io::Error::other)?;
    Ok(&out[..length])
}

/// The number of processors.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Runs a worker in each thread on the numbers below `count`, each number once. Returns the sum of the results.
fn in_parallel<W>(threads: usize, count: u64, worker: impl Fn() -> io::Result<W> + Sync) -> Result<u64>
where
    W: FnMut(u64) -> io::Result<u64>,
{
    let (next, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed = |e| Error::failed("cannot process a block").because(e);
    threads::share(threads, || {
        let mut worker = worker().map_err(failed)?;
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                number if number < count => {
                    total.fetch_add(worker(number).map_err(failed)?, Ordering::Relaxed);
                }
                _ => return Ok(()),
            }
        }
    })?;
    Ok(total.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_block_is_encoded_once_and_decoded_to_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        // A zero block, blocks that can be compressed, and blocks that cannot.
        let mut data = vec![0; 40 * BLOCK];
        for (index, byte) in data.iter_mut().enumerate().skip(BLOCK) {
            let run = if index < 30 * BLOCK { 64 } else { 1 };
            *byte = scattered((index / run) as u64).to_le_bytes()[0];
        }
        fs::write(&image, &data).unwrap();
        let packed = Packed::write(&image, &dir.path().join("packed")).unwrap();
        assert_eq!(packed.verify().unwrap(), data.len() as u64);
        let times = packed.verify_anywhere(&dir.path().join("packed"), 1, 100).unwrap();
        assert!(times.len() == 100 && times.is_sorted(), "{times:?}");
        let stored: usize = packed.blocks.iter().map(|(_, length)| length).sum();
        assert!(stored < data.len() / 2, "{stored}");
        for threads in [1, 3] {
            assert_eq!(encode(&image, Codec::Lz4, threads, true).unwrap(), stored as u64);
        }
        assert!(encode(&image, Codec::Zstd, 2, false).unwrap() < stored as u64);
        fs::write(dir.path().join("packed"), vec![0xff; stored]).unwrap();
        packed.verify().unwrap_err();
        packed.verify_anywhere(&dir.path().join("packed"), 1, 100).unwrap_err();
    }
}
