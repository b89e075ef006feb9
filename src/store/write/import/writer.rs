//! Import writer: takes batches in order and writes packs and tables into the session.

use super::batch::{Batch, Block, Outcome, Work};
use super::diff::BaseMemory;
use super::input::Input;
use crate::error::Result;
use crate::store::BLOCK_SIZE;
use crate::store::disk::path::StorePath;
use crate::store::format::Stored;
use crate::store::write::block_index::BlockIndex;
use crate::store::write::pack_writer::{PackWriter, Packed};
use crate::store::write::tables::{TableWriter, Tables};
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// Complete tables in the session's directory `image`, and the new packs beside that directory.
pub(super) struct Written {
    pub tables: Tables,
    pub packed: Packed,
    /// Number of pages of a diff that are not the base's.
    pub changed_pages: PageCount,
    /// True if one of these pages is zero.
    pub has_zero_page: bool,
}

pub(super) struct Writer<'a> {
    index: &'a BlockIndex,
    tables: TableWriter,
    packs: PackWriter<'a>,
    base: Option<&'a BaseMemory>,
    changed_pages: PageCount,
    has_zero_page: bool,
}

impl<'a> Writer<'a> {
    pub fn new(
        session: &'a StorePath,
        inputs: &[Input],
        order: Vec<usize>,
        index: &'a BlockIndex,
        base: Option<&'a BaseMemory>,
    ) -> Result<Writer<'a>> {
        let files = inputs.iter().map(|i| (i.name.clone(), i.kind));
        let tables = TableWriter::new(&session.join("image"), files)?.in_order(order);
        Ok(Writer {
            index,
            tables,
            packs: PackWriter::new(session, index),
            base,
            changed_pages: PageCount::default(),
            has_zero_page: false,
        })
    }

    /// Writes the next batch, hole or end of a file. Returns its length in the source.
    pub fn write(&mut self, work: &Work) -> Result<Bytes> {
        match work {
            Work::Zeros(blocks) => {
                self.tables.zeros(*blocks)?;
                Ok(Bytes::new(blocks * BLOCK_SIZE))
            }
            Work::Base(blocks) => {
                for block in blocks.clone() {
                    match self.base.map_or(Ok(None), |base| base.place(block))? {
                        Some((hash, place)) => self.tables.block(&hash, place)?,
                        None => self.tables.zeros(1)?,
                    }
                }
                Ok(Bytes::new((blocks.end - blocks.start) * BLOCK_SIZE))
            }
            Work::End(size) => {
                self.tables.end_file(*size);
                Ok(Bytes::default())
            }
            Work::Data(batch) => {
                self.count_changed(batch);
                batch.blocks.iter().try_for_each(|block| self.block(block, &batch.records))?;
                Ok(Bytes::new(batch.length as u64))
            }
        }
    }

    /// Counts the pages of a diff that are not the base's.
    fn count_changed(&mut self, batch: &Batch) {
        let pages = (batch.length as u64).div_ceil(PAGE_SIZE);
        for (first, (base_pages, block)) in (0..).step_by(16).zip(batch.base_pages.iter().zip(&batch.blocks))
        {
            let in_file = u16::MAX >> (16 - pages.saturating_sub(first).min(16));
            let changed = in_file & !base_pages;
            self.changed_pages += PageCount::new(changed.count_ones().into());
            self.has_zero_page |= changed & !block.data_pages != 0;
        }
    }

    fn block(&mut self, block: &Block, records: &[u8]) -> Result<()> {
        let (hash, place) = match &block.outcome {
            Outcome::Zero => return self.tables.zeros(1),
            Outcome::Stored(hash, place) => (hash, *place),
            Outcome::New { hash, kind, record } => {
                // Two workers may have processed the same new block in different batches.
                let place = match self.index.find_written(hash) {
                    Some(place) => place,
                    None => {
                        let record = &records[record.clone()];
                        let (kind, data_pages) = (*kind, block.data_pages);
                        let stored = Stored { offset: 0, length: 0, kind, data_pages };
                        self.packs.append(*hash, record, stored)?
                    }
                };
                (hash, place)
            }
        };
        self.tables.block(hash, place)
    }

    /// Completes the packs and tables. All files are then synced, under names in the session.
    pub fn finish(self) -> Result<Written> {
        let packed = self.packs.finish()?;
        Ok(Written {
            tables: self.tables.finish()?,
            packed,
            changed_pages: self.changed_pages,
            has_zero_page: self.has_zero_page,
        })
    }
}
