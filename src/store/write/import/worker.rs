//! Import workers: hash, look up and compress batches, on every core.

use super::batch::{Batch, Block, Outcome};
use super::diff::BaseMemory;
use super::request::ImportRequest;
use crate::error::Result;
use crate::store::format::codec::{Encoder, page_mask};
use crate::store::write::block_index::BlockIndex;
use crate::store::{BLOCK_SIZE, Digest, Scratch};
use crate::units::to_usize;

/// The encoder and the buffers that a worker reuses between batches.
pub(super) struct Worker {
    encoder: Encoder,
    scratch: Scratch,
    /// A block of the base.
    buffer: Vec<u8>,
}

impl Worker {
    pub fn new(request: &ImportRequest) -> Result<Worker> {
        let encoder = Encoder::new(request.compression)?;
        Ok(Worker { encoder, scratch: Scratch::default(), buffer: vec![] })
    }

    /// Completes the blocks of a diff from its base, and fills the records and the results of a batch.
    pub fn process(
        &mut self,
        batch: &mut Batch,
        index: &BlockIndex,
        base: Option<&BaseMemory>,
    ) -> Result<()> {
        let Batch { plain, length, first_block, base_pages, records, blocks } = batch;
        records.clear();
        blocks.clear();
        let padded = length.next_multiple_of(to_usize(BLOCK_SIZE));
        plain[*length..padded].fill(0);
        for (base_pages, (number, block)) in
            base_pages.iter().zip((*first_block..).zip(plain.chunks_exact_mut(to_usize(BLOCK_SIZE))))
        {
            if let Some(base) = base.filter(|_| *base_pages != 0) {
                base.complete(number, *base_pages, block, (&mut self.scratch, &mut self.buffer))?;
            }
        }
        for block in plain[..padded].chunks_exact(to_usize(BLOCK_SIZE)) {
            let data_pages = page_mask(block);
            let outcome = if data_pages == 0 {
                Outcome::Zero
            } else {
                let hash = Digest::of(block);
                match index.find(&hash, &mut self.scratch) {
                    Some(place) => Outcome::Stored(hash, place),
                    None => {
                        let start = records.len();
                        let kind = self.encoder.encode(block, records);
                        Outcome::New { hash, kind, record: start..records.len() }
                    }
                }
            };
            blocks.push(Block { data_pages, outcome });
        }
        Ok(())
    }
}
