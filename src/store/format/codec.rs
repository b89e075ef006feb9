//! Encodes plain blocks as records and decodes records.

use std::fmt;
use std::str::FromStr;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::error::{Error, Result};
use crate::store::format::BlockKind;
use crate::store::{BLOCK_SIZE, Digest};
use crate::units::{PAGE_SIZE, to_usize};

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

/// Encodes plain blocks as records. Reuses its compression tables between blocks.
pub struct Encoder {
    compression: Compression,
    lz4: CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    compressed: Vec<u8>,
}

impl Encoder {
    /// Creates an encoder for this compression.
    ///
    /// # Errors
    /// Returns an error if libzstd cannot allocate its tables.
    pub fn new(compression: Compression) -> Result<Encoder> {
        let zstd = match compression {
            Compression::Zstd(level) => Some(
                zstd::bulk::Compressor::new(level)
                    .map_err(|e| Error::failed("cannot initialize the Zstandard compressor").because(e))?,
            ),
            _ => None,
        };
        let compressed = vec![0; get_maximum_output_size(BLOCK).max(zstd::zstd_safe::compress_bound(BLOCK))];
        Ok(Encoder { compression, lz4: CompressTable::large(), zstd, compressed })
    }

    /// Appends the record of `block` (64 KiB) to `out` and returns the record's kind.
    pub fn encode(&mut self, block: &[u8], out: &mut Vec<u8>) -> BlockKind {
        match self.compress(block) {
            Some(length) => {
                out.extend_from_slice(&self.compressed[..length]);
                self.kind()
            }
            None => {
                out.extend_from_slice(block);
                BlockKind::Raw
            }
        }
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
        kind: BlockKind,
        record: &[u8],
        expected: &Digest,
        out: &mut [u8],
    ) -> std::result::Result<(), Mismatch> {
        let result = self.plain(kind, record, out).and_then(|()| match Digest::of(out) {
            got if got == *expected => Ok(()),
            got => Err(format!("its content has hash {got}, expected {expected}")),
        });
        if result.is_err() {
            out.fill(0);
        }
        result
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
    fn round_trips_every_codec_and_detects_flips() {
        for codec in ALL {
            let mut encoder = Encoder::new(codec.parse().unwrap()).unwrap();
            let mut decoder = Decoder::default();
            for block in blocks() {
                let (mut record, mut plain) = (Vec::new(), vec![1; BLOCK]);
                let kind = encoder.encode(&block, &mut record);
                let hash = Digest::of(&block);
                decoder.block(kind, &record, &hash, &mut plain).unwrap();
                assert!(plain == block, "{codec}");
                for flip in (0..record.len()).step_by(record.len() / 40 + 1) {
                    let mut bad = record.clone();
                    bad[flip] ^= 0x10;
                    // Some codecs have bits without meaning; flipping one must not change the decoded block.
                    match decoder.block(kind, &bad, &hash, &mut plain) {
                        Ok(()) => assert!(plain == block, "{codec} {flip}"),
                        Err(_) => assert!(is_zero(&plain), "{codec} {flip}"),
                    }
                }
                for length in [0, 1, record.len() / 2, record.len() - 1] {
                    assert!(decoder.block(kind, &record[..length], &hash, &mut plain).is_err());
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
    fn rejects_invalid_compressions() {
        for bad in ["", "gzip", "zstd:0", "zstd:23", "zstd:x", "lz4:1", "none:2"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
