//! Import workers: hash, look up and compress batches, on every core.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use super::batch::{Batch, Block, Outcome, Work};
use super::request::ImportRequest;
use crate::error::Result;
use crate::store::format::codec::{Encoder, page_mask};
use crate::store::write::block_index::BlockIndex;
use crate::store::{BLOCK_SIZE, Digest, Scratch};
use crate::units::to_usize;

/// Processes batches until the reader stops.
pub(super) fn run(
    request: &ImportRequest,
    index: &BlockIndex,
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
        process(&mut batch, &mut encoder, index, &mut scratch);
        if done.send((sequence, Ok(Work::Data(batch)))).is_err() {
            return;
        }
    }
}

fn process(batch: &mut Batch, encoder: &mut Encoder, index: &BlockIndex, scratch: &mut Scratch) {
    let Batch { plain, length, records, blocks } = batch;
    records.clear();
    blocks.clear();
    let padded = length.next_multiple_of(to_usize(BLOCK_SIZE));
    plain[*length..padded].fill(0);
    for block in plain[..padded].chunks_exact(to_usize(BLOCK_SIZE)) {
        let data_pages = page_mask(block);
        let outcome = if data_pages == 0 {
            Outcome::Zero
        } else {
            let hash = Digest::of(block);
            match index.find(&hash, scratch) {
                Some(place) => Outcome::Stored(hash, place),
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
