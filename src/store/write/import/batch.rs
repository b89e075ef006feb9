//! Batches of blocks, which the reader hands to the workers, and the workers to the writer.

use std::ops::Range;

use crate::store::format::BlockKind;
use crate::store::write::block_index::Place;
use crate::store::write::ordered::BATCH_BLOCKS;
use crate::store::{BLOCK_SIZE, Digest};
use crate::units::to_usize;

/// Bytes of the source in a batch.
pub(super) const BATCH_BYTES: usize = BATCH_BLOCKS * to_usize(BLOCK_SIZE);

/// A message of the reader to the workers and the writer.
pub(super) enum Work {
    /// Blocks to hash and compress.
    Data(Batch),
    /// Number of zero blocks, from a hole.
    Zeros(u64),
    /// Blocks of the base, from a hole of a diff.
    Base(Range<u64>),
    /// End of a file, with its size in bytes.
    End(u64),
}

/// Consecutive blocks on their way through the pipeline. A batch and its buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Bytes of the source.
    pub plain: Vec<u8>,
    /// Number of bytes in `plain`. A worker pads a short last block with zeros.
    pub length: usize,
    /// Index of the first block in a diff.
    pub first_block: u64,
    /// For each block of a diff, a bit mask of the pages that are the base's, lowest bit first; otherwise empty.
    pub base_pages: Vec<u16>,
    /// Records of new blocks, one after another.
    pub records: Vec<u8>,
    /// Result for each block.
    pub blocks: Vec<Block>,
}

/// A worker's result for one block.
#[derive(Debug)]
pub(super) struct Block {
    /// Bit mask of the 4 KiB pages that are not zero, lowest bit first.
    pub data_pages: u16,
    pub outcome: Outcome,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Zero,
    /// The store has the block.
    Stored(Digest, Place),
    /// The block is new, and its record is at `record` in [`Batch::records`].
    New {
        hash: Digest,
        kind: BlockKind,
        record: Range<usize>,
    },
}
