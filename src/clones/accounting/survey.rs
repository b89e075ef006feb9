//! A measurement of all clones of some mounts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde::Serialize;

use super::frames::{self, Distinct};
use super::process::{CloneMemory, Measured, measure};
use super::records::{Records, is_simulated, record_of, records_by_process};
use super::shares::{Parts, Shares};
use super::templates::{TemplateMemory, Templates, add_shares};
use super::totals::{self, Copied, KvmTables, Totals};
use super::{disks, residency};
use crate::clones::baseline::Baseline;
use crate::clones::find::dead_mount::DeadMount;
use crate::clones::find::handlers::{self, Handler};
use crate::clones::find::{self, CloneProcess, Inodes, TemplateMapping};
use crate::clones::registry;
use crate::clones::zero_memory::ZeroMemory;
use crate::control::{self, Mount, Residency};
use crate::error::Result;
use crate::store::{Digest, Template};
use crate::sys::memory::pagemap;
use crate::sys::process::threads;
use crate::units::Bytes;

/// One clone and its memory.
#[derive(Debug, Clone, Serialize)]
pub struct CloneRow {
    /// Id that `stencil clone` assigned, or the process id.
    pub id: String,
    /// Process id.
    pub pid: u32,
    /// All processes that share the address space; `pid` is the first.
    pub pids: Vec<u32>,
    /// Reference given at launch; `None` for a process that Stencil did not launch.
    pub reference: Option<String>,
    /// Name of the command.
    pub command: String,
    /// Control group.
    pub cgroup: String,
    /// Real user id.
    pub uid: u32,
    /// Template of the first mapping.
    pub digest: Digest,
    /// `simulated`, `qemu`, `command`, or `other` for a process that Stencil did not launch.
    pub kind: String,
    /// Labels given at launch.
    pub labels: BTreeMap<String, String>,
    /// Memory figures.
    #[serde(flatten)]
    pub memory: CloneMemory,
    /// Template mappings.
    pub maps: Vec<TemplateMapping>,
}

/// The result of `stencil density`.
#[derive(Debug, Clone, Serialize)]
pub struct Density {
    /// Templates of all mounts.
    pub templates: Vec<TemplateMemory>,
    /// All clones, by process id.
    pub clones: Vec<CloneRow>,
    /// Sums over all clones.
    pub totals: Totals,
    /// Page-fault handlers, which map templates and are no clones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handlers: Vec<Handler>,
    /// Mounts whose supervisor and server are dead. Of the page cache of their templates, the pages in page tables count.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dead_mounts: Vec<DeadMount>,
}

/// A measurement and its inputs, for the audit.
#[derive(Debug)]
pub struct Survey {
    /// The result of the measurement.
    pub density: Density,
    /// The memory of the host, split between the clones.
    pub shares: Shares,
    /// The mappings of each clone, and the addresses of its copied pages.
    pub clones: Vec<(CloneProcess, Measured)>,
    /// The template files of the mounts, by device and inode number.
    pub inodes: Inodes,
    /// The templates of the mounts.
    pub(super) opened: Arc<BTreeMap<Digest, Template>>,
    /// The backings of the mounts, each with the index of its mount.
    pub(super) backings: Vec<(usize, Residency)>,
    /// Free memory of the host before the launch, if all clones belong to one launch with a baseline.
    pub baseline: Option<Baseline>,
}

impl Survey {
    /// Returns true if this mount has a backing of the file.
    pub(super) fn has_backing(&self, mount: usize, digest: Digest, file: &str) -> bool {
        let backings = self.backings.iter().map(|(mount, its)| (*mount, its.digest, its.file.as_str()));
        backings.into_iter().any(|backing| backing == (mount, digest, file))
    }
}

/// Measures all clones of these mounts, or the clones of one template.
///
/// # Errors
/// Returns an error if a store, a supervisor or a process cannot be read: a partial sum would be wrong.
pub fn survey(mounts: &[Mount], only: Option<&Digest>) -> Result<Survey> {
    let inodes = Inodes::of(mounts)?;
    let mut found = find::search(&inodes)?.complete()?;
    let entries = registry::list()?;
    let records = records_by_process(&entries);
    let kvm = kvm_tables(mounts, &found, &records)?;
    if let Some(only) = only {
        found.retain(|clone| clone.maps.iter().any(|map| map.digest == *only));
    }
    let handlers = handlers::take_out(&mut found, |clone| !is_simulated(clone, &records))?;
    let mut clones = measure_all(found, &inodes, &records)?;
    disks::add(&mut clones, &entries)?;
    let processes: Vec<&CloneProcess> = clones.iter().map(|(clone, _)| clone).collect();
    let shared = SharedMemory::measure(mounts, only, &inodes, &processes)?;
    let (density, shares) = figures(mounts, &clones, handlers, &shared, &records, &kvm)?;
    let baseline = baseline(&clones, &records);
    let SharedMemory { templates, backings, .. } = shared;
    Ok(Survey { density, shares, clones, inodes, opened: Arc::new(templates.opened), backings, baseline })
}

/// Returns the page tables of KVM of each clone. Clones of all mounts have them: those of other mounts, too.
fn kvm_tables(mounts: &[Mount], found: &[CloneProcess], records: &Records) -> Result<KvmTables> {
    let tables = totals::kvm_tables(found.iter(), records)?;
    let all = if tables.is_empty() { Vec::new() } else { control::mounts_and_dead()? };
    if all.len() <= mounts.len() {
        return Ok(tables);
    }
    let of_all = find::search(&Inodes::of(&all)?)?.complete()?;
    totals::kvm_tables(of_all.iter(), records)
}

/// Returns the size of the template pages of these mounts in RAM.
///
/// # Errors
/// Same as [`survey`].
pub fn template_bytes(mounts: &[Mount]) -> Result<Bytes> {
    let inodes = Inodes::of(mounts)?;
    let clones = find::search(&inodes)?.complete()?;
    let clones: Vec<&CloneProcess> = clones.iter().collect();
    let resident = residency::resident(mounts, &residency::backings(mounts)?, &inodes, &clones)?;
    Ok(resident.iter().map(|file| file.bytes).sum())
}

/// The memory that clones share.
pub(super) struct SharedMemory {
    pub templates: Templates,
    /// The backings of the mounts, each with the index of its mount.
    backings: Vec<(usize, Residency)>,
    store_cache: Bytes,
}

impl SharedMemory {
    /// Measures the templates of these mounts, or one template. Waits for supervisors, stores and servers.
    pub fn measure(
        mounts: &[Mount],
        only: Option<&Digest>,
        inodes: &Inodes,
        clones: &[&CloneProcess],
    ) -> Result<SharedMemory> {
        let mut templates = Templates::of(mounts, only)?;
        let backings = residency::backings(mounts)?;
        templates.add_residency(&residency::resident(mounts, &backings, inodes, clones)?);
        let metadata: Bytes = backings.iter().map(|(_, backing)| backing.metadata_bytes).sum();
        let store_cache = templates.store_cache()? + residency::daemons(mounts)? + metadata;
        Ok(SharedMemory { templates, backings, store_cache })
    }
}

/// Returns the figures of these clones and of the memory that they share, and the share of each clone.
pub(super) fn density(
    mounts: &[Mount],
    clones: &[(CloneProcess, Measured)],
    handlers: Vec<Handler>,
    shared: &SharedMemory,
    records: &Records,
) -> Result<(Density, Shares)> {
    let kvm = totals::kvm_tables(clones.iter().map(|(clone, _)| clone), records)?;
    figures(mounts, clones, handlers, shared, records, &kvm)
}

/// Same as [`density`], with these page tables of KVM.
fn figures(
    mounts: &[Mount],
    clones: &[(CloneProcess, Measured)],
    handlers: Vec<Handler>,
    shared: &SharedMemory,
    records: &Records,
    kvm: &KvmTables,
) -> Result<(Density, Shares)> {
    let processes: Vec<&CloneProcess> = clones.iter().map(|(clone, _)| clone).collect();
    let mut templates = shared.templates.rows(&processes, &shared.backings);
    let of_handlers: Bytes = handlers.iter().map(|handler| handler.memory_bytes).sum();
    let store_cache = shared.store_cache + of_handlers;
    let shares = Shares::new(own_parts(clones, kvm), &shared.templates.pages(&processes), store_cache);
    add_shares(&mut templates, &processes, &shares.clones);
    let copied = Copied::of(clones, &shared.templates.opened, records)?;
    let totals = Totals::new(clones, shares.total(), copied);
    let dead_mounts = DeadMount::of(mounts, clones.iter().map(|(clone, _)| clone));
    Ok((Density { templates, clones: rows(clones, records), totals, handlers, dead_mounts }, shares))
}

/// Returns the memory that each clone has alone, or shares by a fork or KSM. `kvm` are its page tables of KVM.
fn own_parts(clones: &[(CloneProcess, Measured)], kvm: &KvmTables) -> Vec<Parts> {
    let distinct = frames::distinct(clones.iter().map(|(_, measured)| &measured.frames));
    let own =
        |(Distinct { private, overhead }, (clone, measured)): (Distinct, &(CloneProcess, Measured))| Parts {
            private_bytes: private,
            overhead_bytes: overhead,
            page_table_bytes: measured.memory.page_table_bytes
                + kvm.get(&clone.process()).copied().unwrap_or_default(),
            disk_bytes: measured.memory.disk_bytes,
            ..Parts::default()
        };
    distinct.into_iter().zip(clones).map(own).collect()
}

/// Returns the row of each clone.
pub(super) fn rows(clones: &[(CloneProcess, Measured)], records: &Records) -> Vec<CloneRow> {
    clones.iter().map(|(clone, measured)| row(clone, measured, records)).collect()
}

/// Measures these clones on as many threads as there are processors. Clones that have exited are left out.
pub(super) fn measure_all(
    found: Vec<CloneProcess>,
    inodes: &Inodes,
    records: &Records,
) -> Result<Vec<(CloneProcess, Measured)>> {
    let (count, shared, zeros) = (found.len(), frames::shared(&found, records), ZeroMemory::new(inodes));
    let results = Mutex::new(Vec::with_capacity(count));
    let queue = Mutex::new(found.into_iter().zip(shared).enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((index, (mut clone, shared))) = next() {
            if let Some(measured) = measure(&mut clone, &zeros, shared)? {
                results.lock().unwrap_or_else(PoisonError::into_inner).push((index, (clone, measured)));
            }
        }
        Ok(())
    };
    threads::share(thread::available_parallelism().map_or(1, usize::from), work)?;
    let pagemap::Work { scanned_pages, entry_reads } = pagemap::work();
    log::debug!("{count} clones: {scanned_pages} pages scanned, {entry_reads} reads of page table entries");
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, clone)| clone).collect())
}

/// Returns the baseline that all of these clones have in common, if all of them started later: the memory of an older
/// process is a part of the baseline.
fn baseline(clones: &[(CloneProcess, Measured)], records: &Records) -> Option<Baseline> {
    let mut of_clones = clones.iter().filter_map(|(clone, _)| record_of(clone, records)?.baseline);
    let first = of_clones.next()?;
    let is_common = of_clones.all(|other| other == first);
    (is_common && clones.iter().all(|(clone, _)| first.is_before(clone.identity))).then_some(first)
}

fn row(clone: &CloneProcess, measured: &Measured, records: &Records) -> CloneRow {
    let entry = record_of(clone, records);
    CloneRow {
        id: entry.map_or_else(|| clone.pid.to_string(), |e| e.id.clone()),
        pid: clone.pid,
        pids: clone.processes().map(|process| process.pid).collect(),
        reference: entry.map(|e| e.name.clone()),
        command: measured.command.clone(),
        cgroup: measured.cgroup.clone(),
        uid: measured.uid,
        digest: clone.maps[0].digest,
        kind: entry.map_or_else(|| "other".to_owned(), |e| e.kind.name().to_owned()),
        labels: entry.map(|e| e.labels.clone()).unwrap_or_default(),
        memory: measured.memory,
        maps: clone.maps.clone(),
    }
}
