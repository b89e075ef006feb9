//! Blocks and their records: identifiers, encodings, lengths.

use super::fields::{Fields, Invalid};

/// Binary logarithm of the block size in bytes.
pub const BLOCK_SHIFT: u32 = 16;

/// Block size in bytes: the unit of hashing, verification and reading.
pub const BLOCK_SIZE: u64 = 1 << BLOCK_SHIFT;

/// Identifier of a pack: random, and part of the pack's file name and header.
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

/// Encoding of a stored block. The numbers are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockKind {
    /// All zero: the block has no record.
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
    pub(super) fn decode(number: u8) -> Result<BlockKind, Invalid> {
        Ok(match number {
            0 => BlockKind::Zero,
            1 => BlockKind::Raw,
            2 => BlockKind::Lz4,
            3 => BlockKind::Zstd,
            KIND_PAGE_DELTA | KIND_IMAGE_BLOCK => {
                return Err(Invalid::Newer(format!("unsupported block kind {number}")));
            }
            _ => return Err(Invalid::damage(format!("unknown block kind {number}, expected 0 to 3"))),
        })
    }
}

/// Location and encoding of one record within a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Offset of the record in its pack, in bytes.
    pub offset: u32,
    /// Length of the record in bytes.
    pub length: u32,
    /// Encoding of the record.
    pub kind: BlockKind,
    /// Bit mask of the sixteen 4 KiB pages that are not zero, lowest bit first. Accounting uses the mask without
    /// decoding the block.
    pub data_pages: u16,
}

/// Maximum length of a record in bytes: a raw block.
pub const MAX_RECORD: u32 = 1 << BLOCK_SHIFT;

impl Stored {
    /// Returns the range of the pack that holds the record.
    pub fn range(&self) -> std::ops::Range<u64> {
        let offset = u64::from(self.offset);
        offset..offset + u64::from(self.length)
    }

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.length.to_le_bytes());
        out.extend_from_slice(&[self.kind as u8, BLOCK_SHIFT.to_le_bytes()[0]]);
        out.extend_from_slice(&self.data_pages.to_le_bytes());
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Stored, Invalid> {
        let (offset, length) = (fields.u32()?, fields.u32()?);
        let [kind, shift, pages @ ..] = fields.array::<4>()?;
        let kind = BlockKind::decode(kind)?;
        let data_pages = u16::from_le_bytes(pages);
        if data_pages == 0 {
            return Err(Invalid::damage("a stored block has no page with data"));
        }
        if kind == BlockKind::Zero {
            return Err(Invalid::damage("a zero block has a record"));
        }
        if length == 0 || length > MAX_RECORD {
            return Err(Invalid::damage(format!(
                "invalid record length {length}: expected 1 to {MAX_RECORD} bytes"
            )));
        }
        if u32::from(shift) != BLOCK_SHIFT {
            return Err(Invalid::Newer(format!(
                "unsupported block size 2^{shift}, expected 2^{BLOCK_SHIFT}"
            )));
        }
        Ok(Stored { offset, length, kind, data_pages })
    }
}
