//! Images for kernel decode: what the kernel needs to read a file of a template out of the store's packs.

use std::collections::HashMap;
use std::fs::File;

use crate::error::{Error, Result};
use crate::store::disk::pack::AlignedBuffer;
use crate::store::disk::seal::open_sealed;
use crate::store::format::codec::Encoder;
use crate::store::format::erofs::{self, Device, Extent, Record};
use crate::store::format::{BlockKind, CHUNK_ENTRY, Invalid, ONE_PIECE, PackId, Stored};
use crate::store::{BLOCK_SIZE, Store, Template};
use crate::units::{PAGE_SIZE, to_usize};

/// Name of the file in an image for kernel decode.
pub const KERNEL_IMAGE_FILE: &str = erofs::FILE_NAME;

impl Template {
    /// Returns the EROFS metadata of a file: mounted with the packs of [`Store::sealed_packs`] as its devices,
    /// it holds the file under the name [`KERNEL_IMAGE_FILE`].
    ///
    /// The image is made from the tables, which are verified. The bytes that the kernel decodes are not: the caller
    /// must compare them with the hashes before another process reads them, and the packs must not change afterwards.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if a table or a record in sub-chunks is damaged, the errors of
    /// [`Store::check_reachable`], and an error if the template has too many or too large packs.
    pub fn kernel_image(&self, file: usize) -> Result<Vec<u8>> {
        let size = self.files().get(file).map_or(0, |f| f.size.get());
        let mut devices = Devices { store: self.store(), all: Vec::new(), indices: HashMap::new() };
        let mut extents: Vec<Extent> = Vec::new();
        let mut buffer = AlignedBuffer::default();
        for block in 0..self.block_count(file) {
            let start = block * BLOCK_SIZE;
            match self.place(file, block)? {
                None => push_zeros(&mut extents, start),
                Some((_, pack, stored)) => {
                    let device = devices.index(pack)?;
                    let place = Place { start, device, pack, stored };
                    place.extents(|| place.read(self.store(), &mut buffer), &mut extents)?;
                }
            }
        }
        erofs::encode(size, &devices.all, &extents).map_err(|e| match e {
            Invalid::Damage(why) | Invalid::Newer(why) => Error::failed(format!(
                "the kernel cannot decode file {file} of template {}: {why}",
                self.digest()
            )),
        })
    }
}

impl Store {
    /// Opens and seals the packs that an image for kernel decode names, in the order of its devices. The image may come
    /// from a process that is not trusted: only packs of this store are opened.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if a pack is gone, or an error if the bytes are not an image or a
    /// pack cannot be sealed.
    pub fn sealed_packs(&self, image: &[u8]) -> Result<Vec<File>> {
        let ids = erofs::packs(image).map_err(cannot_decode)?;
        ids.into_iter().map(|id| open_sealed(&self.packs().path(id))).collect()
    }
}

/// A small image with every kind of record, with which a host can be probed.
#[derive(Debug)]
pub struct KernelProbe {
    /// The EROFS metadata, for a single device.
    pub metadata: Vec<u8>,
    /// The bytes of the device.
    pub device: Vec<u8>,
    /// The bytes of the file.
    pub plain: Vec<u8>,
}

impl KernelProbe {
    /// Makes the image: records of all codecs, whole and in sub-chunks, at offsets that are no multiples of a page;
    /// zeros in between; and a last block that ends with the file.
    ///
    /// # Errors
    /// Returns an error if libzstd cannot allocate its tables.
    pub fn new() -> Result<KernelProbe> {
        let (mut plain, mut device, mut extents) = (Vec::new(), vec![0; 999], Vec::new());
        let block = to_usize(BLOCK_SIZE);
        for (codec, chunk) in
            [("none", "64k"), ("lz4", "64k"), ("zstd", "64k"), ("lz4", "16k"), ("zstd", "4k")]
        {
            let start = plain.len() as u64;
            // Half of the block has few different bytes, so that it shrinks.
            plain.extend((0..block).map(|at| {
                let mixed = (at as u64 ^ start).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
                if at % 8192 < 4096 { mixed[0] } else { mixed[0] & 3 }
            }));
            // A sub-chunk of zeros.
            plain[to_usize(start)..][16384..32768].fill(0);
            let mut record = Vec::new();
            let (kind, chunk_shift) = Encoder::new(codec.parse()?, chunk.parse()?)?
                .encode(&plain[to_usize(start)..][..block], &mut record);
            let offset = u32::try_from(device.len()).unwrap_or(u32::MAX);
            let length = u32::try_from(record.len()).unwrap_or(u32::MAX);
            let stored = Stored { offset, length, kind, chunk_shift, data_pages: u16::MAX };
            let place = Place { start, device: 0, pack: PackId([0; 16]), stored };
            place.extents(|| Ok(record.clone()), &mut extents)?;
            device.append(&mut record);
            push_zeros(&mut extents, plain.len() as u64);
            plain.resize(plain.len() + block, 0);
        }
        // The file ends within the block of zeros, and again within a block with data.
        let first = extents[0];
        extents.push(Extent { start: plain.len() as u64, ..first });
        plain.extend_from_within(..block - 5000);
        device.resize(device.len().next_multiple_of(to_usize(PAGE_SIZE)), 0);
        let all = [Device { pack: PackId([0; 16]), length: device.len() as u64 }];
        let metadata = erofs::encode(plain.len() as u64, &all, &extents).map_err(cannot_decode)?;
        Ok(KernelProbe { metadata, device, plain })
    }
}

/// The packs of an image, in the order of their first use.
struct Devices<'a> {
    store: &'a Store,
    all: Vec<Device>,
    indices: HashMap<PackId, usize>,
}

impl Devices<'_> {
    fn index(&mut self, pack: PackId) -> Result<usize> {
        if let Some(index) = self.indices.get(&pack) {
            return Ok(*index);
        }
        let path = self.store.packs().path(pack);
        let stat = path.metadata().map_err(|e| path.error("cannot inspect pack", e))?;
        let index = self.all.len();
        self.all.push(Device { pack, length: u64::try_from(stat.st_size).unwrap_or(0) });
        self.indices.insert(pack, index);
        Ok(index)
    }
}

fn push_zeros(extents: &mut Vec<Extent>, start: u64) {
    // Zeros last until the next extent.
    if extents.last().is_none_or(|last| last.record.is_some()) {
        extents.push(Extent { start, record: None });
    }
}

/// Location of the record of a block with data.
struct Place {
    start: u64,
    device: usize,
    pack: PackId,
    stored: Stored,
}

impl Place {
    /// Returns the extent of the part of the record at `within`, whose decoded bytes begin at `skip` in the block.
    fn extent(&self, kind: BlockKind, within: u64, length: u32, skip: u64, decoded: u64) -> Extent {
        let offset = u64::from(self.stored.offset) + within;
        let record = Record { device: self.device, offset, length, kind, decoded };
        Extent { start: self.start + skip, record: Some(record) }
    }

    /// Appends the extents of the record. `read` returns the bytes of the record, which has a table of its sub-chunks if
    /// it is not in one piece.
    fn extents(&self, read: impl FnOnce() -> Result<Vec<u8>>, extents: &mut Vec<Extent>) -> Result<()> {
        if self.stored.chunk_shift == ONE_PIECE {
            extents.push(self.extent(self.stored.kind, 0, self.stored.length, 0, BLOCK_SIZE));
            return Ok(());
        }
        let record = read()?;
        let size = 1u32 << self.stored.chunk_shift;
        let count = to_usize(BLOCK_SIZE / u64::from(size));
        let lengths = record.get(..count * 2).ok_or_else(|| {
            Error::damage(format!("a record of pack {} has no table of sub-chunks", self.pack))
        })?;
        let mut within = u64::from(CHUNK_ENTRY) * count as u64;
        for (index, length) in (0u64..).zip(lengths.as_chunks::<2>().0) {
            let length = u32::from(u16::from_le_bytes(*length));
            let skip = index * u64::from(size);
            match length {
                0 => push_zeros(extents, self.start + skip),
                _ => {
                    let kind = if length == size { BlockKind::Raw } else { self.stored.kind };
                    extents.push(self.extent(kind, within, length, skip, size.into()));
                }
            }
            within += u64::from(length);
        }
        Ok(())
    }

    fn read(&self, store: &Store, buffer: &mut AlignedBuffer) -> Result<Vec<u8>> {
        let record = store.pack(self.pack)?.record(self.stored, buffer).map(<[u8]>::to_vec);
        record.map_err(|e| store.unreadable(self.pack, e))
    }
}

fn cannot_decode(invalid: Invalid) -> Error {
    let (Invalid::Damage(why) | Invalid::Newer(why)) = invalid;
    Error::failed(why)
}
