//! Import: reader → workers → ordered writer, in bounded memory; then one atomic commit.
//!
//! The reader cuts files into batches and skips holes. Workers hash, look the block up and compress it.
//! The writer takes the batches in the order of the files, appends new blocks to packs of its own
//! session and writes the tables. Nothing is visible before the commit.

mod format;
mod magic;
mod reader;
mod request;
mod worker;
mod writer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

pub use request::{ImportFile, ImportFormat, ImportRequest, Imported, Later, Source};

use super::commit::{Finished, commit, fresh_policy};
use super::known::Known;
use super::pack_writer::Packed;
use super::session::Session;
use super::{BLOCK_SIZE, Store};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::threads;
use crate::units::Bytes;
use reader::Input;
use worker::Batch;
use writer::Writer;

/// Blocks in a batch: one MiB is read, hashed and compressed at a time.
const BATCH_BLOCKS: usize = 16;
const BATCH_BYTES: usize = BATCH_BLOCKS * BLOCK_SIZE as usize;

/// What the reader hands on.
enum Work {
    /// Blocks to hash and compress.
    Data(Batch),
    /// Zero blocks that were never read.
    Zeros(u64),
    /// The file has ended, at this size.
    End(u64),
}

/// Why the pipeline stops: somebody wants it, or a part has failed.
pub(super) struct Stop<'a> {
    failed: AtomicBool,
    wanted: Option<&'a AtomicBool>,
    /// How long a pipe may be silent.
    stall: Option<Duration>,
}

impl Stop<'_> {
    fn check(&self) -> Result<()> {
        if self.wanted.is_some_and(|w| w.load(Ordering::Relaxed)) {
            return Err(Error::failed("interrupted: nothing was imported"));
        }
        match self.failed.load(Ordering::Relaxed) {
            true => Err(Error::failed("stopped")),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Imports files as one template and points a tag at it.
    ///
    /// Memory is bounded whatever the size; all cores are used. Another import, of the same name or
    /// content too, may run at the same time. When it fails or is interrupted nothing is left, unless publishing itself
    /// fails: then the error says how far it came, and what is there is whole.
    ///
    /// # Errors
    /// What is wrong with a source, the request or the store; [`Code::Failed`](crate::error::Code)
    /// after an interrupt, [`Code::TryAgain`](crate::error::Code) when a pipe falls silent.
    pub fn import(&self, request: ImportRequest, progress: &dyn Progress) -> Result<Imported> {
        let inputs = request.inputs()?;
        let stop = Stop {
            failed: AtomicBool::new(false),
            wanted: request.interrupt.as_deref(),
            stall: request.stall,
        };
        self.mend()?;
        let _content = self.lock_content(|| stop.check())?;
        let session = Session::begin(&self.tmp_dir())?;
        let known = Known::load(self)?;
        let total: Option<u64> = inputs.iter().map(Input::size).sum();
        progress.start("import", total.map(Bytes::new));
        let written = self.pipeline(&request, inputs, &session, &known, &stop, progress);
        progress.finish();
        let written = written?;
        stop.check()?;
        let writer::Written { tables, packed } = written;
        let template = Finished {
            digest: tables.digest,
            folder: session.path().join("image"),
            policy: fresh_policy(),
            change: &|policy| request.apply(policy),
            tags: request.tag.iter().cloned().collect(),
        };
        let (committed, needed) = commit(self, &session, &packed, &[template], &known, &|| stop.check())?;
        let packed = if needed { packed } else { Packed::default() };
        Ok(Imported {
            digest: tables.digest,
            tag: request.tag,
            files: tables.files,
            existed: committed.iter().all(|c| c.existed),
            new_bytes: Bytes::new(packed.new_bytes),
            stored_bytes: Bytes::new(packed.stored_bytes),
            repaired_blocks: known.repaired(),
        })
    }

    fn pipeline(
        &self,
        request: &ImportRequest,
        inputs: Vec<Input>,
        session: &Session,
        known: &Known,
        stop: &Stop<'_>,
        progress: &dyn Progress,
    ) -> Result<writer::Written> {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let in_flight = workers * 3 + 2;
        let (to_workers, work) = mpsc::sync_channel::<(u64, Batch)>(in_flight);
        let (to_writer, done) = mpsc::channel::<(u64, Result<Work>)>();
        let (give_back, empty) = mpsc::channel::<Batch>();
        for _ in 0..in_flight {
            // The receiver is alive: it is two lines above.
            let _ = give_back.send(Batch::default());
        }
        let work = Mutex::new(work);
        let order = reader::order(&inputs);
        let mut writer = Writer::new(session.path(), &inputs, order.clone(), known)?;
        thread::scope(|scope| {
            for number in 0..workers {
                let (work, to_writer) = (&work, to_writer.clone());
                match threads::start_scoped(scope, move || worker::run(request, known, work, &to_writer)) {
                    Err(error) if number == 0 => return Err(error),
                    // Fewer do.
                    Err(_) => break,
                    Ok(_) => {}
                }
            }
            threads::start_scoped(scope, {
                let to_writer = to_writer.clone();
                move || {
                    let mut sequence = 0;
                    let result = reader::run(inputs, &order, stop, &empty, |work| {
                        // A send fails when the other side is gone; then the writer has the reason.
                        let sent = match work {
                            Work::Data(batch) => to_workers.send((sequence, batch)).is_ok(),
                            other => to_writer.send((sequence, Ok(other))).is_ok(),
                        };
                        sequence += 1;
                        if sent { Ok(()) } else { Err(Error::failed("stopped")) }
                    });
                    if let Err(error) = result {
                        let _ = to_writer.send((sequence, Err(error)));
                    }
                }
            })?;
            drop(to_writer);
            let result = writer.run(&done, &give_back, progress);
            if result.is_err() {
                stop.failed.store(true, Ordering::Relaxed);
                // Wakes a reader that waits for an empty batch, and workers that wait for work.
                drop(give_back);
                drop(done);
            }
            result
        })?;
        writer.finish()
    }
}
