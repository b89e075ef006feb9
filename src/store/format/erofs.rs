//! EROFS metadata with which the kernel decodes a file of a template out of the packs (kernel decode).
//!
//! The image holds one file, [`FILE_NAME`], and no data: the packs are its extra devices. Each record of a pack is an
//! *encoded extent*, addressed by byte (feature `48bit`, Linux 6.15). The layout of the structures is that of
//! `fs/erofs/erofs_fs.h`.
//!
//! ```text
//!   0     1024        1152            4096            meta            meta + 4096
//!   ┌─────┬───────────┬───────────────┬───────────────┬───────────────┬────────────────────────────┐
//!   │     │ superblock│ configuration │ device slots: │ root directory│ inode of the file, extents │
//!   │     │           │ of the codecs │ one per pack  │ (inode, names)│                            │
//!   └─────┴───────────┴───────────────┴───────────────┴───────────────┴────────────────────────────┘
//! ```

use std::ops::Range;

use super::{BLOCK_SIZE, BlockKind, Invalid, PackId};
use crate::units::{PAGE_SIZE, to_usize};

/// Name of the file in the root directory of the image.
pub const FILE_NAME: &str = "file";

/// Size of a block of the image in bytes.
const BLOCK: u64 = 1 << BLOCK_BITS;
const BLOCK_BITS: u8 = 12;
const _: () = assert!(BLOCK == PAGE_SIZE);

const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
/// `ZERO_PADDING | COMPR_CFGS | DEVICE_TABLE | 48BIT`.
const INCOMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x80;
/// Offset of the feature words in the superblock.
const FEATURES: usize = SUPERBLOCK + 80;
/// Bits of the codecs in `available_compr_algs`, and their numbers in an extent.
const LZ4: u16 = 0;
const ZSTD: u16 = 3;
/// Offset of the configuration of the codecs.
const CODECS: usize = SUPERBLOCK + 128;
/// Longest record in blocks of the image, at any offset.
const MAX_RECORD_BLOCKS: u16 = 17;
/// Binary logarithm of the largest window of a Zstandard frame, minus 10.
const ZSTD_WINDOW: u8 = 7;

/// Offset and length of a device slot.
const DEVICES: usize = to_usize(BLOCK);
const DEVICE: usize = 128;

/// Unit of inode numbers (`nid`) in bytes.
const SLOT: u64 = 32;
const INODE: usize = 64;
/// Layouts of inodes: compressed with a full index, plain data behind the inode.
const COMPRESSED_FULL: u16 = 1;
const FLAT_INLINE: u16 = 2;
/// Length of an extent, and the bits of `h_advise` that stand for encoded extents of that length.
const EXTENT: usize = 32;
const ADVISE: u16 = 0x1 | 3 << 1;
/// The end of the decoded record lies beyond the end of the file.
const PARTIAL: u32 = 1 << 27;
const CODEC_SHIFT: u32 = 28;

/// A pack as a device of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// The pack.
    pub pack: PackId,
    /// Length of the pack in bytes. The kernel cannot read an incomplete last page.
    pub length: u64,
}

/// The bytes of the file from `start` to the start of the next extent, and their record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file in bytes.
    pub start: u64,
    /// The record; `None` for zeros.
    pub record: Option<Record>,
}

/// The record of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Index of the device.
    pub device: usize,
    /// Offset in the device in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
    /// Codec. The decoded record has the length of a block.
    pub kind: BlockKind,
}

/// Returns the image of a file with `size` bytes. The extents are in order, and the first starts at 0. Extents beyond
/// the end of the file are left out: the kernel takes them for damage.
///
/// # Errors
/// Returns [`Invalid`] if the file has too many packs, or packs that are too large together (16 TiB).
pub fn encode(size: u64, devices: &[Device], extents: &[Extent]) -> Result<Vec<u8>, Invalid> {
    let extents = &extents[..extents.partition_point(|extent| extent.start < size)];
    let too_large = || Invalid::Newer("more packs than kernel decode supports".into());
    let count = u16::try_from(devices.len()).map_err(|_| too_large())?;
    let meta = (DEVICES + devices.len() * DEVICE).next_multiple_of(to_usize(BLOCK)) as u64;
    let inode = meta + BLOCK;
    let table = (inode + INODE as u64 + 8).next_multiple_of(EXTENT as u64);
    let length = (table + (extents.len() * EXTENT) as u64).next_multiple_of(BLOCK);
    let mut image = Image(vec![0; to_usize(length)]);

    let mut addresses = Vec::with_capacity(devices.len());
    let mut next = length / BLOCK;
    for (slot, device) in devices.iter().enumerate() {
        let blocks = device.length.div_ceil(BLOCK);
        let at = DEVICES + slot * DEVICE;
        image.put(at, &device.pack.0);
        image.put(at + 64, &u32::try_from(blocks).map_err(|_| too_large())?.to_le_bytes());
        image.put(at + 68, &u32::try_from(next).map_err(|_| too_large())?.to_le_bytes());
        addresses.push(next * BLOCK);
        next += blocks;
    }
    u32::try_from(next).map_err(|_| too_large())?;

    let root = meta + SLOT;
    let number = |offset: u64| (offset - meta) / SLOT;
    image.superblock(length / BLOCK, meta / BLOCK, number(root), count);
    image.root(to_usize(root), number(root), number(inode));
    image.inode(to_usize(inode), COMPRESSED_FULL, 0o100_444, size, stored_blocks(extents));
    let header = to_usize(inode) + INODE;
    image.put(header, &u32::try_from(extents.len()).map_err(|_| too_large())?.to_le_bytes());
    image.put(header + 4, &ADVISE.to_le_bytes());
    for (index, extent) in extents.iter().enumerate() {
        image.extent(to_usize(table) + index * EXTENT, extent, size, &addresses);
    }
    Ok(image.0)
}

/// Number of blocks of the image that the records occupy, for the count of `st_blocks`.
fn stored_blocks(extents: &[Extent]) -> u32 {
    let blocks: u64 =
        extents.iter().filter_map(|e| e.record).map(|r| u64::from(r.length).div_ceil(BLOCK)).sum();
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

/// Length of the part of an image that [`device_table`] needs, in bytes.
pub const HEAD: usize = DEVICES;

/// Returns the range of an image that holds the packs, in bytes. `head` is the start of the image, which another
/// process may have written.
///
/// # Errors
/// Returns [`Invalid`] if the bytes are not the start of an image.
pub fn device_table(head: &[u8]) -> Result<Range<usize>, Invalid> {
    let malformed = || Invalid::damage("not an image for kernel decode");
    let head = head.get(..HEAD).ok_or_else(malformed)?;
    if head[SUPERBLOCK..][..4] != MAGIC.to_le_bytes() {
        return Err(malformed());
    }
    let count = head[FEATURES + 6..][..2].iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte));
    Ok(DEVICES..DEVICES + count * DEVICE)
}

/// Returns the packs of an image with this device table, in the order of its devices.
pub fn packs(device_table: &[u8]) -> Vec<PackId> {
    let (slots, _) = device_table.as_chunks::<DEVICE>();
    slots.iter().map(|slot| PackId(slot[..16].try_into().unwrap_or_default())).collect()
}

struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn superblock(&mut self, blocks: u64, meta: u64, root: u64, devices: u16) {
        self.put(SUPERBLOCK, &MAGIC.to_le_bytes());
        self.put(SUPERBLOCK + 12, &[BLOCK_BITS]);
        // Number of inodes.
        self.put(SUPERBLOCK + 16, &2u64.to_le_bytes());
        self.put(SUPERBLOCK + 36, &low(blocks));
        self.put(SUPERBLOCK + 40, &low(meta));
        self.put(FEATURES, &INCOMPATIBLE.to_le_bytes());
        self.put(FEATURES + 4, &(1 << LZ4 | 1u16 << ZSTD).to_le_bytes());
        self.put(FEATURES + 6, &devices.to_le_bytes());
        let slot = (DEVICES / DEVICE) as u64;
        self.put(FEATURES + 8, &low(slot)[..2]);
        self.put(FEATURES + 32, &root.to_le_bytes());
        // LZ4: the length of the configuration, the default distance, the longest record.
        self.put(CODECS, &14u16.to_le_bytes());
        self.put(CODECS + 4, &MAX_RECORD_BLOCKS.to_le_bytes());
        // Zstandard: the length of the configuration, the format, the window.
        self.put(CODECS + 16, &6u16.to_le_bytes());
        self.put(CODECS + 19, &[ZSTD_WINDOW]);
    }

    fn inode(&mut self, at: usize, layout: u16, mode: u16, size: u64, blocks: u32) {
        // Bit 0: the long form of an inode.
        self.put(at, &(1 | layout << 1).to_le_bytes());
        self.put(at + 4, &mode.to_le_bytes());
        self.put(at + 8, &size.to_le_bytes());
        self.put(at + 16, &blocks.to_le_bytes());
        self.put(at + 20, &1u32.to_le_bytes());
        self.put(at + 44, &1u32.to_le_bytes());
    }

    fn root(&mut self, at: usize, root: u64, file: u64) {
        const DIRECTORY: u8 = 2;
        const REGULAR: u8 = 1;
        let entries = [(".", root, DIRECTORY), ("..", root, DIRECTORY), (FILE_NAME, file, REGULAR)];
        let mut names = Vec::new();
        let mut data = Vec::new();
        for (name, number, kind) in entries {
            data.extend_from_slice(&number.to_le_bytes());
            let offset = (entries.len() * 12 + names.len()) as u64;
            data.extend_from_slice(&low(offset)[..2]);
            data.extend_from_slice(&[kind, 0]);
            names.extend_from_slice(name.as_bytes());
        }
        data.append(&mut names);
        self.inode(at, FLAT_INLINE, 0o040_555, data.len() as u64, 0);
        self.put(at + INODE, &data);
    }

    fn extent(&mut self, at: usize, extent: &Extent, size: u64, addresses: &[u64]) {
        if let Some(record) = extent.record {
            let codec = match record.kind {
                BlockKind::Zero | BlockKind::Raw => 0,
                BlockKind::Lz4 => u32::from(LZ4) + 1,
                BlockKind::Zstd => u32::from(ZSTD) + 1,
            };
            let partial = if extent.start + BLOCK_SIZE > size { PARTIAL } else { 0 };
            let address = addresses.get(record.device).copied().unwrap_or_default() + record.offset;
            self.put(at, &(record.length | codec << CODEC_SHIFT | partial).to_le_bytes());
            self.put(at + 4, &address.to_le_bytes());
        }
        self.put(at + 12, &extent.start.to_le_bytes());
    }
}

/// Returns the low 32 bits of a number whose other bits are zero.
fn low(number: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = number.to_le_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u8, length: u64) -> Device {
        Device { pack: PackId([number; 16]), length }
    }

    #[test]
    fn packs_are_read_back_in_order_and_malformed_images_are_refused() {
        let devices = [device(7, 4096), device(9, 1 << 20), device(8, 5)];
        let record = Record { device: 1, offset: 300, length: 77, kind: BlockKind::Lz4 };
        let extents = [Extent { start: 0, record: Some(record) }, Extent { start: 1 << 16, record: None }];
        let image = encode(1 << 20, &devices, &extents).unwrap();
        assert_eq!(packs(&image[device_table(&image).unwrap()]), devices.map(|d| d.pack));
        for length in 0..HEAD {
            assert!(device_table(&image[..length]).is_err(), "{length}");
        }
        let mut foreign = image;
        foreign[SUPERBLOCK] ^= 1;
        assert!(device_table(&foreign).is_err());
        assert!(device_table(&encode(1, &[], &[]).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn images_beyond_the_limits_of_the_format_are_refused() {
        let many = vec![device(1, 1); usize::from(u16::MAX) + 1];
        assert!(encode(1, &many, &[]).is_err());
        assert!(encode(1, &many[1..], &[]).is_ok());
        assert!(encode(1, &[device(1, 16 << 40)], &[]).is_err());
        assert!(encode(1, &[device(1, 8 << 40), device(2, 9 << 40)], &[]).is_err());
    }
}
