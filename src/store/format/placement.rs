//! The placement of an image: where its blocks are stored. A placement may be rewritten at any time.
//!
//! Layout: `front | row × blocks | chaining values of the image | chaining values of the rows`. The front is read and
//! checked at open; a segment of rows is checked at its first access.

use super::fields::{Fields, Invalid, Preamble, in_header, seal, unseal};
use super::{PackId, Stored, image};
use crate::store::Digest;
use crate::units::to_usize;

const MAGIC: &[u8; 8] = b"STNCLPLC";
const FIXED: usize = Preamble::LEN + 120;
const FILE: usize = 32;

/// Longest front that is read, in bytes: room for 256 files and a million packs.
pub const MAX_FRONT: u32 = 32 << 20;

/// Sizes of one file, as recorded in the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStats {
    /// Bytes in 4 KiB pages that are not zero.
    pub data_bytes: u64,
    /// Bytes of the file's records in packs, including shared records.
    pub stored_bytes: u64,
}

/// The front of a placement: the part that is read at open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Front {
    /// Digest of the image.
    pub digest: Digest,
    /// Length of the image in bytes.
    pub image_length: u64,
    /// Number of blocks of the image.
    pub block_count: u64,
    /// Root of the hash tree over the rows.
    pub rows_root: Digest,
    /// One entry for each file of the image.
    pub files: Vec<FileStats>,
    /// Packs of the rows; a row names a pack by its index in this list.
    pub packs: Vec<PackId>,
}

/// Offsets and lengths of the parts of a placement, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sections {
    /// Offset of the rows, which is the length of the front.
    pub rows: u64,
    /// Length of the rows.
    pub rows_length: u64,
    /// Offset of the chaining values of the image.
    pub image_tree: u64,
    /// Offset of the chaining values of the rows.
    pub rows_tree: u64,
    /// Length of the file.
    pub end: u64,
}

impl Front {
    /// Returns the length in bytes of a front with these numbers of files and packs.
    pub fn length(files: usize, packs: usize) -> u64 {
        (FIXED + files * FILE + packs * 16 + 32) as u64
    }

    /// Returns the sections of the file; `segments` returns the number of chaining values for a length in bytes.
    pub fn sections(&self, segments: impl Fn(u64) -> u64) -> Sections {
        let rows = Self::length(self.files.len(), self.packs.len());
        let rows_length = self.block_count * Row::LEN as u64;
        let image_tree = rows + rows_length;
        let rows_tree = image_tree + segments(self.image_length) * 32;
        Sections { rows, rows_length, image_tree, rows_tree, end: rows_tree + segments(rows_length) * 32 }
    }

    /// Encodes the front.
    pub fn encode(&self) -> Vec<u8> {
        let length = to_usize(Self::length(self.files.len(), self.packs.len()));
        let mut out = Vec::with_capacity(length);
        Preamble::plain(length).encode(MAGIC, &mut out);
        out.extend_from_slice(self.digest.bytes());
        out.extend_from_slice(&self.image_length.to_le_bytes());
        out.extend_from_slice(&self.block_count.to_le_bytes());
        out.extend_from_slice(&in_header(self.files.len()).to_le_bytes());
        out.extend_from_slice(&in_header(self.packs.len()).to_le_bytes());
        out.extend_from_slice(self.rows_root.bytes());
        out.resize(FIXED, 0);
        for file in &self.files {
            out.extend_from_slice(&file.data_bytes.to_le_bytes());
            out.extend_from_slice(&file.stored_bytes.to_le_bytes());
            out.extend_from_slice(&[0; 16]);
        }
        for pack in &self.packs {
            out.extend_from_slice(&pack.0);
        }
        seal(&mut out);
        out
    }

    /// Returns the length of a front from its first bytes (at least [`Preamble::LEN`]).
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not the start of a placement.
    pub fn peek(bytes: &[u8]) -> Result<u32, Invalid> {
        match Preamble::header_length(MAGIC, bytes)? {
            length if (length as usize) < FIXED + 32 || length > MAX_FRONT => {
                Err(Invalid::damage(format!("impossible header length {length}")))
            }
            length => Ok(length),
        }
    }

    /// Decodes a front from its bytes, whose number is the value of [`Front::peek`].
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not a front of this version.
    pub fn decode(bytes: &[u8]) -> Result<Front, Invalid> {
        let mut fields = Fields(unseal(bytes)?);
        Preamble::decode(MAGIC, &mut fields)?;
        let digest = Digest::new(fields.array()?);
        let (image_length, block_count) = (fields.u64()?, fields.u64()?);
        let (files, packs) = (fields.u32()? as usize, fields.u32()? as usize);
        let rows_root = Digest::new(fields.array()?);
        fields.reserved(FIXED - Preamble::LEN - 88)?;
        if block_count > image::MAX_BLOCKS || image_length > image::MAX_LENGTH {
            return Err(Invalid::damage(format!(
                "{block_count} blocks and an image of {image_length} bytes exceed the limits"
            )));
        }
        if files > image::MAX_FILES || Self::length(files, packs) != bytes.len() as u64 {
            return Err(Invalid::damage(format!(
                "header length {} does not match the file count {files} and the pack count {packs}",
                bytes.len()
            )));
        }
        let mut front =
            Front { digest, image_length, block_count, rows_root, files: Vec::new(), packs: Vec::new() };
        for _ in 0..files {
            let stats = FileStats { data_bytes: fields.u64()?, stored_bytes: fields.u64()? };
            fields.reserved(16)?;
            front.files.push(stats);
        }
        for _ in 0..packs {
            front.packs.push(PackId(fields.array()?));
        }
        Ok(front)
    }
}

/// Location of one block. A row of `None` is a zero block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Index of the pack in the front's list.
    pub pack: u32,
    /// Location of the record in that pack.
    pub stored: Stored,
}

impl Row {
    /// Encoded length in bytes.
    pub const LEN: usize = 16;

    /// Appends the encoded row to `out`.
    pub fn encode(row: Option<Row>, out: &mut Vec<u8>) {
        match row {
            None => out.extend_from_slice(&[0; Self::LEN]),
            Some(row) => {
                out.extend_from_slice(&row.pack.to_le_bytes());
                row.stored.encode(out);
            }
        }
    }

    /// Decodes a row from the first [`Row::LEN`] bytes.
    ///
    /// # Errors
    /// Returns [`Invalid`] if a field has an impossible value.
    pub fn decode(bytes: &[u8]) -> Result<Option<Row>, Invalid> {
        let mut fields = Fields(bytes);
        let whole = fields.array::<{ Self::LEN }>()?;
        if whole == [0; Self::LEN] {
            return Ok(None);
        }
        let mut fields = Fields(&whole);
        Ok(Some(Row { pack: fields.u32()?, stored: Stored::decode(&mut fields)? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::format::BlockKind;

    #[test]
    fn round_trips_a_front_and_detects_every_flipped_bit() {
        let front = Front {
            digest: Digest::of(b"d"),
            image_length: 1000,
            block_count: 20,
            rows_root: Digest::of(b"r"),
            files: vec![FileStats { data_bytes: 8192, stored_bytes: 77 }],
            packs: vec![PackId([1; 16]), PackId([2; 16])],
        };
        let bytes = front.encode();
        assert_eq!(Front::peek(&bytes).unwrap() as usize, bytes.len());
        assert_eq!(Front::decode(&bytes).unwrap(), front);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Front::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Front::decode(&bytes[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn rejects_lengths_above_the_limits_of_an_image() {
        let front = |image_length, block_count| Front {
            digest: Digest::of(b"d"),
            image_length,
            block_count,
            rows_root: Digest::of(b"r"),
            files: vec![FileStats { data_bytes: 0, stored_bytes: 0 }],
            packs: Vec::new(),
        };
        assert!(Front::decode(&front(image::MAX_LENGTH, image::MAX_BLOCKS).encode()).is_ok());
        assert!(Front::decode(&front(image::MAX_LENGTH + 1, 1).encode()).is_err());
        assert!(Front::decode(&front(1 << 60, 1).encode()).is_err());
        assert!(Front::decode(&front(1000, u64::MAX / 4).encode()).is_err());
    }

    #[test]
    fn round_trips_a_row() {
        let stored = Stored { offset: 300, length: 65536, kind: BlockKind::Raw, data_pages: 1 };
        for row in [None, Some(Row { pack: 3, stored })] {
            let mut bytes = Vec::new();
            Row::encode(row, &mut bytes);
            assert_eq!(bytes.len(), Row::LEN);
            assert_eq!(Row::decode(&bytes).unwrap(), row);
        }
        assert!(Row::decode(&[1; 15]).is_err());
        assert!(Row::decode(&[1; 16]).is_err());
    }
}
