//! Starting, forking, signalling and reaping processes. [`ProcessId`] identifies a process.

#[cfg(feature = "internals")]
pub mod address_space;
#[cfg(feature = "internals")]
pub mod cgroup;
#[cfg(feature = "internals")]
pub mod exit_status;
pub mod holders;
mod id;
pub mod inherited;
#[cfg(feature = "internals")]
pub mod paused;
pub mod procfs;
#[cfg(feature = "internals")]
pub mod search_path;
#[cfg(feature = "internals")]
pub mod session;
pub mod tasks;
pub mod threads;
#[cfg(feature = "internals")]
pub mod times;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions};

use crate::error::{Error, Result};
use crate::sys::poll::poll_for;
pub use id::{ProcessId, Thread, has_ended, pidfd};

/// The side of a fork on which the caller runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The child process.
    Child,
    /// The parent process, with the pid of the child.
    Parent(u32),
}

/// Forks this process, which must have a single thread, so that the child may call any function.
///
/// # Errors
/// Returns an error if the process has other threads or fork(2) fails.
pub fn fork_single_threaded() -> Result<Fork> {
    /// A joined thread may remain in `/proc/self/task` for a moment.
    const JOIN_DELAY: Duration = Duration::from_millis(50);
    // The link count of the directory is two more than the number of threads (`proc_task_getattr` of the kernel).
    let count = || fs::metadata("/proc/self/task").map_or(0, |task| task.nlink().saturating_sub(2));
    let deadline = Instant::now() + JOIN_DELAY;
    let mut threads = count();
    while threads > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        threads = count();
    }
    if threads != 1 {
        return Err(Error::failed(format!("cannot fork: expected 1 thread, found {threads}")));
    }
    // SAFETY: no other thread exists (checked above, and only another thread could have created one since), so no lock
    // is held by a thread that does not exist in the child.
    match unsafe { libc::fork() } {
        -1 => Err(Error::failed("cannot fork")
            .because(io::Error::last_os_error())
            .hint("raise the process limits: ulimit -u, kernel.pid_max, pids.max of the cgroup")),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid.cast_unsigned())),
    }
}

/// Ends this process immediately, without destructors and exit handlers, which belong to the process that forked.
pub fn leave(code: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Starts the command in a new session, so that neither a hangup nor keys of a terminal affect it, with default signal
/// dispositions and only the standard streams open: a daemon must not keep the pipes of its caller open. Descriptors
/// for [`inherit`] must be added afterwards.
pub fn own_session(command: &mut Command) -> &mut Command {
    crate::sys::process::inherited::default_signals(command);
    // SAFETY: setsid and close_range are async-signal-safe and do not allocate; close_range only marks the descriptors
    // close-on-exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            match libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }
}

/// Disables transparent huge pages, and 2 MiB entries for files, for this process and its later children
/// (`PR_SET_THP_DISABLE`).
///
/// # Errors
/// Returns an error if prctl(2) fails.
pub fn avoid_huge_pages() -> Result<()> {
    let failed = |e: rustix::io::Errno| Error::failed("cannot switch huge pages off").because(e.into());
    rustix::thread::disable_transparent_huge_pages(true).map_err(failed)
}

/// Kills the command (SIGKILL) when the thread that starts it ends.
pub fn die_with_starter(command: &mut Command) -> &mut Command {
    let starter = rustix::process::getpid();
    // SAFETY: prctl and getppid are async-signal-safe and do not allocate.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            match rustix::process::getppid() == Some(starter) {
                true => Ok(()),
                // The parent ended before the death signal was set.
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        })
    }
}

/// Passes a descriptor to the command under its number. Commands that are started concurrently do not inherit it.
pub fn inherit(command: &mut Command, fd: OwnedFd) -> &mut Command {
    // SAFETY: fcntl is async-signal-safe; the closure owns the descriptor, so it is open in the child.
    unsafe {
        command.pre_exec(move || {
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
            Ok(())
        })
    }
}

/// Passes descriptors to the command under their numbers. They must stay open until the command is started.
pub fn inherit_all<'a>(command: &'a mut Command, fds: &[BorrowedFd<'_>]) -> &'a mut Command {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: fcntl is async-signal-safe and accesses no memory; for a number that is no longer open the call fails,
    // and with it the start of the command.
    unsafe {
        command.pre_exec(move || {
            for &number in &numbers {
                if libc::fcntl(number, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        })
    }
}

/// Blocks or unblocks the signals SIGTERM, SIGINT and SIGHUP; blocked signals stay pending. A process blocks them
/// before it executes another program and until that program is ready to handle them.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn block_signals(hold: bool) -> io::Result<()> {
    // SAFETY: sigemptyset initialises the set before it is read; no call accesses other memory.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in crate::sys::process::inherited::HELD {
            libc::sigaddset(&raw mut set, signal);
        }
        let how = if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Makes the kernel kill this process (SIGKILL) when its parent ends. Returns false if the parent has already ended.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn set_parent_death_signal(parent: u32) -> Result<bool> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| Error::failed("cannot set parent death signal").because(e.into()))?;
    Ok(rustix::process::getppid().is_some_and(|pid| pid.as_raw_nonzero().get().cast_unsigned() == parent))
}

/// Reverts [`set_parent_death_signal`].
///
/// # Errors
/// Returns an error if the system call fails.
pub fn clear_parent_death_signal() -> Result<()> {
    rustix::process::set_parent_process_death_signal(None)
        .map_err(|e| Error::failed("cannot clear parent death signal").because(e.into()))
}

/// Makes this process ignore SIGHUP. The kernel sends SIGHUP to a stopped process when its process group becomes
/// orphaned, that is, when the last process ends that could have continued it.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn ignore_hangup() -> io::Result<()> {
    // SAFETY: ignoring a signal installs no handler and accesses no memory.
    match unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// How a child process terminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The process exited with this code.
    Code(i32),
    /// This signal terminated the process.
    Signal(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Ended::Code(code) => write!(f, "exit code {code}"),
            Ended::Signal(number) => write!(f, "killed by {}", signal_name(number)),
        }
    }
}

/// Sends a signal to a child that has not been reaped, so its pid cannot have been reused. Succeeds for a zombie.
///
/// # Errors
/// Returns an error without permission to signal the child, which may run as another user.
pub fn signal_child(pid: u32, signal: Signal) -> Result<()> {
    let failed = |e: Errno| Error::failed(format!("cannot signal process {pid}")).because(e.into());
    let target = Pid::from_raw(pid.cast_signed()).ok_or_else(|| failed(Errno::SRCH))?;
    rustix::process::kill_process(target, signal).map_err(failed)
}

/// Returns the name of a signal (`SIGSEGV`), or `signal N` for an uncommon one.
pub fn signal_name(number: i32) -> String {
    let name = match number {
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS",
        libc::SIGKILL => "SIGKILL",
        libc::SIGTERM => "SIGTERM",
        libc::SIGABRT => "SIGABRT",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGSYS => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

/// Returns a descriptor that is readable after a child has terminated, until [`clear_child_exits`] reads it. Blocks
/// SIGCHLD in the calling thread and in its later children. A wait for any child examines all children, so callers wait
/// only after such an event.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn child_exits() -> Result<OwnedFd> {
    // SAFETY: sigemptyset initialises the set before it is read; no call accesses other memory. On success the
    // descriptor is new, so nothing else owns it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => {
                Err(Error::failed("cannot watch for exits of children").because(io::Error::last_os_error()))
            }
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Makes a descriptor of [`child_exits`] unreadable until the next exit.
pub fn clear_child_exits(exits: impl AsFd) {
    // All pending exits are one signal.
    let _ = rustix::io::read(exits, &mut [0; size_of::<libc::signalfd_siginfo>()]);
}

/// Reaps one child that has terminated. Returns `None` if none has terminated or there is no child.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn reap_one() -> Result<Option<(u32, Ended)>> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let ended = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Ended::Code(code),
                    (None, Some(signal)) => Ended::Signal(signal),
                    (None, None) => continue,
                };
                return Ok(Some((pid.as_raw_nonzero().get().cast_unsigned(), ended)));
            }
            Ok(None) | Err(Errno::CHILD) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot wait for children").because(e.into())),
        }
    }
}

/// Waits up to `timeout` for the child of a pidfd and reaps it. Returns `None` if the child is still alive or the
/// process is not a child.
pub fn reap(pidfd: impl AsFd, timeout: Duration) -> Option<Ended> {
    poll_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(timeout)).ok().filter(|ready| *ready > 0)?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options).ok().flatten()?;
    status.exit_status().map(Ended::Code).or_else(|| status.terminating_signal().map(Ended::Signal))
}

/// Sleeps until a signal kills this process.
pub fn sleep_until_killed() -> ! {
    loop {
        rustix::event::pause();
    }
}

static FAULT_NOTIFY: AtomicI32 = AtomicI32::new(-1);
static FAULT_WAIT: AtomicI32 = AtomicI32::new(-1);
static FAULT_MESSAGE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static FAULT_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Pauses this process at its next SIGSEGV, so that another process can inspect it: the handler writes `message` to
/// `notify`, waits for a second SIGSEGV or for the end of file on `wait`, and then lets the fault kill the process as
/// usual. A second signal is used instead of a byte, because a byte could be read by any process that waits on the same
/// pipe. Both descriptors must stay open.
///
/// # Errors
/// Returns an error if the handler cannot be installed.
pub fn pause_at_fault(notify: impl AsFd, wait: impl AsFd, message: &'static [u8]) -> Result<()> {
    extern "C" fn handler(_signal: libc::c_int) {
        let mut byte = 0u8;
        // SAFETY: write and read are async-signal-safe; pointer and length were stored before the handler was
        // installed, and describe a static slice. For a closed descriptor the call only fails.
        unsafe {
            let (message, length) =
                (FAULT_MESSAGE.load(Ordering::Acquire), FAULT_LENGTH.load(Ordering::Acquire));
            libc::write(FAULT_NOTIFY.load(Ordering::Acquire), message.cast(), length);
            while libc::read(FAULT_WAIT.load(Ordering::Acquire), (&raw mut byte).cast(), 1) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
        }
        // Because of SA_RESETHAND and SA_NODEFER, a SIGSEGV during the wait kills the process, and so does the fault
        // when the instruction is executed again after the return.
    }
    FAULT_NOTIFY.store(notify.as_fd().as_raw_fd(), Ordering::Release);
    FAULT_WAIT.store(wait.as_fd().as_raw_fd(), Ordering::Release);
    FAULT_MESSAGE.store(message.as_ptr().cast_mut(), Ordering::Release);
    FAULT_LENGTH.store(message.len(), Ordering::Release);
    // SAFETY: the action is fully initialised; the handler uses only async-signal-safe calls and atomics.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::failed("cannot install handler for SIGSEGV").because(io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_with_several_threads_is_refused() {
        // The test harness runs each test in a separate thread.
        assert!(fork_single_threaded().is_err());
    }
}
