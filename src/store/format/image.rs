//! An image: what a template is. The digest of the template is the BLAKE3 hash of exactly these bytes.
//!
//! `header | file × n | block × m`; the files are sorted by name, their blocks follow one another in
//! the same order, 32 bytes each: the BLAKE3 hash of the plain block, or 32 zero bytes for a zero block.

use super::BLOCK_SHIFT;
use super::fields::{Fields, Invalid, Preamble};
use crate::store::reference::{MAX_NAME, check_name};
use crate::store::{BLOCK_SIZE, FileKind};

const MAGIC: &[u8; 8] = b"STNCLIMG";
const FIXED: usize = 96;
const FILE: usize = 32 + MAX_NAME;
const HASH_BLAKE3: u32 = 1;

/// Most files of a template: the header with all of them fits one segment of the hash tree.
pub const MAX_FILES: usize = 256;

/// Most bytes of all files together: what the 46 bits of a guest's physical address reach. Its table has 32 GiB, so that
/// also one of zeros only, which costs its sender nothing, is bounded.
pub const MAX_BYTES: u64 = 1 << 46;

/// Bytes per block in the table.
pub const HASH_LEN: u64 = 32;

/// Most blocks of all files together; the last block of each may be short.
pub const MAX_BLOCKS: u64 = MAX_BYTES / BLOCK_SIZE + MAX_FILES as u64;

/// Longest image.
pub const MAX_LENGTH: u64 = (FIXED + MAX_FILES * FILE) as u64 + MAX_BLOCKS * HASH_LEN;

/// One file as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Its name in the template.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes.
    pub size: u64,
    /// Number of its first block in the table.
    pub first_block: u64,
}

impl ImageFile {
    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }
}

/// What stands in front of the block table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageHeader {
    files: Vec<ImageFile>,
}

impl ImageHeader {
    /// The header for these files, already sorted by name, none twice.
    ///
    /// # Errors
    /// [`Invalid`] when a name, a size or the number of files is impossible.
    pub fn new(list: impl IntoIterator<Item = (String, FileKind, u64)>) -> Result<ImageHeader, Invalid> {
        let mut files: Vec<ImageFile> = Vec::new();
        let mut first_block = 0;
        let mut total: u64 = 0;
        for (name, kind, size) in list {
            check_name("file name", &name).map_err(|e| Invalid::damage(e.message()))?;
            if files.last().is_some_and(|last| last.name >= name) {
                return Err(Invalid::damage(format!("file '{name}' is out of order")));
            }
            total = total.saturating_add(size);
            if total > MAX_BYTES || files.len() == MAX_FILES {
                return Err(Invalid::damage(format!(
                    "file '{name}' is beyond what an image can hold: {MAX_FILES} files, {MAX_BYTES} bytes"
                )));
            }
            let file = ImageFile { name, kind, size, first_block };
            first_block += file.blocks();
            files.push(file);
        }
        if files.is_empty() {
            return Err(Invalid::damage("no file"));
        }
        Ok(ImageHeader { files })
    }

    /// The files, sorted by name.
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// Blocks of all files.
    pub fn block_count(&self) -> u64 {
        self.files.last().map_or(0, |last| last.first_block + last.blocks())
    }

    /// Where the block table of an image with so many files begins.
    pub fn table_offset(files: usize) -> u64 {
        (FIXED + files * FILE) as u64
    }

    /// Length of the whole image.
    pub fn image_length(&self) -> u64 {
        Self::table_offset(self.files.len()) + self.block_count() * HASH_LEN
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let length = Self::table_offset(self.files.len());
        let mut out = Vec::with_capacity(length as usize);
        Preamble::plain(length as u32).encode(MAGIC, &mut out);
        out.extend_from_slice(&BLOCK_SHIFT.to_le_bytes());
        out.extend_from_slice(&HASH_BLAKE3.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block_count().to_le_bytes());
        out.resize(FIXED, 0);
        for file in &self.files {
            let end = out.len() + FILE;
            out.extend_from_slice(&(file.kind as u32).to_le_bytes());
            out.extend_from_slice(&(file.name.len() as u32).to_le_bytes());
            out.extend_from_slice(&file.size.to_le_bytes());
            out.extend_from_slice(&[0; 16]);
            out.extend_from_slice(file.name.as_bytes());
            out.resize(end, 0);
        }
        out
    }

    /// From the beginning of an image. Compare the digest first: there is no other checksum.
    ///
    /// # Errors
    /// [`Invalid`] when the bytes are no image of this version.
    pub fn decode(bytes: &[u8]) -> Result<ImageHeader, Invalid> {
        let mut fields = Fields(bytes);
        let preamble = Preamble::decode(MAGIC, &mut fields)?;
        let (shift, hash, domain) = (fields.u32()?, fields.u32()?, fields.array::<16>()?);
        if shift != BLOCK_SHIFT || hash != HASH_BLAKE3 || domain != [0; 16] {
            return Err(Invalid::Newer(format!("blocks of 2^{shift} bytes, hash {hash}, or a dedup domain")));
        }
        let count = fields.u32()? as usize;
        fields.reserved(4)?;
        let blocks = fields.u64()?;
        fields.reserved(FIXED - Preamble::LEN - 40)?;
        if count > MAX_FILES || u64::from(preamble.header_length) != Self::table_offset(count) {
            return Err(Invalid::damage(format!(
                "{count} files in a header of {} bytes",
                preamble.header_length
            )));
        }
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            let (kind, name_length, size) = (fields.u32()?, fields.u32()? as usize, fields.u64()?);
            fields.reserved(16)?;
            let name = fields.bytes(MAX_NAME)?;
            let (name, padding) = name
                .split_at_checked(name_length)
                .ok_or_else(|| Invalid::damage(format!("a file name of {name_length} bytes")))?;
            Fields(padding).reserved(padding.len())?;
            let name = std::str::from_utf8(name).map_err(|_| Invalid::damage("a file name is no UTF-8"))?;
            list.push((name.to_owned(), FileKind::decode(kind)?, size));
        }
        let header = ImageHeader::new(list)?;
        if header.block_count() != blocks {
            return Err(Invalid::damage(format!("{blocks} blocks, its files have {}", header.block_count())));
        }
        Ok(header)
    }
}

impl FileKind {
    fn decode(number: u32) -> Result<FileKind, Invalid> {
        match number {
            0 => Ok(FileKind::Ram),
            1 => Ok(FileKind::Rom),
            2 => Ok(FileKind::Blob),
            _ => Err(Invalid::Newer(format!("file kind {number}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> ImageHeader {
        let files = [
            ("memory", FileKind::Ram, 3 * 65536 + 4096),
            ("rom", FileKind::Rom, 4096),
            ("state", FileKind::Blob, 0),
        ];
        ImageHeader::new(files.map(|(n, k, s)| (n.to_owned(), k, s))).unwrap()
    }

    #[test]
    fn round_trip() {
        let header = header();
        assert_eq!(header.block_count(), 5);
        assert_eq!(header.files()[1].first_block, 4);
        let bytes = header.encode();
        assert_eq!(bytes.len() as u64, ImageHeader::table_offset(3));
        assert_eq!(ImageHeader::decode(&bytes).unwrap(), header);
        assert!(ImageHeader::table_offset(MAX_FILES) <= 65536);
        assert_eq!(ImageHeader::table_offset(3) % HASH_LEN, 0);
    }

    #[test]
    fn damage_is_refused_or_changes_the_value_but_never_panics() {
        let bytes = header().encode();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                let _ = ImageHeader::decode(&bytes);
            }
        }
        for length in 0..bytes.len() {
            assert!(ImageHeader::decode(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn order_and_names_are_checked() {
        let new = |names: &[&str]| ImageHeader::new(names.iter().map(|n| (n.to_string(), FileKind::Blob, 1)));
        assert!(new(&["a", "b"]).is_ok());
        assert!(new(&["b", "a"]).is_err());
        assert!(new(&["a", "a"]).is_err());
        assert!(new(&["../a"]).is_err());
        assert!(new(&[]).is_err());
    }

    #[test]
    fn all_files_together_are_bounded() {
        let new = |sizes: [u64; 2]| {
            let names = ["a", "b"].map(str::to_owned);
            ImageHeader::new(names.into_iter().zip(sizes).map(|(n, s)| (n, FileKind::Blob, s)))
        };
        assert!(new([MAX_BYTES - 1, 1]).is_ok());
        assert!(new([MAX_BYTES, 1]).is_err());
        assert!(new([1, u64::MAX]).is_err());
    }
}
