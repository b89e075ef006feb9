//! The identity of a process: a number that no process before or after it has.
//!
//! A pid is reused after its process has ended, and a start time (`/proc/PID/stat`) depends on the time namespace of
//! the reader. The inode number of a pidfd has neither problem: since Linux 6.9 it numbers all processes and threads
//! since boot and is the same in every namespace. Neither `pidfd_open` nor `fstat` blocks on the process, even if its
//! `/proc/PID/maps` or `stat` cannot be read because its `execve` is blocked.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys::poll::poll_for;
use crate::sys::process::procfs;

/// `PID_FS_MAGIC` of `linux/magic.h`. On a kernel without pidfs all pidfds have the same inode number.
const PIDFS_MAGIC: i64 = 0x5049_4446;

/// `PIDFD_THREAD` of `linux/pidfd.h`: the descriptor is of one thread, and signals go to that thread.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());

/// Opens a pidfd of the process that has this pid now. Returns `None` if there is none.
///
/// # Errors
/// Returns an error if the limit of open files is reached.
pub fn pidfd(pid: u32) -> Result<Option<OwnedFd>> {
    open_pidfd(pid, PidfdFlags::empty())
}

fn open_pidfd(number: u32, flags: PidfdFlags) -> Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(number).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, flags) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::failed(format!("cannot open process {number}")).because(e.into())),
    }
}

/// Returns true if the process of the pidfd has ended with all its threads, also while it is a zombie.
pub fn has_ended(pidfd: impl AsFd) -> bool {
    poll_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(Duration::ZERO)).is_ok_and(|n| n > 0)
}

/// A process, identified by its pid and by a number that is never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in this PID namespace.
    pub pid: u32,
    /// Inode number of the pidfd plus a random number of the boot, so that a record from before a reboot matches no
    /// current process. Within one boot, later processes have greater identities. Below 2^53, so exact as a JSON
    /// number.
    pub identity: u64,
}

impl ProcessId {
    /// Returns the process that has this pid now, which may be a zombie, or `None` if there is none.
    ///
    /// # Errors
    /// Returns an error if the limit of open files is reached or the kernel has no pidfs.
    pub fn of(pid: u32) -> Result<Option<ProcessId>> {
        let Some(fd) = pidfd(pid)? else { return Ok(None) };
        Ok(Some(ProcessId { pid, identity: identity_of(&fd)? }))
    }

    /// Returns the process that has this pid now and a pidfd of it, or `None` if there is none or it has ended.
    ///
    /// # Errors
    /// Same as [`ProcessId::of`].
    pub fn living(pid: u32) -> Result<Option<(ProcessId, OwnedFd)>> {
        let Some(fd) = pidfd(pid)?.filter(|fd| !has_ended(fd)) else { return Ok(None) };
        Ok(Some((ProcessId { pid, identity: identity_of(&fd)? }, fd)))
    }

    /// Returns this process.
    ///
    /// # Errors
    /// Same as [`ProcessId::of`].
    pub fn current() -> Result<ProcessId> {
        let pid = std::process::id();
        Self::of(pid)?.ok_or_else(|| Error::failed(format!("cannot open own process {pid}")))
    }

    /// Returns true while the process lives; false for a zombie. On failure (limit of open files) returns true, so that
    /// nothing that belongs to the process is removed.
    pub fn is_alive(&self) -> bool {
        self.open().map_or(true, |fd| fd.is_some())
    }

    /// Sends a signal. Returns false if the process has ended.
    ///
    /// # Errors
    /// Returns an error without permission to signal the process. Otherwise same as [`ProcessId::open`].
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let Some(fd) = self.open()? else { return Ok(false) };
        match rustix::process::pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::failed(format!("cannot signal process {}", self.pid)).because(e.into())),
        }
    }

    /// Waits up to `timeout` until the process has ended. Returns false if it is still alive.
    ///
    /// # Errors
    /// Returns an error if the process cannot be opened or polled.
    pub fn wait_for_exit(&self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let Some(fd) = self.open()? else { return Ok(true) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll_for(&mut [PollFd::new(&fd, PollFlags::IN)], Some(left)) {
                Ok(n) => return Ok(n > 0),
                Err(Errno::INTR) => {}
                Err(e) => {
                    let message = format!("cannot wait for process {}", self.pid);
                    return Err(Error::failed(message).because(e.into()));
                }
            }
        }
    }

    /// Opens a pidfd of this process. Returns `None` if it has ended.
    ///
    /// # Errors
    /// Same as [`ProcessId::of`].
    pub fn open(&self) -> Result<Option<OwnedFd>> {
        let living = Self::living(self.pid)?;
        Ok(living.filter(|(now, _)| now == self).map(|(_, fd)| fd))
    }

    /// Opens a pidfd of this process, which may be a zombie. Returns `None` if it was reaped.
    ///
    /// # Errors
    /// Same as [`ProcessId::of`].
    pub fn open_unreaped(&self) -> Result<Option<OwnedFd>> {
        let Some(fd) = pidfd(self.pid)? else { return Ok(None) };
        Ok((identity_of(&fd)? == self.identity).then_some(fd))
    }
}

/// One thread of a process. A later thread with the same number is not mistaken for this thread.
#[derive(Debug)]
pub struct Thread {
    tid: u32,
    pidfd: OwnedFd,
}

impl Thread {
    /// Returns the thread that has this number now, or `None` if there is none.
    ///
    /// # Errors
    /// Returns an error if the limit of open files is reached.
    pub fn of(tid: u32) -> Result<Option<Thread>> {
        Ok(open_pidfd(tid, PIDFD_THREAD)?.map(|pidfd| Thread { tid, pidfd }))
    }

    /// Sends a signal to this thread. Returns false if the thread has ended.
    ///
    /// SIGSTOP stops all threads of the process. A signal to the process is taken by any of its threads: until that
    /// happens, this thread could return from the system call in which it waits, and go on.
    ///
    /// # Errors
    /// Returns an error without permission to signal the process.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::failed(format!("cannot signal thread {}", self.tid)).because(e.into())),
        }
    }
}

fn identity_of(pidfd: &OwnedFd) -> Result<u64> {
    let failed = |e: Errno| Error::failed("cannot read inode number of pidfd").because(e.into());
    let boot = boot_number(pidfd)?;
    Ok(boot + rustix::fs::fstat(pidfd).map_err(failed)?.st_ino)
}

/// Returns a number below 2^52 that is derived from the kernel's boot id: the same for all processes until the next
/// boot.
fn boot_number(pidfd: &OwnedFd) -> Result<u64> {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    if let Some(number) = NUMBER.get() {
        return Ok(*number);
    }
    let kind = rustix::fs::fstatfs(pidfd).map(|fs| fs.f_type);
    if kind != Ok(PIDFS_MAGIC) {
        return Err(Error::failed("cannot identify processes: this kernel has no pidfs")
            .hint("use Linux 6.9 or later, with CONFIG_FS_PID"));
    }
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = procfs::read_text(path)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    // 13 of the 32 hexadecimal digits: the first 12 and the last. Version and variant digits of the UUID are constant.
    let random = digits.get(..12).zip(digits.get(31..32)).map(|(first, last)| format!("{first}{last}"));
    let number = random.and_then(|random| u64::from_str_radix(&random, 16).ok());
    let number = number.ok_or_else(|| Error::failed("invalid boot id").at(path))?;
    Ok(*NUMBER.get_or_init(|| number))
}

#[cfg(test)]
mod tests {
    use crate::sys::process::id::*;
    use crate::sys::process::own_session;
    use std::process::Command;

    #[test]
    fn identity_distinguishes_processes_with_equal_pid() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive() && me.identity < 1 << 53);
        let other = ProcessId { identity: me.identity + 1, ..me };
        assert!(!other.is_alive());
        // A signal for an ended process must not reach a later process with its pid, which here is this test.
        assert!(!other.signal(Signal::KILL).unwrap());
        assert!(other.wait_for_exit(Duration::ZERO).unwrap());
        assert!(!me.wait_for_exit(Duration::from_millis(1)).unwrap());
    }

    #[test]
    fn a_signal_to_a_thread_stops_and_kills_its_process() {
        let mut child = own_session(&mut Command::new("sleep")).arg("100").spawn().unwrap();
        let thread = Thread::of(child.id()).unwrap().unwrap();
        assert!(thread.signal(Signal::STOP).unwrap());
        let until = Instant::now() + Duration::from_secs(5);
        while procfs::stat(child.id()).unwrap().unwrap().state != 'T' {
            assert!(Instant::now() < until, "the process was not stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(thread.signal(Signal::KILL).unwrap());
        child.wait().unwrap();
        assert!(!thread.signal(Signal::KILL).unwrap());
        assert!(Thread::of(u32::MAX >> 1).unwrap().is_none());
    }

    #[test]
    fn detects_the_end_of_a_killed_child() {
        let mut child = own_session(&mut Command::new("sleep")).arg("100").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        assert!(
            id.identity > ProcessId::current().unwrap().identity,
            "later processes have greater identities"
        );
        assert!(id.signal(Signal::KILL).unwrap());
        assert!(id.wait_for_exit(Duration::from_secs(5)).unwrap());
        assert!(!id.is_alive(), "a zombie is not alive");
        assert_eq!(ProcessId::of(child.id()).unwrap(), Some(id), "a zombie keeps its identity");
        child.wait().unwrap();
        assert!(!id.signal(Signal::TERM).unwrap());
    }
}
