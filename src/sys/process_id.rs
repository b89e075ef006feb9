//! The identity of a process: one number that no other process has, before or after it.
//!
//! A pid is given to another process once its process has ended, and a start time (`/proc/PID/stat`) depends on the time
//! namespace of the reader. The inode number of a pidfd does neither: since Linux 6.9 it is a count of all processes
//! since boot, the same in every namespace. Neither `pidfd_open` nor `fstat` waits for the process, also not for one
//! whose `/proc/PID/maps` or `stat` cannot be read because its `execve` does not come to an end.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use super::procfs;
use super::wait::poll_for;
use crate::error::{Error, Result};

/// `PID_FS_MAGIC` of `linux/magic.h`. Without pidfs all pidfds have one inode number.
const PIDFS_MAGIC: i64 = 0x5049_4446;

/// A descriptor of the process that has this number now; `None` when there is none.
///
/// # Errors
/// The system's, when it is out of descriptors.
pub fn pidfd(pid: u32) -> Result<Option<OwnedFd>> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::failed(format!("cannot open process {pid}")).because(e.into())),
    }
}

/// True once the process of that descriptor has ended with all of its threads, also while it is a zombie.
pub fn has_ended(pidfd: impl AsFd) -> bool {
    poll_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(Duration::ZERO)).is_ok_and(|n| n > 0)
}

/// One process: a pid may be given again, its identity may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number, in this PID namespace.
    pub pid: u32,
    /// The inode number of its pidfd, plus a number of the boot: a record from before a reboot names no process of now.
    /// Within a boot a later process has a greater one. Fits into a number of JSON (below 2^53).
    pub identity: u64,
}

impl ProcessId {
    /// The process that has this number now, which may be a zombie; `None` when there is none.
    ///
    /// # Errors
    /// When the system is out of descriptors or has no pidfs.
    pub fn of(pid: u32) -> Result<Option<ProcessId>> {
        let Some(fd) = pidfd(pid)? else { return Ok(None) };
        Ok(Some(ProcessId { pid, identity: identity_of(&fd)? }))
    }

    /// The process that has this number now, with a descriptor of it; `None` when there is none or it has ended.
    ///
    /// # Errors
    /// As [`ProcessId::of`].
    pub fn living(pid: u32) -> Result<Option<(ProcessId, OwnedFd)>> {
        let Some(fd) = pidfd(pid)?.filter(|fd| !has_ended(fd)) else { return Ok(None) };
        Ok(Some((ProcessId { pid, identity: identity_of(&fd)? }, fd)))
    }

    /// This process.
    ///
    /// # Errors
    /// As [`ProcessId::of`].
    pub fn me() -> Result<ProcessId> {
        let pid = std::process::id();
        Self::of(pid)?.ok_or_else(|| Error::failed(format!("process {pid} cannot find itself")))
    }

    /// True while this process lives; false for a zombie. Where it cannot be told (out of descriptors), it counts as
    /// alive: nothing of it is removed.
    pub fn is_alive(&self) -> bool {
        self.open().map_or(true, |fd| fd.is_some())
    }

    /// Sends a signal. False when the process is gone.
    ///
    /// # Errors
    /// When this user may not signal it, or as [`ProcessId::open`].
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let Some(fd) = self.open()? else { return Ok(false) };
        match rustix::process::pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::failed(format!("cannot signal process {}", self.pid)).because(e.into())),
        }
    }

    /// Waits until the process is gone. False when it still lives after `patience`.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn wait_gone(&self, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        let Some(fd) = self.open()? else { return Ok(true) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll_for(&mut [PollFd::new(&fd, PollFlags::IN)], Some(left)) {
                Ok(n) => return Ok(n > 0),
                Err(Errno::INTR) => {}
                Err(e) => {
                    return Err(Error::failed(format!("cannot watch process {}", self.pid)).because(e.into()));
                }
            }
        }
    }

    /// A descriptor of exactly this process; `None` when it has ended.
    ///
    /// # Errors
    /// As [`ProcessId::of`].
    pub fn open(&self) -> Result<Option<OwnedFd>> {
        let living = Self::living(self.pid)?;
        Ok(living.filter(|(now, _)| now == self).map(|(_, fd)| fd))
    }

    /// A descriptor of exactly this process, which may be a zombie; `None` after the process was reaped.
    ///
    /// # Errors
    /// As [`ProcessId::of`].
    pub fn open_unreaped(&self) -> Result<Option<OwnedFd>> {
        let Some(fd) = pidfd(self.pid)? else { return Ok(None) };
        Ok((identity_of(&fd)? == self.identity).then_some(fd))
    }
}

fn identity_of(pidfd: &OwnedFd) -> Result<u64> {
    let failed = |e: Errno| Error::failed("cannot identify a process").because(e.into());
    let boot = boot_number(pidfd)?;
    Ok(boot + rustix::fs::fstat(pidfd).map_err(failed)?.st_ino)
}

/// A number below 2^52 of this boot.
fn boot_number(pidfd: &OwnedFd) -> Result<u64> {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    if let Some(number) = NUMBER.get() {
        return Ok(*number);
    }
    let kind = rustix::fs::fstatfs(pidfd).map(|fs| fs.f_type);
    if kind != Ok(PIDFS_MAGIC) {
        return Err(Error::failed("cannot tell processes apart: this kernel has no pidfs")
            .remedy("use Linux 6.9 or later, with CONFIG_FS_PID"));
    }
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = procfs::read_text(path)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    // The first 12 digits and the last one: version and variant of the UUID are the same everywhere.
    let random = digits.get(..12).zip(digits.get(31..32)).map(|(first, last)| format!("{first}{last}"));
    let number = random.and_then(|random| u64::from_str_radix(&random, 16).ok());
    let number = number.ok_or_else(|| Error::failed("the kernel does not name its boot").at(path))?;
    Ok(*NUMBER.get_or_init(|| number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::own_session;
    use std::process::Command;

    #[test]
    fn a_process_is_known_by_pid_and_identity() {
        let me = ProcessId::me().unwrap();
        assert!(me.is_alive() && me.identity < 1 << 53);
        let other = ProcessId { identity: me.identity + 1, ..me };
        assert!(!other.is_alive());
        // A signal for a process that is no more must not reach its successor: this one would end the test.
        assert!(!other.signal(Signal::KILL).unwrap());
        assert!(other.wait_gone(Duration::ZERO).unwrap());
        assert!(!me.wait_gone(Duration::from_millis(1)).unwrap());
    }

    #[test]
    fn a_killed_child_is_seen_to_go() {
        let mut child = own_session(&mut Command::new("sleep")).arg("100").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        assert!(id.identity > ProcessId::me().unwrap().identity, "later processes have greater identities");
        assert!(id.signal(Signal::KILL).unwrap());
        assert!(id.wait_gone(Duration::from_secs(5)).unwrap());
        assert!(!id.is_alive(), "a zombie does not live");
        assert_eq!(ProcessId::of(child.id()).unwrap(), Some(id), "but it still has its number");
        child.wait().unwrap();
        assert!(!id.signal(Signal::TERM).unwrap());
    }
}
