//! File locks (flock(2)): waits with a time limit, and lock holders as listed in `/proc/locks`.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock, fstat, major, minor};
use rustix::io::Errno;

use crate::sys::process::procfs::read_text;

/// Interval between attempts to lock. A blocking flock(2) has no time limit and may restart after a signal handler.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Locks a file, shared or exclusive. Returns false if another process still holds a conflicting lock after `limit`, or
/// if `is_over` reports that the caller has given up.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn wait(
    file: impl AsFd,
    exclusive: bool,
    limit: Duration,
    is_over: impl Fn() -> bool,
) -> io::Result<bool> {
    let started = Instant::now();
    let waits = || if started.elapsed() < limit && !is_over() { Ok(()) } else { Err(()) };
    Ok(wait_while(file, exclusive, waits)?.is_ok())
}

/// Locks a file, shared or exclusive. While another process holds a conflicting lock, `check` is called again and
/// again; its error ends the wait.
///
/// # Errors
/// Returns the outer error if the system call fails, and the inner one of `check`.
pub fn wait_while<E>(
    file: impl AsFd,
    exclusive: bool,
    mut check: impl FnMut() -> Result<(), E>,
) -> io::Result<Result<(), E>> {
    let operation = match exclusive {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    loop {
        match flock(file.as_fd(), operation) {
            Ok(()) => return Ok(Ok(())),
            Err(Errno::WOULDBLOCK | Errno::INTR) => match check() {
                Ok(()) => std::thread::sleep(RETRY_INTERVAL),
                over => return Ok(over),
            },
            Err(e) => return Err(e.into()),
        }
    }
}

/// Returns the processes that hold a flock(2) lock on the file, as far as `/proc/locks` shows them. Processes in other
/// PID namespaces are missing. On file systems whose lock entries have another device number than stat(2) returns
/// (btrfs) the result is empty.
pub fn flock_holders(file: impl AsFd) -> Vec<u32> {
    let Ok(stat) = fstat(file) else { return Vec::new() };
    let Ok(text) = read_text(Path::new("/proc/locks")) else { return Vec::new() };
    let inode = format!("{:02x}:{:02x}:{}", major(stat.st_dev), minor(stat.st_dev), stat.st_ino);
    holders(&text, &inode)
}

fn holders(text: &str, inode: &str) -> Vec<u32> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // A waiting lock has an arrow in this column.
        let is_lock = words.next()? == "FLOCK";
        let pid = words.nth(2)?.parse().ok()?;
        (is_lock && pid != 0 && words.next()? == inode).then_some(pid)
    });
    let mut pids: Vec<u32> = lines.collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use crate::sys::files::file_locks::*;

    #[test]
    fn distinguishes_holders_from_waiters() {
        let text = "1: FLOCK  ADVISORY  READ  30 fe:00:77 0 EOF\n\
                    1: -> FLOCK  ADVISORY  WRITE 31 fe:00:77 0 EOF\n\
                    2: FLOCK  ADVISORY  READ  12 fe:00:77 0 EOF\n\
                    3: FLOCK  ADVISORY  READ  0 fe:00:77 0 EOF\n\
                    4: POSIX  ADVISORY  READ  13 fe:00:77 0 EOF\n\
                    5: FLOCK  ADVISORY  READ  14 fe:00:777 0 EOF\n\
                    6: FLOCK\n\nunrelated text\n";
        assert_eq!(holders(text, "fe:00:77"), [12, 30]);
    }

    #[test]
    fn finds_own_lock_in_proc_locks() {
        let file = tempfile::tempfile().unwrap();
        assert!(flock_holders(&file).is_empty());
        flock(&file, FlockOperation::LockShared).unwrap();
        assert_eq!(flock_holders(&file), [std::process::id()]);
    }

    #[test]
    fn waiting_for_a_lock_times_out() {
        let held = tempfile::NamedTempFile::new().unwrap();
        flock(held.as_file(), FlockOperation::LockShared).unwrap();
        let other = held.reopen().unwrap();
        let timeout = Duration::from_millis(20);
        assert!(wait(&other, false, Duration::ZERO, || false).unwrap());
        assert!(!wait(&other, true, timeout, || false).unwrap());
        assert!(!wait(&other, true, Duration::from_secs(3600), || true).unwrap());
        drop(held);
        assert!(wait(&other, true, timeout, || false).unwrap());
    }
}
