//! Encodes plain blocks as records and decodes records.
//!
//! A record in one piece is the raw or compressed block. A record in sub-chunks is a table (the 16-bit stored length of
//! each sub-chunk, then the BLAKE3 chaining value of each) followed by the sub-chunks. Each sub-chunk can be decoded
//! and verified alone, because the chaining values merge to the hash of the block. A stored length of 0 stands for a
//! zero sub-chunk, and the full length for a raw one.

use std::fmt;
use std::str::FromStr;

use blake3::hazmat::{self, HasherExt, Mode};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::error::{Error, Result};
use crate::store::format::{BlockKind, CHUNK_ENTRY, MIN_CHUNK_SHIFT, ONE_PIECE};
use crate::store::{BLOCK_SIZE, Digest};
use crate::units::{Bytes, PAGE_SIZE, to_usize};

const BLOCK: usize = to_usize(BLOCK_SIZE);
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Returns true if all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A comparison with a static zero block compiles to memcmp, which is fast in every build profile.
    bytes.chunks(BLOCK).all(|part| part == &ZEROS[..part.len()])
}

/// Returns a bit mask of the 4 KiB pages of a block that are not zero, lowest bit first.
pub fn page_mask(block: &[u8]) -> u16 {
    let pages = (0..).zip(block.chunks_exact(to_usize(PAGE_SIZE)));
    pages.fold(0, |mask, (page, bytes)| mask | u16::from(!is_zero(bytes)) << page)
}

/// Compression of new blocks. A block that does not shrink is stored raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// LZ4: fastest to decompress.
    #[default]
    Lz4,
    /// Zstandard with a level from 1 to 22: smaller, slower.
    Zstd(i32),
    /// No compression: every block is stored raw.
    None,
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Compression> {
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level)),
            None => (text, None),
        };
        let level = level.map(|l| l.parse::<i32>().ok().filter(|l| (1..=22).contains(l)));
        match (name, level) {
            ("lz4", None) => Ok(Compression::Lz4),
            ("none", None) => Ok(Compression::None),
            ("zstd", None) => Ok(Compression::Zstd(3)),
            ("zstd", Some(Some(level))) => Ok(Compression::Zstd(level)),
            _ => Err(Error::usage(format!("invalid compression '{text}'"))
                .hint("use lz4, none, zstd or zstd:LEVEL with a level from 1 to 22")),
        }
    }
}

/// Size of the separately decodable parts of a stored block: a power of two from 4 KiB to 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize(u8);

impl Default for ChunkSize {
    fn default() -> ChunkSize {
        ChunkSize(ONE_PIECE)
    }
}

impl FromStr for ChunkSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<ChunkSize> {
        let bytes = Bytes::parse(text)?.get();
        (MIN_CHUNK_SHIFT..=ONE_PIECE).find(|shift| bytes == 1 << shift).map(ChunkSize).ok_or_else(|| {
            Error::usage(format!("invalid chunk size '{text}'")).hint("use 4k, 8k, 16k, 32k or 64k")
        })
    }
}

/// Encodes plain blocks as records. Reuses its compression tables between blocks.
pub struct Encoder {
    compression: Compression,
    shift: u8,
    lz4: CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    compressed: Vec<u8>,
}

impl Encoder {
    /// Creates an encoder for this compression and chunk size.
    ///
    /// # Errors
    /// Returns an error if libzstd cannot allocate its tables.
    pub fn new(compression: Compression, chunk: ChunkSize) -> Result<Encoder> {
        let zstd = match compression {
            Compression::Zstd(level) => Some(
                zstd::bulk::Compressor::new(level)
                    .map_err(|e| Error::failed("cannot initialize the Zstandard compressor").because(e))?,
            ),
            _ => None,
        };
        let compressed = vec![0; get_maximum_output_size(BLOCK).max(zstd::zstd_safe::compress_bound(BLOCK))];
        Ok(Encoder { compression, shift: chunk.0, lz4: CompressTable::large(), zstd, compressed })
    }

    /// Appends the record of `block` (64 KiB) to `out` and returns the record's kind and chunk shift.
    pub fn encode(&mut self, block: &[u8], out: &mut Vec<u8>) -> (BlockKind, u8) {
        if self.shift == ONE_PIECE {
            return match self.compress(block) {
                Some(length) => {
                    out.extend_from_slice(&self.compressed[..length]);
                    (self.kind(), ONE_PIECE)
                }
                None => {
                    out.extend_from_slice(block);
                    (BlockKind::Raw, ONE_PIECE)
                }
            };
        }
        let size = 1usize << self.shift;
        let chunks = block.len() / size;
        let table = out.len();
        out.resize(table + chunks * CHUNK_ENTRY as usize, 0);
        for (index, chunk) in block.chunks_exact(size).enumerate() {
            let length = match is_zero(chunk) {
                true => 0,
                false => match self.compress(chunk) {
                    Some(length) => {
                        out.extend_from_slice(&self.compressed[..length]);
                        length
                    }
                    None => {
                        out.extend_from_slice(chunk);
                        size
                    }
                },
            };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "at most 32 KiB: 64 KiB are one piece, without a table"
            )]
            let length = length as u16;
            let value = chunk_value(chunk, index);
            out[table + index * 2..][..2].copy_from_slice(&length.to_le_bytes());
            out[table + chunks * 2 + index * 32..][..32].copy_from_slice(&value);
        }
        (self.kind(), self.shift)
    }

    fn kind(&self) -> BlockKind {
        match self.compression {
            Compression::Lz4 => BlockKind::Lz4,
            Compression::Zstd(_) => BlockKind::Zstd,
            Compression::None => BlockKind::Raw,
        }
    }

    /// Compresses `plain` into `self.compressed`. Returns the compressed length, or `None` if the data does not shrink.
    fn compress(&mut self, plain: &[u8]) -> Option<usize> {
        let length = match self.compression {
            Compression::None => return None,
            Compression::Lz4 => compress_into_with_table(plain, &mut self.compressed, &mut self.lz4).ok()?,
            Compression::Zstd(_) => {
                self.zstd.as_mut()?.compress_to_buffer(plain, &mut self.compressed[..]).ok()?
            }
        };
        (length < plain.len()).then_some(length)
    }
}

fn chunk_value(chunk: &[u8], index: usize) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset((index * chunk.len()) as u64).update(chunk).finalize_non_root()
}

/// Returns the hash of the block from the chaining values of its 2, 4, 8 or 16 sub-chunks.
fn merge(mut values: Vec<[u8; 32]>) -> Digest {
    while values.len() > 2 {
        values = values
            .chunks_exact(2)
            .map(|pair| hazmat::merge_subtrees_non_root(&pair[0], &pair[1], Mode::Hash))
            .collect();
    }
    match &values[..] {
        [left, right] => hazmat::merge_subtrees_root(left, right, Mode::Hash).into(),
        _ => Digest::new([0; 32]),
    }
}

/// Why a record cannot be decoded, with the value found and the value expected. The text is a clause about the record
/// ("its content has hash …").
pub type Mismatch = String;

/// Decodes and verifies records. Reuses its decompression tables between blocks.
#[derive(Default)]
pub struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    /// Decodes a whole block and compares its hash.
    ///
    /// # Errors
    /// Returns the mismatch; `out` (64 KiB) then holds zeros.
    pub fn block(
        &mut self,
        (kind, shift): (BlockKind, u8),
        record: &[u8],
        expected: &Digest,
        out: &mut [u8],
    ) -> std::result::Result<(), Mismatch> {
        let result = match shift {
            ONE_PIECE => self.plain(kind, record, out).and_then(|()| match Digest::of(out) {
                got if got == *expected => Ok(()),
                got => Err(format!("its content has hash {got}, expected {expected}")),
            }),
            shift => self.chunks((kind, shift), record, expected, 0, out),
        };
        if result.is_err() {
            out.fill(0);
        }
        result
    }

    /// Decodes and verifies the sub-chunks from `first` on, as many as fill `out`.
    ///
    /// # Errors
    /// Same as [`Decoder::block`].
    pub fn chunks(
        &mut self,
        (kind, shift): (BlockKind, u8),
        record: &[u8],
        expected: &Digest,
        first: usize,
        out: &mut [u8],
    ) -> std::result::Result<(), Mismatch> {
        let size = 1usize << shift;
        let count = BLOCK / size;
        let (lengths, rest) =
            record.split_at_checked(count * 2).ok_or("the record is shorter than its sub-chunk table")?;
        let (values, mut data) =
            rest.split_at_checked(count * 32).ok_or("the record is shorter than its sub-chunk table")?;
        let values: Vec<[u8; 32]> = values.as_chunks::<32>().0.to_vec();
        let got = merge(values.clone());
        if got != *expected {
            return Err(format!("its sub-chunks have hash {got}, expected {expected}"));
        }
        let wanted = first..first + out.len() / size;
        for (index, length) in lengths.as_chunks::<2>().0.iter().enumerate() {
            let length = usize::from(u16::from_le_bytes(*length));
            let (stored, tail) = data.split_at_checked(length).ok_or("its sub-chunks are truncated")?;
            data = tail;
            if !wanted.contains(&index) {
                continue;
            }
            let plain = &mut out[(index - first) * size..][..size];
            match length {
                0 => plain.fill(0),
                length if length == size => plain.copy_from_slice(stored),
                _ => self.plain(kind, stored, plain)?,
            }
            if chunk_value(plain, index) != values[index] {
                return Err(format!("the content of sub-chunk {index} does not match the hash in its table"));
            }
        }
        match data.is_empty() {
            true => Ok(()),
            false => Err(format!("unexpected bytes after its sub-chunks: {}", data.len())),
        }
    }

    fn plain(&mut self, kind: BlockKind, stored: &[u8], out: &mut [u8]) -> std::result::Result<(), Mismatch> {
        let length = match kind {
            BlockKind::Zero => return Err("its kind is 'zero block', which has no record".into()),
            BlockKind::Raw if stored.len() == out.len() => {
                out.copy_from_slice(stored);
                out.len()
            }
            BlockKind::Raw => stored.len(),
            BlockKind::Lz4 => decompress_into(stored, out).map_err(|e| format!("invalid LZ4 data: {e}"))?,
            BlockKind::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Decompressor::new().ok();
                }
                let zstd = self.zstd.as_mut().ok_or("cannot initialize the Zstandard decompressor")?;
                zstd.decompress_to_buffer(stored, out).map_err(|e| format!("invalid Zstandard data: {e}"))?
            }
        };
        match length == out.len() {
            true => Ok(()),
            false => Err(format!("its decoded length is {length}, expected {} bytes", out.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::store::format::codec::*;

    fn blocks() -> Vec<Vec<u8>> {
        let mut state = 1u64;
        let random: Vec<u8> = (0..BLOCK)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        let text: Vec<u8> = (0..BLOCK).map(|i| b"the quick brown fox "[i % 20]).collect();
        let mut mixed = random.clone();
        mixed[4096..40960].fill(0);
        let mut one = vec![0; BLOCK];
        one[BLOCK - 1] = 1;
        vec![random, text, mixed, one]
    }

    const ALL: [&str; 4] = ["lz4", "zstd", "zstd:19", "none"];

    #[test]
    fn round_trips_every_codec_and_chunk_size_and_detects_flips() {
        for (codec, chunk) in ALL.iter().flat_map(|c| ["4k", "16k", "32k", "64k"].map(|s| (*c, s))) {
            let mut encoder = Encoder::new(codec.parse().unwrap(), chunk.parse().unwrap()).unwrap();
            let mut decoder = Decoder::default();
            for block in blocks() {
                let (mut record, mut plain) = (Vec::new(), vec![1; BLOCK]);
                let how = encoder.encode(&block, &mut record);
                let hash = Digest::of(&block);
                decoder.block(how, &record, &hash, &mut plain).unwrap();
                assert!(plain == block, "{codec} {chunk}");
                if how.1 < 16 {
                    let size = 1usize << how.1;
                    decoder.chunks(how, &record, &hash, 1, &mut plain[..size]).unwrap();
                    assert!(plain[..size] == block[size..2 * size], "{codec} {chunk}");
                }
                for flip in (0..record.len()).step_by(record.len() / 40 + 1) {
                    let mut bad = record.clone();
                    bad[flip] ^= 0x10;
                    // Some codecs have bits without meaning; flipping one must not change the decoded block.
                    match decoder.block(how, &bad, &hash, &mut plain) {
                        Ok(()) => assert!(plain == block, "{codec} {chunk} {flip}"),
                        Err(_) => assert!(is_zero(&plain), "{codec} {chunk} {flip}"),
                    }
                }
                for length in [0, 1, record.len() / 2, record.len() - 1] {
                    assert!(decoder.block(how, &record[..length], &hash, &mut plain).is_err());
                }
            }
        }
    }

    /// The decoders of old formats are not linked: their bugs are not reachable from a store or a stream.
    #[test]
    fn rejects_frames_of_zstandard_before_version_1() {
        // Version 0.7: magic number, header of a single segment, content size, one raw block, end of the frame.
        let frame = [&b"\x27\xb5\x2f\xfd\x20\x04"[..], b"\x40\x00\x04abcd", b"\xc0\x00\x00"].concat();
        let error = Decoder::default().plain(BlockKind::Zstd, &frame, &mut [0; 4]).unwrap_err();
        assert!(error.contains("Unknown frame descriptor"), "{error}");
    }

    #[test]
    fn rejects_invalid_compressions_and_chunk_sizes() {
        for bad in ["", "gzip", "zstd:0", "zstd:23", "zstd:x", "lz4:1", "none:2"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
        for bad in ["", "2k", "128k", "5000", "0"] {
            assert!(bad.parse::<ChunkSize>().is_err(), "{bad}");
        }
    }
}
