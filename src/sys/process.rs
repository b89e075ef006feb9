//! Processes: started, forked, signalled, reaped. Which process is meant: [`ProcessId`].

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions};

pub use super::process_id::{ProcessId, has_ended, pidfd};
use super::wait::poll_for;
use crate::error::{Error, Result};

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, and the pid of the new one.
    Parent(u32),
}

/// Forks this process, which must have one thread only: then the child may do whatever the parent might.
///
/// # Errors
/// When there are other threads, or the system is out of processes.
pub fn fork_single_threaded() -> Result<Fork> {
    /// A thread that was joined is listed for a moment longer.
    const MOMENT: Duration = Duration::from_millis(50);
    let count = || fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    let until = Instant::now() + MOMENT;
    let mut threads = count();
    while threads > 1 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
        threads = count();
    }
    if threads != 1 {
        return Err(Error::failed(format!("cannot fork safely: this process has {threads} threads, not 1")));
    }
    // SAFETY: no other thread exists (checked above; only another thread could have made one since), so no
    // lock is held by a thread that the child would lack.
    match unsafe { libc::fork() } {
        -1 => Err(Error::failed("cannot fork")
            .because(io::Error::last_os_error())
            .remedy("see the limits on processes: ulimit -u, kernel.pid_max, pids.max of the control group")),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid as u32)),
    }
}

/// Ends this process at once: no destructors, no exit handlers (those belong to the process that forked).
pub fn leave(code: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// The command gets a session of its own, so that neither a terminal's end nor its keys reach it, and no
/// descriptors but the standard ones: a process that lives on must not hold its caller's pipes open. Signals have their
/// default dispositions in it. What it is to [`inherit`] is named afterwards.
pub fn own_session(command: &mut Command) -> &mut Command {
    super::inherited::default_signals(command);
    // SAFETY: setsid and close_range are async-signal-safe and allocate nothing; descriptors are marked to
    // be closed at exec, none is closed here.
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

/// The command is killed when the thread that starts it ends.
pub fn die_with_starter(command: &mut Command) -> &mut Command {
    let starter = rustix::process::getpid();
    // SAFETY: prctl and getppid are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            match rustix::process::getppid() == Some(starter) {
                true => Ok(()),
                // It ended before it could be asked for the signal.
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        })
    }
}

/// The command inherits this descriptor under its number. Others that are started meanwhile do not.
pub fn inherit(command: &mut Command, fd: OwnedFd) -> &mut Command {
    // SAFETY: one fcntl, async-signal-safe; the closure owns the descriptor, so it is open in the child.
    unsafe {
        command.pre_exec(move || {
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
            Ok(())
        })
    }
}

/// The command inherits all these under their numbers. They must stay open until it is started.
pub fn inherit_all<'a>(command: &'a mut Command, fds: &[BorrowedFd<'_>]) -> &'a mut Command {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: fcntl is async-signal-safe and touches no memory; a number that is not open any more is an error of the
    // call, which fails the start.
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

/// Holds back signals that would end this process, or lets them come again: what arrives meanwhile waits. A process
/// that becomes another program holds them back from before until the new program is ready for them.
///
/// # Errors
/// The system's.
pub fn hold_signals(hold: bool) -> io::Result<()> {
    // SAFETY: the set is initialised by sigemptyset before it is read; both calls touch nothing else.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in super::inherited::HELD {
            libc::sigaddset(&raw mut set, signal);
        }
        let how = if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// From now on this process dies with its parent. False when the parent has gone already.
///
/// # Errors
/// When the kernel refuses.
pub fn die_with_parent(parent: u32) -> Result<bool> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| Error::failed("cannot ask for a death signal").because(e.into()))?;
    Ok(rustix::process::getppid().is_some_and(|pid| pid.as_raw_nonzero().get() as u32 == parent))
}

/// Undoes [`die_with_parent`].
///
/// # Errors
/// When the kernel refuses.
pub fn outlive_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(None)
        .map_err(|e| Error::failed("cannot give up the death signal").because(e.into()))
}

/// From now on SIGHUP does not end this process. The kernel sends it to processes that stand still when the last one
/// dies that could have let them go on.
///
/// # Errors
/// The system's.
pub fn outlive_hangup() -> io::Result<()> {
    // SAFETY: ignoring a signal installs no handler and touches no memory.
    match unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
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

/// Signals a child that has not been reaped, so that no other process can have its number. One that has
/// ended already is no error.
///
/// # Errors
/// When this user may not signal it (it has changed its user).
pub fn signal_child(pid: u32, signal: Signal) -> Result<()> {
    let failed = |e: Errno| Error::failed(format!("cannot signal process {pid}")).because(e.into());
    let target = Pid::from_raw(pid as i32).ok_or_else(|| failed(Errno::SRCH))?;
    rustix::process::kill_process(target, signal).map_err(failed)
}

/// The name of a signal (`SIGSEGV`), or its number.
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

/// A child that has ended, and how; `None` when none has, or there is no child.
///
/// # Errors
/// When the system call fails.
pub fn reap_one() -> Result<Option<(u32, Ended)>> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let ended = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Ended::Code(code),
                    (None, Some(signal)) => Ended::Signal(signal),
                    (None, None) => continue,
                };
                return Ok(Some((pid.as_raw_nonzero().get() as u32, ended)));
            }
            Ok(None) | Err(Errno::CHILD) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot wait for children").because(e.into())),
        }
    }
}

/// How the child of that descriptor has ended, within `patience`; it is reaped then. `None` for one that lives longer, and
/// for a process that is no child.
pub fn reap(pidfd: impl AsFd, patience: Duration) -> Option<Ended> {
    poll_for(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(patience)).ok().filter(|ready| *ready > 0)?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options).ok().flatten()?;
    status.exit_status().map(Ended::Code).or_else(|| status.terminating_signal().map(Ended::Signal))
}

/// Sleeps until a signal ends this process.
pub fn sleep_until_killed() -> ! {
    loop {
        rustix::event::pause();
    }
}

static FAULT_TELL: AtomicI32 = AtomicI32::new(-1);
static FAULT_WAIT: AtomicI32 = AtomicI32::new(-1);
static FAULT_WORDS: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static FAULT_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// At its next SIGSEGV this process writes `words` to `tell`, waits for a second SIGSEGV (or the end of
/// `wait`), and then dies of it as it would have: whoever holds the other ends may look at it before. The
/// second signal has one process as its receiver, where a byte could be read by any that waits.
/// Both descriptors must stay open.
///
/// # Errors
/// When the handler cannot be installed.
pub fn pause_at_fault(tell: impl AsFd, wait: impl AsFd, words: &'static [u8]) -> Result<()> {
    extern "C" fn handler(_signal: libc::c_int) {
        let mut byte = 0u8;
        // SAFETY: write and read are async-signal-safe; pointer and length were stored together, before the
        // handler was installed, and are of a static slice. A closed descriptor is only an error of the call.
        unsafe {
            let (words, length) = (FAULT_WORDS.load(Ordering::Acquire), FAULT_LENGTH.load(Ordering::Acquire));
            libc::write(FAULT_TELL.load(Ordering::Acquire), words.cast(), length);
            while libc::read(FAULT_WAIT.load(Ordering::Acquire), (&raw mut byte).cast(), 1) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
        }
        // SA_RESETHAND and SA_NODEFER: a signal that comes while this waits ends the process, and so does the
        // fault when returning runs the instruction again.
    }
    FAULT_TELL.store(tell.as_fd().as_raw_fd(), Ordering::Release);
    FAULT_WAIT.store(wait.as_fd().as_raw_fd(), Ordering::Release);
    FAULT_WORDS.store(words.as_ptr().cast_mut(), Ordering::Release);
    FAULT_LENGTH.store(words.len(), Ordering::Release);
    // SAFETY: the action is fully initialised; the handler uses async-signal-safe calls and atomics only.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::failed("cannot watch for faults").because(io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forking_with_threads_is_refused() {
        // The test harness runs this in a thread of its own.
        assert!(fork_single_threaded().is_err());
    }
}
