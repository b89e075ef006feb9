//! The check whether clones share the memory of their template: each property is proven from `/proc`, or fails.

mod facts;
mod judge;
mod mappings;
mod properties;
mod samples;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::find::Inodes;
use crate::control::{self, Listing, Mount, Served};
use crate::error::{Error, Result};
use crate::store::Digest;
use crate::sys::process::holders::{self, SCAN_TIMEOUT, Unseen};
use crate::sys::process::procfs::{self, MountLine};
use facts::Look;
use judge::{Judge, Status};

pub use properties::{Check, Property};

/// Time limit for the inspection of one process. It scans the page tables twice and reads at most 512 pages.
const INSPECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Only a blocked inspection usually takes longer.
const SLOW_INSPECTION: Duration = Duration::from_secs(1);

/// A clone to check.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Id of the clone, or the process id.
    pub id: String,
    /// The processes of the clone, the recorded one first. Those that map a template are checked.
    pub pids: Vec<u32>,
    /// Template that the clone must map; `None` for the template of its first mapping.
    pub digest: Option<Digest>,
}

/// A clone and its properties.
#[derive(Debug, Clone, Serialize)]
pub struct Checked {
    /// Id of the clone, or the process id.
    pub id: String,
    /// Process id; 0 if the clone has no process.
    pub pid: u32,
    /// True if every property is proven.
    pub ok: bool,
    /// The properties. Without the mappings of the process, only those that could be judged.
    pub checks: Vec<Check>,
}

/// The mounts of this host.
pub struct Host {
    listing: Listing,
    inodes: Arc<Inodes>,
    /// Devices of all Stencil mounts, known to this runtime directory or not.
    devices: HashSet<u64>,
    /// Stencil mounts without a readable record in this runtime directory.
    strangers: Vec<MountLine>,
}

impl Checked {
    /// Creates the row of a clone whose record names another template than the expected one.
    pub fn of_other_template(candidate: &Candidate, recorded: &Digest, expected: &Digest) -> Checked {
        let pid = candidate.pids.first().copied().unwrap_or(0);
        Checked {
            id: candidate.id.clone(),
            pid,
            ok: false,
            checks: vec![Check::other_template(recorded, expected)],
        }
    }
}

impl Host {
    /// Lists the mounts.
    ///
    /// # Errors
    /// Returns an error if the runtime directory or a store cannot be read.
    pub fn new() -> Result<Host> {
        let listing = control::list()?;
        let mut table = procfs::mounts()?;
        table.retain(|line| line.fs_type == procfs::FS_TYPE);
        // Processes can still map the files of detached mounts.
        let known: HashSet<u64> =
            listing.mounts.iter().chain(&listing.dead).map(|mount| mount.device).collect();
        let devices = table.iter().map(|line| line.dev).chain(known.iter().copied()).collect();
        table.retain(|line| !known.contains(&line.dev));
        Ok(Host { inodes: Arc::new(Inodes::of(&listing.mounts)?), listing, devices, strangers: table })
    }

    /// Takes the errors of the records of mounts that cannot be read. Processes of these mounts are not among the
    /// [users](Host::users).
    pub fn take_unread(&mut self) -> Vec<Error> {
        std::mem::take(&mut self.listing.unread)
    }

    /// Returns the mountpoints of wanted Stencil mounts without a readable record in this runtime directory. `is_wanted`
    /// gets the path of the mount's store.
    pub fn strangers(&self, is_wanted: impl Fn(&Path) -> bool) -> impl Iterator<Item = &Path> {
        let wanted = self.strangers.iter().filter(move |line| is_wanted(Path::new(&line.source)));
        wanted.map(|line| line.mountpoint.as_path())
    }

    /// Returns every process that maps a file of the wanted mounts of this runtime directory, alive or dead, and the
    /// processes that could not be inspected. `is_wanted` gets the path and the identity of the mount's store. Commands of
    /// this program are left out.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be listed.
    pub fn users(&self, is_wanted: impl Fn(&Path, &str) -> bool) -> Result<(Vec<u32>, Unseen)> {
        let alive = self.listing.mounts.iter().filter(|mount| is_wanted(&mount.store, &mount.store_id));
        let dead = self.listing.dead.iter().filter(|mount| is_wanted(&mount.store, &mount.store_id));
        let wanted: HashSet<u64> =
            alive.map(|mount| mount.device).chain(dead.map(|mount| mount.device)).collect();
        // A stacking file system has a device of its own.
        let (devices, mapped) = (self.devices.clone(), self.inodes.wanted()?);
        let own = std::process::id();
        let sight = holders::look_at_all(SCAN_TIMEOUT, move |pid| {
            if pid == own {
                return Ok(None);
            }
            let is_user = |dev, ino| match devices.contains(&dev) {
                true => wanted.contains(&dev),
                false => mapped.has(dev, ino),
            };
            let lines = procfs::maps(pid, is_user).map_err(io::Error::other)?.unwrap_or_default();
            Ok((!lines.is_empty() && !facts::is_command(pid, &lines)).then_some(()))
        })?;
        Ok((sight.seen.into_iter().map(|(pid, ())| pid).collect(), sight.unseen))
    }

    /// Checks these clones. `serving` is how files must be served; without, as their mount would serve them now.
    pub fn check(&self, candidates: &[Candidate], serving: Option<Served>) -> Vec<Checked> {
        let mut pids: Vec<u32> =
            candidates.iter().flat_map(|candidate| candidate.pids.iter().copied()).collect();
        pids.sort_unstable();
        pids.dedup();
        let inodes = Arc::clone(&self.inodes);
        let look = move |pid| Some(facts::look(pid, &inodes));
        let looks = holders::look_slowly(pids, SLOW_INSPECTION, INSPECTION_TIMEOUT, look);
        let looks: BTreeMap<u32, Look> = looks.seen.into_iter().collect();
        let mut statuses: BTreeMap<usize, Status> = BTreeMap::new();
        let maps = looks.values().filter_map(|look| look.as_ref().ok()?.as_ref()?.measured.as_ref());
        for map in maps.flat_map(|(clone, _)| &clone.maps) {
            statuses.entry(map.mount).or_insert_with(|| status(&self.listing.mounts[map.mount]));
        }
        let judge = Judge {
            mounts: &self.listing.mounts,
            dead: &self.listing.dead,
            devices: &self.devices,
            inodes: &self.inodes,
            statuses: &statuses,
            serving,
        };
        candidates.iter().flat_map(|candidate| of_candidate(candidate, &looks, &judge)).collect()
    }
}

fn status(mount: &Mount) -> Status {
    if mount.orphaned {
        return Err(mount.lost_supervisor());
    }
    mount.status()
}

/// Returns a row for each process of a clone that maps a template or could not be inspected, at least one row.
fn of_candidate(candidate: &Candidate, looks: &BTreeMap<u32, Look>, judge: &Judge<'_>) -> Vec<Checked> {
    let silent: Look = Err(Error::try_again(format!(
        "the process could not be inspected within {} s",
        INSPECTION_TIMEOUT.as_secs()
    ))
    .hint("run 'stencil doctor' to find the unresponsive file system that blocks the process"));
    let exited: Look = Ok(None);
    let look = |pid: &u32| (*pid, looks.get(pid).unwrap_or(&silent));
    let all: Vec<(u32, &Look)> = candidate.pids.iter().map(look).collect();
    let is_relevant = |look: &Look| match look {
        Ok(Some(facts)) => judge.maps_a_template(facts),
        Ok(None) => false,
        Err(_) => true,
    };
    let mut relevant: Vec<(u32, &Look)> = all.iter().copied().filter(|(_, look)| is_relevant(look)).collect();
    if relevant.is_empty() {
        relevant.push(all.first().copied().unwrap_or((0, &exited)));
    }
    let row = |(pid, look): (u32, &Look)| {
        let checks = match look {
            Ok(Some(facts)) => judge.of(facts, candidate.digest.as_ref()),
            Ok(None) => vec![Check::exited()],
            Err(error) => vec![Check::not_inspected(error)],
        };
        Checked { id: candidate.id.clone(), pid, ok: checks.iter().all(|check| check.ok), checks }
    };
    relevant.into_iter().map(row).collect()
}
