//! The limits of the host and of a cgroup, and what the present clones say about them.

use std::collections::HashMap;
use std::path::Path;

use super::growth::Interval;
use super::present::{Present, PresentClone};
use super::resources::{self, Bounds, Resource};
use crate::error::{Error, Result};
use crate::store::Template;
use crate::sys::limits;
use crate::sys::process::cgroup::{self, GroupMemory};
use crate::sys::process::procfs;
use crate::units::{Bytes, PageCount, approximate};

/// Memory of the kernel for one task besides page tables: its stack, which has 16 KiB on x86-64, is the least.
const KERNEL_STACK: f64 = 16.0 * 1024.0;

/// The same with descriptions of process, memory and mappings, measured as the kernel memory of a cgroup that a simulated
/// clone adds. Used where no cgroup counts it.
const KERNEL_MEMORY: f64 = 48.0 * 1024.0;

/// Returns the cgroup with this directory and those above it. Without a directory, the cgroup of the present clones is
/// used if they have one in common.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn groups(directory: Option<&Path>, present: &Present) -> Result<Vec<GroupMemory>> {
    let is_given = directory.is_some();
    let directory = match directory {
        // The cgroups of the clones are compared with this directory.
        Some(directory) => directory.canonicalize().unwrap_or(directory.to_owned()),
        None => {
            let mut of_clones = present.clones.iter().map(|clone| &clone.cgroup);
            let Some(Some(first)) = of_clones.next() else { return Ok(Vec::new()) };
            if of_clones.any(|other| other.as_ref() != Some(first)) {
                return Ok(Vec::new());
            }
            first.clone()
        }
    };
    let groups = cgroup::memory_groups(&directory)?;
    if groups.is_empty() && is_given {
        return Err(Error::not_found("no memory cgroup").at(directory).hint(
            "name a directory below /sys/fs/cgroup with the file memory.max or memory.limit_in_bytes",
        ));
    }
    Ok(groups)
}

/// Returns the cgroup that leaves the least memory below a limit, and this limit.
pub fn tightest(
    groups: &[GroupMemory],
    limit: impl Fn(&GroupMemory) -> Option<Bytes>,
) -> Option<(&GroupMemory, Bytes)> {
    let limited = groups.iter().filter_map(|group| Some((group, limit(group)?)));
    limited.min_by_key(|(group, limit)| group.left_below(*limit))
}

/// Returns how much of the use of a cgroup may be a stock of the processors: memory that is charged before it is used.
pub fn charged_ahead() -> Bytes {
    /// Pages that a processor charges at once (`MEMCG_CHARGE_BATCH` of the kernel).
    const BATCH: u64 = 64;
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    PageCount::new(BATCH * processors).bytes()
}

/// Returns the memory of the kernel for one clone, besides page tables. The counter of a cgroup includes memory of other
/// processes, so it is divided by all of them.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn kernel_memory(group: Option<&GroupMemory>, present: &Present) -> Result<Interval> {
    let tasks = present.bounds(|clone| clone.tasks).map_or(1, |tasks| tasks.estimate.max(1));
    let least = KERNEL_STACK * approximate(tasks);
    let usual = KERNEL_MEMORY.max(least);
    let Some((group, kernel)) = group.and_then(|group| Some((group, group.kernel?))) else {
        return Ok(Interval::new(least, usual, 2.0 * usual));
    };
    let inside = |clone: &&PresentClone| clone.is_inside(&group.path);
    let page_tables: Bytes = present.clones.iter().filter(inside).map(|clone| clone.page_tables).sum();
    let processes =
        cgroup::tree(&group.path)?.iter().map(|path| cgroup::processes(path)).sum::<Result<u64>>()?;
    if processes == 0 || !present.clones.iter().any(|clone| inside(&clone)) {
        return Ok(Interval::new(least, usual, 2.0 * usual));
    }
    let measured = approximate(kernel.saturating_sub(page_tables).get()) / approximate(processes);
    // The counter has memory of other uses too, and lacks what was allocated before a process entered the cgroup.
    Ok(Interval::new(0.0, measured, measured.max(least)))
}

/// Returns the limit on reserved memory, if the kernel has one.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn commit(template: &Template, present: &Present) -> Result<Option<Resource>> {
    let Some(left) = limits::reservable()? else { return Ok(None) };
    let mut reserved = HashMap::new();
    for pid in present.clones.iter().map(PresentClone::pid) {
        reserved.insert(pid, limits::reserved(pid)?.unwrap_or(Bytes::ZERO).get());
    }
    // Every private writable mapping is charged in full; flags such as MAP_NORESERVE do not count in this mode.
    let per_clone = present.bounds(|clone| reserved[&clone.pid()]);
    let per_clone = per_clone.unwrap_or(Bounds::exact(template.size().get()));
    let (least, most) = (approximate(left.by_others.get()), approximate(left.by_root.get()));
    Ok(Some(resources::commit(Interval::new(least, most, most), per_clone)))
}

/// Returns the limits on processes and threads of which the fewest are left.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn tasks(directory: Option<&Path>, present: &Present) -> Result<Option<Resource>> {
    let per_clone = present.bounds(|clone| clone.tasks).unwrap_or(Bounds::exact(1));
    let used = limits::tasks()?;
    let mut left: Vec<(String, u64)> = Vec::new();
    for name in ["kernel.pid_max", "kernel.threads-max"] {
        left.push((name.to_owned(), limits::sysctl(name)?.saturating_sub(used)));
    }
    let first = present.clones.first();
    // A given cgroup need not be that of the present clones.
    let of_clones = first.filter(|_| directory.is_none()).map(PresentClone::pid);
    if let Some((group, tasks)) = cgroup::tasks_left(of_clones, directory)? {
        left.push((group.join("pids.max").display().to_string(), tasks));
    }
    // The kernel does not apply this limit to root.
    if let Some(clone) = first.filter(|clone| clone.uid != 0)
        && let Some(limit) = limits::tasks_of_user(clone.pid())?
    {
        left.push(("RLIMIT_NPROC".to_owned(), limit.saturating_sub(tasks_of(clone.uid)?)));
    }
    let least = left.into_iter().min_by_key(|(_, left)| *left);
    Ok(least.map(|(limit, left)| resources::tasks(limit, left, per_clone)))
}

/// Returns the limit on the mappings of a process. Returns `None` without clones.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn mappings(present: &Present) -> Result<Option<Resource>> {
    let Some(of_clones) = present.bounds(|clone| clone.mappings) else { return Ok(None) };
    Ok(Some(resources::mappings(limits::sysctl("vm.max_map_count")?, of_clones)))
}

/// Counts the processes and threads of a user.
fn tasks_of(uid: u32) -> Result<u64> {
    let mut tasks = 0;
    for pid in procfs::pids()? {
        tasks += procfs::status(pid)?.filter(|status| status.uid == uid).map_or(0, |status| status.threads);
    }
    Ok(tasks)
}
