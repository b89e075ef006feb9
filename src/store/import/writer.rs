//! Takes batches in order, writes packs and tables into the session.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender};

use super::Work;
use super::reader::Input;
use super::worker::{Batch, Block, Outcome};
use crate::error::Result;
use crate::progress::Progress;
use crate::store::BLOCK_SIZE;
use crate::store::format::Stored;
use crate::store::known::Known;
use crate::store::pack_writer::{PackWriter, Packed};
use crate::store::path::StorePath;
use crate::store::tables::{TableWriter, Tables};
use crate::units::Bytes;

/// A complete template in the session's folder `image`, and its new packs beside it.
pub(super) struct Written {
    pub tables: Tables,
    pub packed: Packed,
}

pub(super) struct Writer<'a> {
    known: &'a Known,
    tables: TableWriter,
    packs: PackWriter<'a>,
}

impl<'a> Writer<'a> {
    pub fn new(
        session: &'a StorePath,
        inputs: &[Input],
        order: Vec<usize>,
        known: &'a Known,
    ) -> Result<Writer<'a>> {
        let files = inputs.iter().map(|i| (i.name.clone(), i.kind));
        let tables = TableWriter::new(&session.join("image"), files)?.coming_in(order);
        Ok(Writer { known, tables, packs: PackWriter::new(session, known) })
    }

    /// Until the reader and all workers have gone, or something failed.
    pub fn run(
        &mut self,
        done: &Receiver<(u64, Result<Work>)>,
        give_back: &Sender<Batch>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut waiting: BTreeMap<u64, Work> = BTreeMap::new();
        let mut next = 0;
        while let Ok((sequence, work)) = done.recv() {
            waiting.insert(sequence, work?);
            while let Some(work) = waiting.remove(&next) {
                next += 1;
                match work {
                    Work::Zeros(blocks) => {
                        self.tables.zeros(blocks)?;
                        progress.advance(Bytes::new(blocks * BLOCK_SIZE));
                    }
                    Work::End(size) => self.tables.end_file(size),
                    Work::Data(batch) => {
                        for block in &batch.blocks {
                            self.block(block, &batch.records)?;
                        }
                        progress.advance(Bytes::new(batch.length as u64));
                        // The reader may have gone already: then nobody needs it.
                        let _ = give_back.send(batch);
                    }
                }
            }
        }
        Ok(())
    }

    fn block(&mut self, block: &Block, records: &[u8]) -> Result<()> {
        let (hash, place) = match &block.outcome {
            Outcome::Zero => return self.tables.zeros(1),
            Outcome::Known(hash, place) => (hash, *place),
            Outcome::New { hash, kind, chunk_shift, record } => {
                // The same block may have come in a batch that was worked on at the same time.
                let place = match self.known.find_own(hash) {
                    Some(place) => place,
                    None => {
                        let record = &records[record.clone()];
                        let (kind, chunk_shift, data_pages) = (*kind, *chunk_shift, block.data_pages);
                        let length = record.len() as u32;
                        let stored = Stored { offset: 0, length, kind, chunk_shift, data_pages };
                        self.packs.append(*hash, record, stored)?
                    }
                };
                (hash, place)
            }
        };
        self.tables.block(hash, place)
    }

    /// Completes packs and tables; everything is on the disk afterwards, under names of the session.
    pub fn finish(self) -> Result<Written> {
        let packed = self.packs.finish()?;
        Ok(Written { tables: self.tables.finish()?, packed })
    }
}
