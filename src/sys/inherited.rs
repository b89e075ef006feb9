//! What a program inherits from its parent: signal dispositions, the signal mask, limits. (Descriptors 0 to 2 that are
//! closed are opened on `/dev/null` by the runtime of the standard library, which also ignores SIGPIPE.)

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Signals that a supervisor holds back while it becomes another program.
pub(super) const HELD: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// To be called before anything else: gives every signal its default disposition and lets all of them in, whatever the
/// parent ignored or blocked.
///
/// * An ignored SIGHUP stays ignored: that is what nohup(1) is for. SIGINT does not, although a shell without job
///   control ignores it for background commands: `kill -INT` is documented to stop a command in good order.
/// * SIGPIPE is left as the runtime has set it: ignored, so that writing gives EPIPE.
/// * SIGXFSZ is ignored: writing beyond `ulimit -f` gives EFBIG, which an error can name.
/// * `held` leaves those blocked that [`hold_signals`](super::process::hold_signals) has blocked before an exec.
pub fn reset(held: bool) {
    // SAFETY: sigaction(2) and signal(2) with SIG_DFL or SIG_IGN install no handler; the sets and the action are
    // initialised before they are read. Signals that cannot be changed are errors of the call.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            let kept = matches!(signal, libc::SIGPIPE | libc::SIGHUP);
            if !kept && is_ignored(signal) {
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

/// True for a signal that is ignored.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: the action is only written by the call, and read when that succeeded.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// The command starts with the default disposition of every signal and none blocked.
pub fn default_signals(command: &mut Command) -> &mut Command {
    // SAFETY: signal(2), sigemptyset(3) and sigprocmask(2) are async-signal-safe and allocate nothing.
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

/// For a process that serves others: the limits of the shell that happened to start it are raised as far as an
/// administrator lets them be. Gives what could not be raised.
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
