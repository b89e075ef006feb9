//! Groups processes by address space with kcmp(2). Several processes share one address space after clone(2) with
//! `CLONE_VM`, and after vfork(2) until the child calls execve(2). Pages, page tables and mappings of a shared address
//! space exist once, although `/proc` shows them for each of the processes.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::sync::Arc;

use super::holders::{self, Looks, SCAN_TIMEOUT};
use super::id::ProcessId;
use crate::error::{Error, Result};
use crate::sys::process::tasks;

/// `KCMP_VM` of `linux/kcmp.h`.
const VM: libc::c_int = 1;

/// Returns the distinct address spaces of the given processes, each as its list of processes, the oldest process first.
/// The second value of each process is a thread that has its memory: the first thread may have exited. Only processes
/// with the same key `K` (their `maps`) are compared; equal keys are common after fork(2). If a comparison exceeds
/// [`SCAN_TIMEOUT`], the whole group of processes with that key is reported in `unseen`.
///
/// # Errors
/// Returns an error if kcmp(2) fails: the number of address spaces is then unknown.
pub fn distinct<K: Hash + Eq>(
    processes: impl Iterator<Item = (ProcessId, u32, K)>,
) -> Result<Looks<Vec<ProcessId>>> {
    let mut alike: HashMap<K, Vec<(ProcessId, u32)>> = HashMap::new();
    for (process, thread, maps) in processes {
        alike.entry(maps).or_default().push((process, thread));
    }
    let (mut found, mut groups) = (Looks { seen: Vec::new(), unseen: Vec::new() }, HashMap::new());
    for mut group in alike.into_values() {
        group.sort_unstable_by_key(|(process, _)| process.identity);
        let (process, _) = group[0];
        let first = process.pid;
        match group.len() {
            1 => found.seen.push((first, vec![process])),
            _ => drop(groups.insert(first, group)),
        }
    }
    // kcmp(2) blocks on a process whose memory cannot be accessed at the moment, so each group has a time limit.
    let groups = Arc::new(groups);
    let compared = {
        let groups = Arc::clone(&groups);
        let each: Vec<u32> = groups.keys().copied().collect();
        holders::look_at_each(each, SCAN_TIMEOUT, move |first| groups.get(&first).map(|group| split(group)))
    };
    for (_, spaces) in compared.seen {
        found.seen.extend(spaces.map_err(cannot_compare)?.into_iter().map(|space| (space[0].pid, space)));
    }
    let of_group = |first: &u32| groups.get(first).into_iter().flatten().map(|(process, _)| process.pid);
    found.unseen.extend(compared.unseen.iter().flat_map(of_group));
    found.seen.sort_unstable_by_key(|(pid, _)| *pid);
    found.unseen.sort_unstable();
    Ok(found)
}

fn split(group: &[(ProcessId, u32)]) -> io::Result<Vec<Vec<ProcessId>>> {
    // Binary insertion instead of a sort: kcmp's order is not total while processes exit, and a sort may panic then.
    let mut spaces: Vec<(u32, Vec<ProcessId>)> = Vec::with_capacity(group.len());
    let mut alone = Vec::new();
    for (process, thread) in group {
        let thread = *thread;
        let (mut low, mut high) = (0, spaces.len());
        let mut same = None;
        while low < high && same.is_none() {
            let middle = low.midpoint(high);
            match compare(spaces[middle].0, thread)? {
                Ordering::Equal => same = Some(middle),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        match same {
            // Threads without memory compare as equal. The process is exiting.
            Some(_) if tasks::thread_with_memory(process.pid)?.is_none() => alone.push(vec![*process]),
            Some(at) => spaces[at].1.push(*process),
            None => spaces.insert(low, (thread, vec![*process])),
        }
    }
    alone.extend(spaces.into_iter().map(|(_, space)| space));
    Ok(alone)
}

/// Compares the address spaces of two threads. The result is `Equal` for a shared address space, otherwise an order
/// that is stable while both threads live. The result is `Less` if either thread has exited.
fn compare(one: u32, other: u32) -> io::Result<Ordering> {
    let (one, other) = (one.cast_signed(), other.cast_signed());
    // SAFETY: kcmp compares two threads and accesses no memory of this process.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, VM, 0, 0) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        code if code > 0 => Ok(Ordering::Greater),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(Ordering::Less),
            error => Err(error),
        },
    }
}

fn cannot_compare(error: io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSYS) => "boot a kernel with CONFIG_KCMP",
        _ => "run the command as root, so that the clones of all users can be counted",
    };
    Error::failed("cannot compare the address spaces of processes").because(error).hint(remedy)
}

#[cfg(test)]
mod tests {
    use crate::sys::process::address_space::*;
    use std::process::Command;

    #[test]
    fn separates_processes_with_equal_maps() {
        let mut children: Vec<_> =
            (0..5).map(|_| Command::new("sleep").arg("100").spawn().unwrap()).collect();
        let pids = children.iter().map(|child| child.id()).chain([std::process::id()]);
        let all: Vec<ProcessId> = pids.map(|pid| ProcessId::of(pid).unwrap().unwrap()).collect();
        let twice = all.iter().chain([&all[5], &all[2]]).map(|process| (*process, process.pid, ()));
        let found = distinct(twice).unwrap();
        let mut spaces: Vec<Vec<ProcessId>> = found.seen.into_iter().map(|(_, space)| space).collect();
        spaces.sort_by_key(|space| (space.len(), space[0].identity));
        let expected: Vec<Vec<ProcessId>> =
            [0, 1, 3, 4].map(|i| vec![all[i]]).into_iter().chain([5, 2].map(|i| vec![all[i]; 2])).collect();
        assert_eq!((spaces, found.unseen), (expected, vec![]));
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
