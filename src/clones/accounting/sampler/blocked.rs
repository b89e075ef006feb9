//! Threads that sleep uninterruptibly: in a page fault that a server does not answer, or in disk I/O.

use std::path::Path;

use crate::sys::process::{procfs, tasks};

/// The threads of a clone that sleep uninterruptibly, each with its number of voluntary context switches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sleepers(Vec<(u32, u64)>);

impl Sleepers {
    /// Finds them in these processes. Reads no file of `/proc` that a blocked process can block.
    pub fn of(pids: &[u32]) -> Sleepers {
        Sleepers(pids.iter().flat_map(|pid| sleeping_threads(*pid)).collect())
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if a thread slept earlier and has not woken up since: each sleep adds one context switch.
    pub fn any_in(&self, earlier: &Sleepers) -> bool {
        self.0.iter().any(|sleeper| earlier.0.contains(sleeper))
    }
}

fn sleeping_threads(pid: u32) -> Vec<(u32, u64)> {
    // Most clones have one thread, and most threads do not sleep so.
    let Ok(Some(stat)) = procfs::stat(pid) else { return Vec::new() };
    let threads = match stat.threads {
        1 if stat.state != 'D' => return Vec::new(),
        1 => vec![pid],
        _ => tasks::threads(pid).unwrap_or_default(),
    };
    threads.into_iter().filter_map(|tid| Some((tid, switches(&tasks::folder(pid, tid))?))).collect()
}

/// Returns the number of voluntary context switches of a thread that sleeps uninterruptibly.
fn switches(folder: &Path) -> Option<u64> {
    let status = procfs::read_text(&folder.join("status")).ok()?;
    parse(&status)
}

fn parse(status: &str) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if !field("State:")?.starts_with('D') {
        return None;
    }
    field("voluntary_ctxt_switches:")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uninterruptible_sleep_counts() {
        let status = |state: &str| {
            format!(
                "Name:\tstencil\nState:\t{state}\nTgid:\t7\nvoluntary_ctxt_switches:\t12\n\
                 nonvoluntary_ctxt_switches:\t5\n"
            )
        };
        assert_eq!(parse(&status("D (disk sleep)")), Some(12));
        for other in ["S (sleeping)", "R (running)", "T (stopped)", "Z (zombie)"] {
            assert_eq!(parse(&status(other)), None);
        }
        assert_eq!(parse(""), None);
        assert!(Sleepers::of(&[std::process::id(), u32::MAX]).is_empty());
    }

    #[test]
    fn a_thread_that_woke_up_in_between_is_not_blocked() {
        let sleepers = |all: &[(u32, u64)]| Sleepers(all.to_vec());
        let earlier = sleepers(&[(7, 12), (9, 3)]);
        assert!(sleepers(&[(9, 3)]).any_in(&earlier));
        assert!(!sleepers(&[(7, 13), (8, 12)]).any_in(&earlier));
        assert!(!sleepers(&[]).any_in(&earlier) && !earlier.any_in(&sleepers(&[])));
    }
}
