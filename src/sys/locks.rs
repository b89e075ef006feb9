//! Locks of files (flock(2)): waits that end, and who holds one, as `/proc/locks` lists it.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock, fstat, major, minor};
use rustix::io::Errno;

use super::procfs::read_text;

/// How often a lock is tried again: a blocking flock(2) has no time limit, and goes on after a signal handler.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Takes a lock, shared or exclusive; false where it is still held after `limit`, or when `is_over` says that nobody wants it
/// any more.
///
/// # Errors
/// The system's.
pub fn wait(
    file: impl AsFd,
    exclusive: bool,
    limit: Duration,
    is_over: impl Fn() -> bool,
) -> io::Result<bool> {
    let operation = match exclusive {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    let until = Instant::now() + limit;
    loop {
        match flock(file.as_fd(), operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < until && !is_over() => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Processes that have locked the file with flock(2), as far as they can be seen: none of another PID namespace, and on
/// filesystems that show another device than they have (btrfs) nobody.
pub fn flock_holders(file: impl AsFd) -> Vec<u32> {
    let Ok(stat) = fstat(file) else { return Vec::new() };
    let Ok(text) = read_text(Path::new("/proc/locks")) else { return Vec::new() };
    let place = format!("{:02x}:{:02x}:{}", major(stat.st_dev), minor(stat.st_dev), stat.st_ino);
    holders(&text, &place)
}

fn holders(text: &str, place: &str) -> Vec<u32> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // One that waits has an arrow there.
        let is_lock = words.next()? == "FLOCK";
        let pid = words.nth(2)?.parse().ok()?;
        (is_lock && pid != 0 && words.next()? == place).then_some(pid)
    });
    let mut pids: Vec<u32> = lines.collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_told_from_those_who_wait() {
        let text = "1: FLOCK  ADVISORY  READ  30 fe:00:77 0 EOF\n\
                    1: -> FLOCK  ADVISORY  WRITE 31 fe:00:77 0 EOF\n\
                    2: FLOCK  ADVISORY  READ  12 fe:00:77 0 EOF\n\
                    3: FLOCK  ADVISORY  READ  0 fe:00:77 0 EOF\n\
                    4: POSIX  ADVISORY  READ  13 fe:00:77 0 EOF\n\
                    5: FLOCK  ADVISORY  READ  14 fe:00:777 0 EOF\n\
                    6: FLOCK\n\nnothing of that kind\n";
        assert_eq!(holders(text, "fe:00:77"), [12, 30]);
    }

    #[test]
    fn the_kernel_names_us() {
        let file = tempfile::tempfile().unwrap();
        assert!(flock_holders(&file).is_empty());
        flock(&file, FlockOperation::LockShared).unwrap();
        assert_eq!(flock_holders(&file), [std::process::id()]);
    }

    #[test]
    fn a_wait_for_a_lock_ends() {
        let held = tempfile::NamedTempFile::new().unwrap();
        flock(held.as_file(), FlockOperation::LockShared).unwrap();
        let other = held.reopen().unwrap();
        let moment = Duration::from_millis(20);
        assert!(wait(&other, false, Duration::ZERO, || false).unwrap());
        assert!(!wait(&other, true, moment, || false).unwrap());
        assert!(!wait(&other, true, Duration::from_secs(3600), || true).unwrap());
        drop(held);
        assert!(wait(&other, true, moment, || false).unwrap());
    }
}
