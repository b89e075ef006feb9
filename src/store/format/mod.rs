//! The bytes on disk, format version 1: the only module that knows them.
//!
//! `docs/reference/store-format.md` has the tables. All numbers are little endian. Every length is bounded
//! before it is used, and every header carries its own checksum, so that a decoder either gives a
//! value that may be trusted or an [`Invalid`] that says what it met.

mod fields;
pub mod image;
pub mod pack;
pub mod placement;
pub mod stream;
pub mod superblock;

pub use fields::{Invalid, Preamble};

/// Binary logarithm of the size of an identity block.
pub const BLOCK_SHIFT: u32 = 16;

/// Version of every structure written by this build.
pub const VERSION: u32 = 1;

/// Identifies a pack: random, and part of the pack's file name and header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub [u8; 16]);

impl std::fmt::Display for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// How a stored block is to be read. The numbers are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockKind {
    /// All zero: nothing is stored.
    Zero = 0,
    /// The plain bytes.
    Raw = 1,
    /// LZ4 block format.
    Lz4 = 2,
    /// A Zstandard frame.
    Zstd = 3,
}

/// Reserved kind: changed pages over another stored block.
pub const KIND_PAGE_DELTA: u8 = 4;
/// Reserved kind: the same block of another image.
pub const KIND_IMAGE_BLOCK: u8 = 5;

impl BlockKind {
    fn decode(number: u8) -> Result<BlockKind, Invalid> {
        Ok(match number {
            0 => BlockKind::Zero,
            1 => BlockKind::Raw,
            2 => BlockKind::Lz4,
            3 => BlockKind::Zstd,
            KIND_PAGE_DELTA | KIND_IMAGE_BLOCK => return Err(Invalid::Newer(format!("block kind {number}"))),
            _ => return Err(Invalid::damage(format!("block kind {number} is none of 0 to 5"))),
        })
    }
}

/// Where and how one block is stored, apart from the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// First byte of the record in its pack.
    pub offset: u32,
    /// Length of the record in bytes.
    pub length: u32,
    /// How it is to be read.
    pub kind: BlockKind,
    /// Binary logarithm of the sub-chunk; [`BLOCK_SHIFT`] for a block stored in one piece.
    pub chunk_shift: u8,
    /// Which of its sixteen 4 KiB pages are not zero, lowest bit first: accounting asks for it without
    /// decoding the block.
    pub data_pages: u16,
}

/// Longest record: a block stored raw, in sub-chunks of 4 KiB with their table.
pub const MAX_RECORD: u32 = (1 << BLOCK_SHIFT) + 16 * CHUNK_ENTRY as u32;

/// Bytes a sub-chunk takes in the table before its record: stored length and chaining value.
pub const CHUNK_ENTRY: usize = 2 + 32;

/// Smallest sub-chunk, as a binary logarithm.
pub const MIN_CHUNK_SHIFT: u8 = 12;

impl Stored {
    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.length.to_le_bytes());
        out.extend_from_slice(&[self.kind as u8, self.chunk_shift]);
        out.extend_from_slice(&self.data_pages.to_le_bytes());
    }

    fn decode(fields: &mut fields::Fields<'_>) -> Result<Stored, Invalid> {
        let (offset, length) = (fields.u32()?, fields.u32()?);
        let [kind, chunk_shift, pages @ ..] = fields.array::<4>()?;
        let kind = BlockKind::decode(kind)?;
        let data_pages = u16::from_le_bytes(pages);
        if data_pages == 0 {
            return Err(Invalid::damage("a stored block claims to hold zeros only"));
        }
        if kind == BlockKind::Zero {
            return Err(Invalid::damage("a zero block claims to be stored"));
        }
        if length == 0 || length > MAX_RECORD {
            return Err(Invalid::damage(format!(
                "a record of {length} bytes (1 to {MAX_RECORD} are possible)"
            )));
        }
        if !(MIN_CHUNK_SHIFT..=BLOCK_SHIFT as u8).contains(&chunk_shift) {
            return Err(Invalid::damage(format!("sub-chunks of 2^{chunk_shift} bytes")));
        }
        Ok(Stored { offset, length, kind, chunk_shift, data_pages })
    }
}
