//! Import: reader → workers → ordered writer, in bounded memory, then one atomic commit.
//!
//! The reader splits files into batches and skips holes. Workers hash the blocks, look them up and compress the new
//! ones. The writer takes the batches in file order, appends new blocks to packs of the session and writes the tables.
//! Nothing is visible before the commit.

mod batch;
mod diff;
mod folder;
mod format;
mod input;
mod magic;
mod reader;
mod request;
mod stop;
mod worker;
mod writer;

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

pub use folder::{Folder, Recognized, Snapshot};
pub use request::{Base, ImportFile, ImportFormat, ImportRequest, Imported, Later, Source};

use super::block_index::BlockIndex;
use super::commit::{Finished, commit, fresh_policy};
use super::ordered::ordered;
use super::pack_writer::Packed;
use crate::error::Result;
use crate::progress::Progress;
use crate::store::Store;
use crate::store::disk::session::Session;
use crate::units::{Bytes, PageCount};
use batch::Work;
use diff::{BaseMemory, NO_ZERO_PAGE};
use input::Input;
use stop::Stop;
use worker::Worker;
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
        let (inputs, mut warnings) = request.inputs()?;
        let stop = Stop {
            failed: AtomicBool::new(false),
            interrupt: request.interrupt.as_deref(),
            stall: request.stall,
        };
        self.repair()?;
        let _content = self.lock_content(|| stop.check())?;
        let session = Session::create(&self.tmp_dir())?;
        let index = BlockIndex::load(self)?;
        let base = match (&request.base, inputs.iter().find(|input| input.is_diff)) {
            (Some(base), Some(diff)) => Some(BaseMemory::open(self, &base.digest, diff)?),
            _ => None,
        };
        let total: Option<u64> = inputs.iter().map(Input::size).sum();
        progress.start("import", total.map(Bytes::new));
        let written = self.pipeline(&request, (inputs, base.as_ref()), &session, &index, &stop, progress);
        progress.finish();
        let writer::Written { tables, packed, changed_pages, has_zero_page } = written?;
        stop.check()?;
        if let Some(base) = &base {
            base.check_unchanged(self)?;
            if changed_pages > PageCount::default() && !has_zero_page {
                warnings.push(NO_ZERO_PAGE.to_owned());
            }
        }
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
            changed_pages: base.map(|_| changed_pages),
            warnings,
        })
    }

    fn pipeline(
        &self,
        request: &ImportRequest,
        (inputs, base): (Vec<Input>, Option<&BaseMemory>),
        session: &Session,
        index: &BlockIndex,
        stop: &Stop<'_>,
        progress: &dyn Progress,
    ) -> Result<writer::Written> {
        let order = reader::order(&inputs);
        let mut writer = Writer::new(session.path(), &inputs, order.clone(), index, base)?;
        // Batches that were written: their buffers are used again.
        let empty = Mutex::new(Vec::new());
        ordered(
            &stop.failed,
            |send| reader::run(inputs, &order, stop, &empty, send),
            || None,
            |worker, mut work| {
                if let Work::Data(batch) = &mut work {
                    let worker = match worker {
                        Some(worker) => worker,
                        None => worker.insert(Worker::new(request)?),
                    };
                    worker.process(batch, index, base)?;
                }
                Ok(work)
            },
            |work| {
                progress.advance(writer.write(&work)?);
                if let Work::Data(batch) = work {
                    empty.lock().unwrap_or_else(PoisonError::into_inner).push(batch);
                }
                Ok(())
            },
        )?;
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::progress::Silent;
    use crate::store::FileKind;

    #[test]
    fn a_source_that_panics_fails_the_import_and_publishes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        let later = Later { size: 1 << 20, open: Arc::new(|| panic!("test")) };
        let file = ImportFile { name: "disk".into(), kind: FileKind::Blob, source: Source::Later(later) };
        let error = store.import(ImportRequest::new(None, vec![file]), &Silent).unwrap_err();
        assert_eq!(error.message(), "a worker thread panicked");
        assert!(store.digests().unwrap().is_empty());
    }
}
