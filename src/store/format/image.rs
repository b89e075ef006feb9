//! The image: names, kinds, sizes and block hashes of a template's files. The digest of the template is the BLAKE3 hash
//! of the image's bytes.
//!
//! Layout: `header | file × n | block × m`. The files are sorted by name, and their blocks follow in the same order, 32
//! bytes each: the BLAKE3 hash of the plain block, or 32 zero bytes for a zero block.

use super::BLOCK_SHIFT;
use super::fields::{Fields, Invalid, Preamble, in_header};
use super::name::{MAX_NAME, check_name};
use crate::store::{BLOCK_SIZE, FileKind};
use crate::units::to_usize;

const MAGIC: &[u8; 8] = b"STNCLIMG";
const FIXED: usize = 96;
const FILE: usize = 32 + MAX_NAME;
const HASH_BLAKE3: u32 = 1;

/// Maximum number of files of a template. The header with all of them fits in one 64 KiB segment of the hash tree.
pub const MAX_FILES: usize = 256;

/// Maximum size in bytes of all files together: the reach of a 46-bit guest physical address. The block table of such
/// an image has 32 GiB. The limit also bounds an image of zero blocks only, which is cheap to send.
pub const MAX_BYTES: u64 = 1 << 46;

/// Bytes of one block in the table.
pub const HASH_LEN: u64 = 32;

/// Maximum number of blocks of all files together; the last block of each file may be short.
pub const MAX_BLOCKS: u64 = MAX_BYTES / BLOCK_SIZE + MAX_FILES as u64;

/// Maximum length of an image in bytes.
pub const MAX_LENGTH: u64 = (FIXED + MAX_FILES * FILE) as u64 + MAX_BLOCKS * HASH_LEN;

/// One file in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Name of the file.
    pub name: String,
    /// Kind of the file.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Index of the file's first block in the table.
    pub first_block: u64,
}

impl ImageFile {
    /// Returns the number of blocks.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }
}

/// The part of an image before the block table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageHeader {
    files: Vec<ImageFile>,
}

impl ImageHeader {
    /// Creates the header for these files, which must be sorted by name without duplicates.
    ///
    /// # Errors
    /// Returns [`Invalid`] if a name, a size or the number of files is not allowed.
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
                    "file '{name}' exceeds the limits of an image: {MAX_FILES} files, {MAX_BYTES} bytes"
                )));
            }
            let file = ImageFile { name, kind, size, first_block };
            first_block += file.blocks();
            files.push(file);
        }
        if files.is_empty() {
            return Err(Invalid::damage("no files"));
        }
        Ok(ImageHeader { files })
    }

    /// Returns the files, sorted by name.
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// Returns the number of blocks of all files.
    pub fn block_count(&self) -> u64 {
        self.files.last().map_or(0, |last| last.first_block + last.blocks())
    }

    /// Returns the offset in bytes of the block table in an image with this number of files.
    pub fn table_offset(files: usize) -> u64 {
        (FIXED + files * FILE) as u64
    }

    /// Returns the length of the whole image in bytes.
    pub fn image_length(&self) -> u64 {
        Self::table_offset(self.files.len()) + self.block_count() * HASH_LEN
    }

    /// Encodes the header.
    pub fn encode(&self) -> Vec<u8> {
        let length = to_usize(Self::table_offset(self.files.len()));
        let mut out = Vec::with_capacity(length);
        Preamble::plain(length).encode(MAGIC, &mut out);
        out.extend_from_slice(&BLOCK_SHIFT.to_le_bytes());
        out.extend_from_slice(&HASH_BLAKE3.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(&in_header(self.files.len()).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block_count().to_le_bytes());
        out.resize(FIXED, 0);
        for file in &self.files {
            let end = out.len() + FILE;
            out.extend_from_slice(&(file.kind as u32).to_le_bytes());
            out.extend_from_slice(&in_header(file.name.len()).to_le_bytes());
            out.extend_from_slice(&file.size.to_le_bytes());
            out.extend_from_slice(&[0; 16]);
            out.extend_from_slice(file.name.as_bytes());
            out.resize(end, 0);
        }
        out
    }

    /// Decodes the header at the start of an image. The caller must verify the digest first: the image has no other
    /// checksum.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not an image of this version.
    pub fn decode(bytes: &[u8]) -> Result<ImageHeader, Invalid> {
        let mut fields = Fields(bytes);
        let preamble = Preamble::decode(MAGIC, &mut fields)?;
        let (shift, hash, domain) = (fields.u32()?, fields.u32()?, fields.array::<16>()?);
        if shift != BLOCK_SHIFT || hash != HASH_BLAKE3 || domain != [0; 16] {
            return Err(Invalid::Newer(format!(
                "unsupported block size 2^{shift}, block hash {hash} or dedup domain"
            )));
        }
        let count = fields.u32()? as usize;
        fields.reserved(4)?;
        let blocks = fields.u64()?;
        fields.reserved(FIXED - Preamble::LEN - 40)?;
        if count > MAX_FILES || u64::from(preamble.header_length) != Self::table_offset(count) {
            return Err(Invalid::damage(format!(
                "a header of {} bytes does not fit {count} files",
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
                .ok_or_else(|| Invalid::damage(format!("file name of {name_length} bytes is too long")))?;
            Fields(padding).reserved(padding.len())?;
            let name =
                std::str::from_utf8(name).map_err(|_| Invalid::damage("a file name is not valid UTF-8"))?;
            list.push((name.to_owned(), FileKind::decode(kind)?, size));
        }
        let header = ImageHeader::new(list)?;
        if header.block_count() != blocks {
            return Err(Invalid::damage(format!(
                "number of blocks is {blocks}, expected {} for the files",
                header.block_count()
            )));
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
            _ => Err(Invalid::Newer(format!("unsupported file kind {number}"))),
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
    fn round_trips_a_header() {
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
    fn never_panics_on_damage() {
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
    fn checks_order_and_names() {
        let new = |names: &[&str]| ImageHeader::new(names.iter().map(|n| (n.to_string(), FileKind::Blob, 1)));
        assert!(new(&["a", "b"]).is_ok());
        assert!(new(&["b", "a"]).is_err());
        assert!(new(&["a", "a"]).is_err());
        assert!(new(&["../a"]).is_err());
        assert!(new(&[]).is_err());
    }

    #[test]
    fn limits_the_total_size() {
        let new = |sizes: [u64; 2]| {
            let names = ["a", "b"].map(str::to_owned);
            ImageHeader::new(names.into_iter().zip(sizes).map(|(n, s)| (n, FileKind::Blob, s)))
        };
        assert!(new([MAX_BYTES - 1, 1]).is_ok());
        assert!(new([MAX_BYTES, 1]).is_err());
        assert!(new([1, u64::MAX]).is_err());
    }
}
