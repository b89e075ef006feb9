//! The options of `stencil clone` that read or record a working set.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Args;

use crate::cli::clones::working_set::{Recorded, no_set, set_name};
use crate::clones::launch::Target;
use crate::clones::registry::Entry;
use crate::clones::working_set::{Warmed, drop_unmapped, warm};
use crate::error::{Error, Result};
use crate::progress::Silent;
use crate::store::{DEFAULT_SET, FileSet, Store, WorkingSet};
use crate::sys::process::{avoid_huge_pages, threads};

/// Longest wait for the reads of a working set after the clones are ready.
const WARM_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Options of `stencil clone` for working sets.
#[derive(Debug, Args)]
pub struct LaunchSet {
    /// Name of the working set to read or to record
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SET, value_parser = set_name)]
    working_set: String,
    /// Do not read the working set of the template while the clones start
    #[arg(long)]
    no_warm: bool,
    /// Record the pages that the clone uses during its launch and SECONDS after it, 10 by default, and add them to the
    /// working set. Needs -n 1. The clone gets no huge pages, the working set is not read, and pages of the template
    /// that no process maps leave the page cache first
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "10")]
    record_working_set: Option<u32>,
}

/// The part of a launch that records or reads a working set.
pub struct Launching<'a> {
    args: &'a LaunchSet,
    warming: Option<JoinHandle<Result<Warmed>>>,
}

impl LaunchSet {
    /// Begins to read the working set of the template, if it has one, or prepares this process so that the page tables
    /// of the clone show the pages that it uses.
    ///
    /// # Errors
    /// Returns `Code::Usage` for a recording of several clones, and an error if the set cannot be read.
    pub fn begin(
        &self,
        store: &Store,
        target: &Target,
        count: u32,
        stop: &Arc<AtomicBool>,
    ) -> Result<Launching<'_>> {
        if self.record_working_set.is_some() {
            if count != 1 {
                return Err(Error::usage("cannot record the working set of several clones")
                    .hint("launch one clone: -n 1; a recording of another clone can be added later"));
            }
            avoid_huge_pages()?;
            drop_unmapped(&target.dir, &target.files)?;
        }
        let is_wanted = self.record_working_set.is_none() && !self.no_warm;
        let found = if is_wanted { store.working_set(&target.digest, &self.working_set) } else { Ok(None) };
        // The user did not name the default set, so a launch does not fail if that set cannot be read.
        let set = match found {
            Err(error) if self.working_set == DEFAULT_SET => {
                log::warn!("the working set is not read: {error}");
                None
            }
            Ok(None) if is_wanted && self.working_set != DEFAULT_SET => {
                return Err(no_set(&target.name, &self.working_set));
            }
            other => other?,
        };
        let start = |set: WorkingSet| {
            let (dir, files, stop) = (target.dir.clone(), target.files.clone(), Arc::clone(stop));
            threads::start(move || warm(&dir, &files, &set, &stop, &Silent))
        };
        Ok(Launching { args: self, warming: set.map(start).transpose()? })
    }
}

impl LaunchSet {
    /// Returns the pages of each file that all recordings of the set have written.
    ///
    /// # Errors
    /// Returns `Code::NotFound` if the template has no such set.
    pub fn written(&self, store: &Store, target: &Target) -> Result<BTreeMap<String, Vec<Range<u64>>>> {
        let set = store.working_set(&target.digest, &self.working_set)?;
        let set = set.ok_or_else(|| no_set(&target.name, &self.working_set))?;
        let written = |(name, file): (String, FileSet)| (name, file.written.in_all(set.recordings));
        Ok(set.files.into_iter().map(written).collect())
    }
}

impl Launching<'_> {
    /// Waits until the working set has been read. After [`WARM_TIMEOUT`], or when `stop` is set, the wait ends; reads
    /// that have begun end with this process. An error of the reads is only logged: the clones read the same pages and
    /// get the same error.
    pub fn warmed(&mut self, stop: &AtomicBool) -> Option<Warmed> {
        let thread = self.warming.take()?;
        let end = Instant::now() + WARM_TIMEOUT;
        while !thread.is_finished() {
            if Instant::now() > end || stop.load(Ordering::Relaxed) {
                log::warn!("the clones are ready, but the working set has not been read completely");
                return None;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        match thread.join() {
            Ok(Ok(warmed)) => Some(warmed),
            Ok(Err(error)) => {
                log::warn!("{error}");
                None
            }
            Err(_) => None,
        }
    }

    /// Records the clone, if a recording was requested.
    ///
    /// # Errors
    /// Returns an error if the recording fails; the clone goes on running.
    pub fn recorded(&self, store: &Store, clones: &[Entry], stop: &AtomicBool) -> Result<Option<Recorded>> {
        let (Some(seconds), [clone]) = (self.args.record_working_set, clones) else { return Ok(None) };
        let duration = Duration::from_secs(seconds.into());
        Recorded::add(store, &self.args.working_set, clone.pid, duration, stop).map(Some)
    }
}
