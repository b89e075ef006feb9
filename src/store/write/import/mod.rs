//! Import: reader → workers → ordered writer, in bounded memory, then one atomic commit.
//!
//! The reader splits files into batches and skips holes. Workers hash the blocks, look them up and compress the new
//! ones. The writer takes the batches in file order, appends new blocks to packs of the session and writes the tables.
//! Nothing is visible before the commit.

mod batch;
pub mod firecracker;
mod format;
mod input;
mod magic;
mod reader;
mod request;
mod stop;
mod worker;
mod writer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;

pub use request::{ImportFile, ImportFormat, ImportRequest, Imported, Later, Source};

use super::block_index::BlockIndex;
use super::commit::{Finished, commit, fresh_policy};
use super::pack_writer::Packed;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::Store;
use crate::store::disk::session::Session;
use crate::sys::process::threads;
use crate::units::Bytes;
use batch::{Batch, Work};
use input::Input;
use stop::Stop;
use writer::Writer;

impl Store {
    /// Imports files as one template and points a tag at it.
    ///
    /// Memory use does not depend on the size of the files. Uses all cores. Other imports, even of the same name or
    /// content, may run at the same time. Nothing remains of a failed or interrupted import, unless publishing itself
    /// fails: then the error lists what was published, and everything published is complete.
    ///
    /// # Errors
    /// Returns an error if a source, the request or the store is invalid. Returns [`Code::Failed`](crate::error::Code)
    /// after an interrupt, and [`Code::TryAgain`](crate::error::Code) if a pipe stalls for longer than `request.stall`.
    pub fn import(&self, request: ImportRequest, progress: &dyn Progress) -> Result<Imported> {
        let inputs = request.inputs()?;
        let stop = Stop {
            failed: AtomicBool::new(false),
            interrupt: request.interrupt.as_deref(),
            stall: request.stall,
        };
        self.repair()?;
        let _content = self.lock_content(|| stop.check())?;
        let session = Session::create(&self.tmp_dir())?;
        let index = BlockIndex::load(self)?;
        let total: Option<u64> = inputs.iter().map(Input::size).sum();
        progress.start("import", total.map(Bytes::new));
        let written = self.pipeline(&request, inputs, &session, &index, &stop, progress);
        progress.finish();
        let written = written?;
        stop.check()?;
        let writer::Written { tables, packed } = written;
        let template = Finished {
            digest: tables.digest,
            directory: session.path().join("image"),
            policy: fresh_policy(),
            change: &|policy| request.apply(policy),
            tags: request.tag.iter().cloned().collect(),
        };
        let (committed, is_published) =
            commit(self, &session, &packed, &[template], &index, &|| stop.check())?;
        let packed = if is_published { packed } else { Packed::default() };
        Ok(Imported {
            digest: tables.digest,
            tag: request.tag,
            files: tables.files,
            existed: committed.iter().all(|c| c.existed),
            moved: committed.into_iter().flat_map(|c| c.moved).collect(),
            new_bytes: Bytes::new(packed.new_bytes),
            stored_bytes: Bytes::new(packed.stored_bytes),
            repaired_blocks: index.repaired(),
        })
    }

    fn pipeline(
        &self,
        request: &ImportRequest,
        inputs: Vec<Input>,
        session: &Session,
        index: &BlockIndex,
        stop: &Stop<'_>,
        progress: &dyn Progress,
    ) -> Result<writer::Written> {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let in_flight = workers * 3 + 2;
        let (to_workers, work) = mpsc::sync_channel::<(u64, Batch)>(in_flight);
        let (to_writer, done) = mpsc::channel::<(u64, Result<Work>)>();
        let (give_back, empty) = mpsc::channel::<Batch>();
        for _ in 0..in_flight {
            // Cannot fail: the receiver `empty` is alive.
            let _ = give_back.send(Batch::default());
        }
        let work = Mutex::new(work);
        let order = reader::order(&inputs);
        let mut writer = Writer::new(session.path(), &inputs, order.clone(), index)?;
        thread::scope(|scope| {
            for number in 0..workers {
                let (work, to_writer) = (&work, to_writer.clone());
                match threads::start_scoped(scope, move || worker::run(request, index, work, &to_writer)) {
                    Err(error) if number == 0 => return Err(error),
                    // Continue with the workers that were started.
                    Err(_) => break,
                    Ok(_) => {}
                }
            }
            threads::start_scoped(scope, {
                let to_writer = to_writer.clone();
                move || {
                    let mut sequence = 0;
                    let result = reader::run(inputs, &order, stop, &empty, |work| {
                        // A send fails if the receiver has stopped; the writer then reports the reason.
                        let sent = match work {
                            Work::Data(batch) => to_workers.send((sequence, batch)).is_ok(),
                            other => to_writer.send((sequence, Ok(other))).is_ok(),
                        };
                        sequence += 1;
                        if sent { Ok(()) } else { Err(Error::failed("import stopped")) }
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
                // Wakes a reader that waits for an empty batch, and workers that wait for a batch.
                drop(give_back);
                drop(done);
            }
            result
        })?;
        writer.finish()
    }
}
