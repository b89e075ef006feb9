//! A pack: `header | records | index | zeros`, in the file `packs/<id>.pack`.

use super::fields::{Fields, Invalid, Preamble, seal, unseal};
use super::{PackId, Stored};
use crate::store::Digest;
use crate::units::PAGE_SIZE;

const MAGIC: &[u8; 8] = b"STNCLPAK";

/// Header of a pack; written after the records and the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackHeader {
    /// Feature words.
    pub preamble: Preamble,
    /// Identifier of the pack. A pack under the file name of another pack is detected by this field.
    pub id: PackId,
    /// Dedup domain: zero = blocks are named by plain BLAKE3 and shared by all templates.
    pub domain: [u8; 16],
    /// Offset of the index in bytes: the end of the records.
    pub index_offset: u64,
    /// Number of entries of the index.
    pub index_count: u64,
    /// BLAKE3 of the index.
    pub index_hash: Digest,
}

/// Maximum length of a pack in bytes: record offsets have 32 bits.
pub const MAX_PACK: u64 = u32::MAX as u64;

impl PackHeader {
    /// Encoded length in bytes: the offset of the first record.
    pub const LEN: usize = 256;

    /// Creates the header of a pack without features in the shared dedup domain.
    pub fn new(id: PackId, index_offset: u64, index_count: u64, index_hash: Digest) -> PackHeader {
        let preamble = Preamble::plain(Self::LEN);
        PackHeader { preamble, id, domain: [0; 16], index_offset, index_count, index_hash }
    }

    /// Returns the end of the index in bytes.
    pub fn index_end(&self) -> u64 {
        self.index_offset + self.index_count * IndexEntry::LEN as u64
    }

    /// Returns the length of the whole file in bytes: zeros after the index fill the last page, because the kernel
    /// cannot read an incomplete last page.
    pub fn file_length(&self) -> u64 {
        self.index_end().next_multiple_of(PAGE_SIZE)
    }

    /// Encodes the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        self.preamble.encode(MAGIC, &mut out);
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.domain);
        out.extend_from_slice(&self.index_offset.to_le_bytes());
        out.extend_from_slice(&self.index_count.to_le_bytes());
        out.extend_from_slice(self.index_hash.bytes());
        out.resize(Self::LEN - 32, 0);
        seal(&mut out);
        out
    }

    /// Decodes a header.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not a header of this version, or if a length in the header is impossible.
    pub fn decode(bytes: &[u8]) -> Result<PackHeader, Invalid> {
        let bytes = bytes.get(..Self::LEN).ok_or_else(|| {
            Invalid::damage(format!(
                "truncated: length is {}, expected at least {} bytes",
                bytes.len(),
                Self::LEN
            ))
        })?;
        // Reports a wrong magic before a wrong checksum.
        Preamble::header_length(MAGIC, bytes)?;
        let mut fields = Fields(unseal(bytes)?);
        let preamble = Preamble::decode(MAGIC, &mut fields)?;
        let header = PackHeader {
            preamble,
            id: PackId(fields.array()?),
            domain: fields.array()?,
            index_offset: fields.u64()?,
            index_count: fields.u64()?,
            index_hash: Digest::new(fields.array()?),
        };
        let records_end = Self::LEN as u64..=MAX_PACK;
        if !records_end.contains(&header.index_offset)
            || header.index_count > MAX_PACK / IndexEntry::LEN as u64
        {
            return Err(Invalid::damage("impossible lengths in the header"));
        }
        if header.domain != [0; 16] {
            return Err(Invalid::Newer("unsupported dedup domain".into()));
        }
        Ok(header)
    }
}

/// One block of a pack. The index is sorted by hash and lists each hash once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// BLAKE3 of the plain block.
    pub hash: Digest,
    /// Location of the block's record.
    pub stored: Stored,
}

impl IndexEntry {
    /// Encoded length in bytes.
    pub const LEN: usize = 48;

    /// Appends the encoded entry to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.hash.bytes());
        self.stored.encode(out);
        out.extend_from_slice(&[0; 4]);
    }

    /// Decodes an entry from the first [`IndexEntry::LEN`] bytes.
    ///
    /// # Errors
    /// Returns [`Invalid`] if a field has an impossible value.
    pub fn decode(bytes: &[u8]) -> Result<IndexEntry, Invalid> {
        let mut fields = Fields(bytes);
        let entry = IndexEntry { hash: Digest::new(fields.array()?), stored: Stored::decode(&mut fields)? };
        fields.reserved(4)?;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::format::BlockKind;

    #[test]
    fn round_trips_a_header_and_detects_every_flipped_bit() {
        let header = PackHeader::new(PackId([9; 16]), 5000, 2, Digest::of(b"i"));
        let bytes = header.encode();
        assert_eq!(bytes.len(), PackHeader::LEN);
        assert_eq!(PackHeader::decode(&bytes).unwrap(), header);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(PackHeader::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn round_trips_an_index_entry() {
        let stored = Stored { offset: 256, length: 17, kind: BlockKind::Lz4, data_pages: 0x8001 };
        let entry = IndexEntry { hash: Digest::of(b"b"), stored };
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!(bytes.len(), IndexEntry::LEN);
        assert_eq!(IndexEntry::decode(&bytes).unwrap(), entry);
        for (at, value) in [(40, 0), (40, 4), (40, 9), (41, 11), (41, 17), (47, 1), (38, 2)] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            assert!(IndexEntry::decode(&bytes).is_err(), "byte {at} = {value}");
        }
        bytes[42..44].fill(0);
        assert!(IndexEntry::decode(&bytes).is_err(), "a stored block without data");
    }
}
