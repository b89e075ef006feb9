//! State that a program inherits from its parent: signal dispositions, the signal mask, resource limits. (The runtime
//! of the standard library opens `/dev/null` on closed standard streams and ignores SIGPIPE.)

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Signals that a supervisor blocks while it executes another program.
pub(in crate::sys) const HELD: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Sets every signal to its default disposition and clears the signal mask, whatever the parent ignored or blocked.
/// Call this function before anything else.
///
/// * An ignored SIGHUP stays ignored, for nohup(1). An ignored SIGINT does not, although a shell without job control
///   ignores SIGINT for background commands: `kill -INT` is documented as a way to stop a command cleanly.
/// * SIGPIPE stays ignored, as the runtime has set it, so that write(2) fails with EPIPE.
/// * SIGXFSZ is ignored, so that writing beyond `ulimit -f` fails with EFBIG, which an error can report.
/// * `held` keeps those signals blocked that [`block_signals`](crate::sys::process::block_signals) blocked before an
///   exec.
pub fn reset(held: bool) {
    // SAFETY: sigaction(2) and signal(2) with SIG_DFL or SIG_IGN install no handler; the sets and the action are
    // initialised before they are read. For signals that cannot be changed the call fails, which is harmless.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            let keeps = matches!(signal, libc::SIGPIPE | libc::SIGHUP);
            if !keeps && is_ignored(signal) {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut blocked);
        if held {
            for signal in HELD {
                libc::sigaddset(&raw mut blocked, signal);
            }
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut());
    }
}

/// Returns true if the signal is ignored.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: the call initialises the action on success, and only then is the action read.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Makes the command start with the default disposition of every signal and an empty signal mask.
pub fn default_signals(command: &mut Command) -> &mut Command {
    // SAFETY: signal(2), sigemptyset(3) and sigprocmask(2) are async-signal-safe and do not allocate.
    unsafe {
        command.pre_exec(|| {
            for signal in 1..=libc::SIGRTMAX() {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        })
    }
}

/// Raises the soft resource limits of a daemon to the hard limits, so that the limits of the starting shell do not
/// apply. Returns the errors of the limits that could not be raised.
pub fn raise_limits() -> Vec<io::Error> {
    let all = [
        Resource::Nofile,
        Resource::Fsize,
        Resource::As,
        Resource::Data,
        Resource::Cpu,
        Resource::Memlock,
        Resource::Nproc,
    ];
    let raise = |resource| {
        let now = getrlimit(resource);
        setrlimit(resource, Rlimit { current: now.maximum, ..now }).err().map(io::Error::from)
    };
    all.into_iter().filter_map(raise).collect()
}
