//! Repeated measurements of all clones. A process that cannot be inspected is reported as blocked. A server that does not
//! answer delays only the figures of templates.

mod blocked;
mod layout;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::disks;
use super::process::Measured;
use super::records::{Records, is_simulated, records_by_process};
use super::survey::{CloneRow, Density, SharedMemory, density, measure_all, rows};
use super::templates::TemplateMemory;
use super::totals::Totals;
use crate::clones::find::{self, CloneProcess, Inodes, Inspections, handlers};
use crate::clones::registry;
use crate::control::Mount;
use crate::error::Result;
use crate::store::Digest;
use crate::sys::process::{ProcessId, holders, threads};

pub use blocked::Sleepers;
pub use layout::{Layout, PageState};

/// Longest inspection of a process.
const INSPECTION_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest wait of a sample for the figures of templates. The first sample has no earlier figures and waits longer.
const TEMPLATES_TIMEOUT: Duration = Duration::from_millis(500);
const FIRST_TIMEOUT: Duration = Duration::from_secs(2);

/// One clone in a sample.
#[derive(Debug, Clone)]
pub struct SampledClone {
    /// The process.
    pub process: ProcessId,
    /// Same as in [`Density`].
    pub row: CloneRow,
    /// True if a thread has been in one uninterruptible sleep since the sample before.
    pub blocked: bool,
    /// State of the pages, if it was asked for.
    pub layout: Option<Layout>,
}

/// A process that could not be inspected, and may be a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedProcess {
    /// The process.
    pub process: ProcessId,
    /// Name of the command.
    pub command: String,
    /// Id and reference of the clone that has a record of the process.
    pub clone: Option<(String, String)>,
}

/// The memory that clones share, and the sums over all clones.
#[derive(Debug, Clone)]
pub struct SampledTemplates {
    /// Same as in [`Density`].
    pub templates: Vec<TemplateMemory>,
    /// Same as in [`Density`]. Clones that could not be inspected are not in the sums.
    pub totals: Totals,
    /// Labels of the templates, as `KEY=VALUE`.
    pub labels: BTreeMap<Digest, Vec<String>>,
    /// Age of the figures of the templates; zero if they belong to this sample.
    pub age: Duration,
}

/// One measurement.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Beginning of the measurement.
    pub at: Instant,
    /// The clones, by process id.
    pub clones: Vec<SampledClone>,
    /// Processes that could not be inspected.
    pub blocked: Vec<BlockedProcess>,
    /// `None` until the templates could be measured once.
    pub templates: Option<SampledTemplates>,
    /// Why the figures of the templates are older than the sample.
    pub problem: Option<String>,
}

/// The figures of templates, with the time and the mounts of their measurement.
struct Known {
    at: Instant,
    devices: Vec<u64>,
    memory: SharedMemory,
}

/// Measures the clones again and again.
pub struct Sampler {
    inspections: Inspections,
    sleepers: HashMap<ProcessId, Sleepers>,
    known: Option<Known>,
    /// The measurement of templates that has not ended. There is at most one.
    pending: Option<Receiver<Result<Known>>>,
}

impl Sampler {
    /// Creates a sampler. All samplers of a program share the `inspections`.
    pub fn new(inspections: Inspections) -> Sampler {
        Sampler { inspections, sleepers: HashMap::new(), known: None, pending: None }
    }

    /// Measures the clones of these mounts. For the clones in `shown`, also finds the state of each page.
    ///
    /// # Errors
    /// Returns an error if a store or a process cannot be read.
    pub fn sample(&mut self, mounts: &[Mount], shown: &HashSet<ProcessId>) -> Result<Sample> {
        let at = Instant::now();
        let inodes = Arc::new(Inodes::of(mounts)?);
        let mut search = find::search_again(&inodes, INSPECTION_TIMEOUT, &self.inspections)?;
        let blocked = std::mem::take(&mut search.unseen.silent);
        let mut found = search.complete()?;
        self.start_templates(mounts, &inodes, &found)?;
        let entries = registry::list()?;
        let records = records_by_process(&entries);
        let can_be = |clone: &CloneProcess| !is_simulated(clone, &records);
        let handlers = handlers::take_out_again(&mut found, can_be, INSPECTION_TIMEOUT, &self.inspections)?;
        let blocked = blocked.into_iter().filter_map(|pid| blocked_process(pid, &records)).collect();
        let mut clones = measure_all(found, &inodes, &records)?;
        disks::add(&mut clones, &entries)?;
        let problem = self.collect_templates();
        let devices = devices(mounts);
        let known = self.known.as_ref().filter(|known| known.devices == devices);
        let (rows, templates) = match known {
            None => (rows(&clones, &records), None),
            Some(known) => {
                let (density, _) = density(mounts, &clones, handlers, &known.memory, &records)?;
                let Density { templates, clones: rows, totals, .. } = density;
                let (labels, age) = (known.memory.templates.labels(), at.saturating_duration_since(known.at));
                (rows, Some(SampledTemplates { templates, totals, labels, age }))
            }
        };
        let clones = self.rows(&clones, rows, shown)?;
        Ok(Sample { at, clones, blocked, templates, problem })
    }

    fn rows(
        &mut self,
        clones: &[(CloneProcess, Measured)],
        rows: Vec<CloneRow>,
        shown: &HashSet<ProcessId>,
    ) -> Result<Vec<SampledClone>> {
        let before = std::mem::take(&mut self.sleepers);
        let mut sampled = Vec::with_capacity(rows.len());
        for ((clone, _), row) in clones.iter().zip(rows) {
            let process = clone.process();
            let sleepers = Sleepers::of(&row.pids);
            let blocked = before.get(&process).is_some_and(|before| sleepers.any_in(before));
            if !sleepers.is_empty() {
                self.sleepers.insert(process, sleepers);
            }
            let layout = if shown.contains(&process) { Layout::of(clone)? } else { None };
            sampled.push(SampledClone { process, row, blocked, layout });
        }
        Ok(sampled)
    }

    /// Starts a measurement of the templates, unless the last one has not ended.
    fn start_templates(
        &mut self,
        mounts: &[Mount],
        inodes: &Arc<Inodes>,
        clones: &[CloneProcess],
    ) -> Result<()> {
        if self.pending.is_some() {
            return Ok(());
        }
        // A mapping leads to the file of a detached mount: one clone of each file is enough. Of the templates of dead mounts,
        // the pages in the page tables of all clones count.
        let mut files = HashSet::new();
        let is_needed = |clone: &&CloneProcess| {
            let new = clone.maps.iter().filter(|map| files.insert((map.dev, map.ino))).count();
            new > 0 || clone.maps.iter().any(|map| mounts[map.mount].is_dead())
        };
        let examples: Vec<CloneProcess> = clones.iter().filter(is_needed).cloned().collect();
        let (mounts, inodes) = (mounts.to_vec(), Arc::clone(inodes));
        let (sender, result) = mpsc::channel();
        threads::start(move || {
            let at = Instant::now();
            let memory = SharedMemory::measure(&mounts, None, &inodes, &examples.iter().collect::<Vec<_>>());
            let _ = sender.send(memory.map(|memory| Known { at, devices: devices(&mounts), memory }));
        })?;
        self.pending = Some(result);
        Ok(())
    }

    /// Waits for the measurement of the templates. Returns why there are no recent figures.
    fn collect_templates(&mut self) -> Option<String> {
        let pending = self.pending.take()?;
        let limit = if self.known.is_some() { TEMPLATES_TIMEOUT } else { FIRST_TIMEOUT };
        match pending.recv_timeout(limit) {
            Ok(Ok(known)) => {
                self.known = Some(known);
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(RecvTimeoutError::Disconnected) => Some("the measurement of the templates failed".into()),
            Err(RecvTimeoutError::Timeout) => {
                self.pending = Some(pending);
                Some("the templates cannot be measured: a server or a store does not answer".into())
            }
        }
    }
}

fn devices(mounts: &[Mount]) -> Vec<u64> {
    mounts.iter().map(|mount| mount.device).collect()
}

/// Returns `None` for a process that has exited.
fn blocked_process(pid: u32, records: &Records) -> Option<BlockedProcess> {
    let process = ProcessId::of(pid).ok()??;
    let clone = records.get(&process).map(|entry| (entry.id.clone(), entry.name.clone()));
    Some(BlockedProcess { process, command: holders::name_of(pid), clone })
}
