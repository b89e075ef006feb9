//! Buffers of one thread for reading and verifying blocks.

use crate::error::Result;
use crate::store::disk::pack::{AlignedBuffer, PackFile};
use crate::store::format::Stored;
use crate::store::format::codec::{Decoder, Mismatch, page_mask};
use crate::store::{BLOCK_SIZE, Digest};
use crate::units::to_usize;

/// Reusable buffers for reads, one instance for each thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Number of blocks that the caller reads after the next one.
    pub(in crate::store) following: u64,
    pub(in crate::store) buffer: AlignedBuffer,
    pub(in crate::store) decoder: Decoder,
    pub(in crate::store) plain: Vec<u8>,
}

impl Scratch {
    /// Announces that the caller reads this number of blocks after the next one, in order. One access to the disk then
    /// reads the records of several blocks that lie next to each other in their pack.
    pub fn announce(&mut self, following: u64) {
        self.following = following;
    }

    /// Reads a record from a pack and verifies its block against the hash. Returns the record.
    pub(in crate::store) fn verify(
        &mut self,
        pack: &PackFile,
        stored: Stored,
        hash: &Digest,
    ) -> Result<&[u8]> {
        let Scratch { buffer, decoder, plain, .. } = self;
        // A verification reads from the disk and not from the buffer of an earlier read.
        buffer.forget();
        let record = pack.record(stored, stored.range().end, buffer)?;
        check(decoder, plain, record, stored, hash).map_err(|why| pack.mismatch(stored, &why))?;
        Ok(record)
    }

    /// Verifies the block in `record`, which is not yet in a pack, against its hash. Returns the plain block.
    pub(in crate::store) fn check(
        &mut self,
        record: &[u8],
        stored: Stored,
        hash: &Digest,
    ) -> std::result::Result<&[u8], Mismatch> {
        check(&mut self.decoder, &mut self.plain, record, stored, hash)?;
        Ok(&self.plain)
    }

    /// Returns the plain block of the last verification.
    pub(in crate::store) fn plain(&self) -> &[u8] {
        &self.plain
    }
}

fn check(
    decoder: &mut Decoder,
    plain: &mut Vec<u8>,
    record: &[u8],
    stored: Stored,
    hash: &Digest,
) -> std::result::Result<(), Mismatch> {
    plain.resize(to_usize(BLOCK_SIZE), 0);
    decoder.block(stored.kind, record, hash, plain)?;
    match page_mask(plain) {
        mask if mask == stored.data_pages => Ok(()),
        mask => Err(format!("its page mask is {mask:#x}, expected {:#x}", stored.data_pages)),
    }
}
