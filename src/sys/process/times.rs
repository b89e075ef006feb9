//! Start times of processes and threads.

use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::sys::process::procfs;

/// Returns the start time of a process in current wall-clock time, rounded up to a clock tick, or `None` if the process
/// has exited.
///
/// # Errors
/// Returns an error if `/proc/PID/stat` cannot be read.
pub fn started_at(pid: u32) -> Result<Option<SystemTime>> {
    let Some(stat) = procfs::stat(pid)? else { return Ok(None) };
    let at = after_ticks(stat.start_ticks.saturating_add(1));
    let now = SystemTime::now();
    Ok(Some(now.checked_sub(since_boot().saturating_sub(at)).unwrap_or(now)))
}

/// Returns the start time of a process since boot, rounded down to a clock tick, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if `/proc/PID/stat` cannot be read.
pub fn start_since_boot(pid: u32) -> Result<Option<Duration>> {
    Ok(procfs::stat(pid)?.map(|stat| after_ticks(stat.start_ticks)))
}

/// Returns the time since boot, in the time namespace of this process.
pub fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

fn after_ticks(ticks: u64) -> Duration {
    Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1))
}

/// Returns true if a thread certainly started after a given time since boot. Returns false within the same clock tick,
/// and for a thread that has exited. Does not block.
///
/// # Errors
/// Returns an error if `/proc/TID/stat` cannot be read.
pub fn is_later_thread(tid: u32, time: Duration) -> Result<bool> {
    Ok(procfs::stat(tid)?.is_some_and(|stat| after_ticks(stat.start_ticks) > time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_later_than_its_start_only() {
        let (me, now) = (std::process::id(), since_boot());
        assert!(!is_later_thread(me, now).unwrap());
        assert!(is_later_thread(me, Duration::ZERO).unwrap());
        assert!(!is_later_thread(u32::MAX >> 1, Duration::ZERO).unwrap(), "no such thread");
    }
}
