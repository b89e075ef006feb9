//! Termination signals. Some of them may abort a mount that is in use.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level::pipe};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::inherited;

/// Handlers for SIGTERM, SIGINT and, unless SIGHUP was ignored at startup, SIGHUP.
#[derive(Debug)]
pub struct Signals {
    /// Becomes readable when a signal arrives.
    wakeup: OwnedFd,
    /// True after a signal that aborts a mount which is already draining. SIGHUP never does, as the end of a terminal
    /// or session sends several signals. SIGTERM does not under a service manager: systemd sends another SIGTERM if the
    /// first did not end the service in time.
    may_abort: Arc<AtomicBool>,
}

impl Signals {
    /// Installs the handlers: the signals no longer terminate the process.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn new() -> Result<Signals> {
        let managed = std::env::var_os("NOTIFY_SOCKET").as_deref().is_some_and(|name| name != OsStr::new(""));
        let aborting = if managed { &[SIGINT][..] } else { &[SIGINT, SIGTERM] };
        let may_abort = Arc::new(AtomicBool::new(false));
        let install = || -> std::io::Result<OwnedFd> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            // These handlers come before the pipe, so that the flag is set before a byte can be read.
            for signal in aborting {
                flag::register(*signal, Arc::clone(&may_abort))?;
            }
            // SIGHUP stays ignored if the caller used nohup(1).
            let handled =
                [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|&signal| !inherited::is_ignored(signal));
            for signal in handled {
                pipe::register(signal, theirs.try_clone()?)?;
            }
            Ok(ours.into())
        };
        let wakeup = install().map_err(|e| Error::failed("cannot install signal handlers").because(e))?;
        Ok(Signals { wakeup, may_abort })
    }

    /// Consumes the pending signals. Returns `None` if no signal is pending, otherwise whether one of them may abort
    /// the mount.
    pub fn take_pending(&self) -> Option<bool> {
        rustix::io::read(&self.wakeup, &mut [0; 64]).ok()?;
        Some(self.may_abort.swap(false, Ordering::Relaxed))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }
}
