//! Images for kernel decode: what the kernel needs to read a file of a template out of the store's packs.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::store::disk::seal::open_sealed;
use crate::store::format::codec::Encoder;
use crate::store::format::erofs::{self, Device, Extent, Record};
use crate::store::format::{Invalid, PackId, Stored};
use crate::store::{BLOCK_SIZE, Store, Template};
use crate::units::{PAGE_SIZE, to_usize};

/// Name of the file in an image for kernel decode.
pub const KERNEL_IMAGE_FILE: &str = erofs::FILE_NAME;

impl Template {
    /// Returns the EROFS metadata of a file: mounted with the packs of [`Store::sealed_packs`] as its devices,
    /// it holds the file under the name [`KERNEL_IMAGE_FILE`].
    ///
    /// The image is made from the tables, which are verified. The bytes that the kernel decodes are not verified: the
    /// caller must compare them with the hashes before another process reads them, and the packs must not change
    /// afterwards.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if a table is damaged, the errors of [`Store::check_reachable`],
    /// and an error if the template has too many or too large packs.
    pub fn kernel_image(&self, file: usize) -> Result<Vec<u8>> {
        let size = self.files().get(file).map_or(0, |f| f.size.get());
        let (devices, extents) = self.with_places(file, |places| {
            let mut devices =
                Devices { store: self.store(), all: Vec::new(), indices: HashMap::new(), last: None };
            let mut extents = Vec::with_capacity(to_usize(self.block_count(file)));
            for (block, place) in (0..).zip(places) {
                let start = block * BLOCK_SIZE;
                match place? {
                    None => push_zeros(&mut extents, start),
                    Some((_, pack, stored)) => extents.push(extent(start, devices.index(pack)?, stored)),
                }
            }
            Ok((devices.all, extents))
        })?;
        erofs::encode(size, &devices, &extents).map_err(|e| match e {
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
    /// Returns [`Code::NotFound`](crate::error::Code) if a pack is gone, or an error if the file is not an image or a
    /// pack cannot be sealed.
    pub fn sealed_packs(&self, image: &File) -> Result<Vec<File>> {
        let read = |range: Range<usize>| {
            let mut bytes = vec![0; range.len()];
            image
                .read_exact_at(&mut bytes, range.start as u64)
                .map_err(|e| Error::failed("cannot read an image for kernel decode").because(e))?;
            Ok::<_, Error>(bytes)
        };
        let table = erofs::device_table(&read(0..erofs::HEAD)?).map_err(cannot_decode)?;
        erofs::packs(&read(table)?).into_iter().map(|id| open_sealed(&self.packs().path(id))).collect()
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
    /// Makes the image: records of all codecs at offsets that are no multiples of a page, zeros in between, and a last
    /// block that ends with the file.
    ///
    /// # Errors
    /// Returns an error if libzstd cannot allocate its tables.
    pub fn new() -> Result<KernelProbe> {
        let (mut plain, mut device, mut extents) = (Vec::new(), vec![0; 999], Vec::new());
        let block = to_usize(BLOCK_SIZE);
        for codec in ["none", "lz4", "zstd"] {
            let start = plain.len() as u64;
            // Half of the block has few different bytes, so that it shrinks.
            plain.extend((0..block).map(|at| {
                let mixed = (at as u64 ^ start).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
                if at % 8192 < 4096 { mixed[0] } else { mixed[0] & 3 }
            }));
            let mut record = Vec::new();
            let kind = Encoder::new(codec.parse()?)?.encode(&plain[to_usize(start)..][..block], &mut record);
            let offset = u32::try_from(device.len()).unwrap_or(u32::MAX);
            let length = u32::try_from(record.len()).unwrap_or(u32::MAX);
            extents.push(extent(start, 0, Stored { offset, length, kind, data_pages: u16::MAX }));
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
    /// The pack of the last call, as most neighbouring blocks are in the same pack.
    last: Option<(PackId, usize)>,
}

impl Devices<'_> {
    fn index(&mut self, pack: PackId) -> Result<usize> {
        if let Some((last, index)) = self.last
            && last == pack
        {
            return Ok(index);
        }
        let index = match self.indices.get(&pack) {
            Some(index) => *index,
            None => self.add(pack)?,
        };
        self.last = Some((pack, index));
        Ok(index)
    }

    fn add(&mut self, pack: PackId) -> Result<usize> {
        let path = self.store.packs().path(pack);
        let stat = path.metadata().map_err(|e| path.error("cannot inspect pack", e))?;
        let index = self.all.len();
        self.all.push(Device { pack, length: u64::try_from(stat.st_size).unwrap_or(0) });
        self.indices.insert(pack, index);
        Ok(index)
    }
}

fn push_zeros(extents: &mut Vec<Extent>, start: u64) {
    // An extent of zeros reaches to the next extent.
    if extents.last().is_none_or(|last| last.record.is_some()) {
        extents.push(Extent { start, record: None });
    }
}

/// Returns the extent of the block at `start` of the file.
fn extent(start: u64, device: usize, stored: Stored) -> Extent {
    let Stored { offset, length, kind, .. } = stored;
    Extent { start, record: Some(Record { device, offset: offset.into(), length, kind }) }
}

fn cannot_decode(invalid: Invalid) -> Error {
    let (Invalid::Damage(why) | Invalid::Newer(why)) = invalid;
    Error::failed(why)
}
