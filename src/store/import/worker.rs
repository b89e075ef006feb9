//! Hashes, looks up and compresses batches, on every core.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use super::{ImportRequest, Work};
use crate::error::Result;
use crate::store::codec::{Encoder, page_mask};
use crate::store::format::BlockKind;
use crate::store::known::{Known, Place};
use crate::store::{BLOCK_SIZE, Digest, Scratch};

/// A run of blocks on its way through the pipeline, with its memory; used again and again.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Bytes of the source.
    pub plain: Vec<u8>,
    /// How many of them; the last block may be short, then the worker pads it with zeros.
    pub length: usize,
    /// Records of new blocks, one after another.
    pub records: Vec<u8>,
    /// What became of each block.
    pub blocks: Vec<Block>,
}

/// What a worker found out about one block.
#[derive(Debug)]
pub(super) struct Block {
    /// Which 4 KiB pages are not zero, lowest bit first.
    pub data_pages: u16,
    pub outcome: Outcome,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Zero,
    /// The store has it.
    Known(Digest, Place),
    /// Its record lies there in `records`.
    New {
        hash: Digest,
        kind: BlockKind,
        chunk_shift: u8,
        record: Range<usize>,
    },
}

/// Works until the reader has gone.
pub(super) fn run(
    request: &ImportRequest,
    known: &Known,
    work: &Mutex<Receiver<(u64, Batch)>>,
    done: &Sender<(u64, Result<Work>)>,
) {
    let mut encoder = match Encoder::new(request.compression, request.chunk_size) {
        Ok(encoder) => encoder,
        Err(error) => {
            let _ = done.send((0, Err(error)));
            return;
        }
    };
    let mut scratch = Scratch::default();
    loop {
        let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((sequence, mut batch)) = next else { return };
        process(&mut batch, &mut encoder, known, &mut scratch);
        if done.send((sequence, Ok(Work::Data(batch)))).is_err() {
            return;
        }
    }
}

fn process(batch: &mut Batch, encoder: &mut Encoder, known: &Known, scratch: &mut Scratch) {
    let Batch { plain, length, records, blocks } = batch;
    records.clear();
    blocks.clear();
    let padded = length.next_multiple_of(BLOCK_SIZE as usize);
    plain[*length..padded].fill(0);
    for block in plain[..padded].chunks_exact(BLOCK_SIZE as usize) {
        let data_pages = page_mask(block);
        let outcome = if data_pages == 0 {
            Outcome::Zero
        } else {
            let hash = Digest::of(block);
            match known.find(&hash, scratch) {
                Some(place) => Outcome::Known(hash, place),
                None => {
                    let start = records.len();
                    let (kind, chunk_shift) = encoder.encode(block, records);
                    Outcome::New { hash, kind, chunk_shift, record: start..records.len() }
                }
            }
        };
        blocks.push(Block { data_pages, outcome });
    }
}
