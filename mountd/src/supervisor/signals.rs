//! Termination signals, and which of them may abort a mount in use.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level::pipe};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::inherited;

/// Handlers for SIGTERM, SIGINT and, unless the caller ignores it, SIGHUP.
#[derive(Debug)]
pub struct Signals {
    woken: OwnedFd,
    /// True after a signal that aborts a mount which is draining already. SIGHUP is not one: a terminal or session that
    /// ends sends several signals. Nor is SIGTERM under a service manager: systemd sends another one if the first did
    /// not end the service in time.
    may_abort: Arc<AtomicBool>,
}

impl Signals {
    /// Installs the handlers: the signals no longer terminate the process.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn new() -> Result<Signals> {
        let managed = std::env::var_os("NOTIFY_SOCKET").as_deref().is_some_and(|name| name != OsStr::new(""));
        let cutting = if managed { &[SIGINT][..] } else { &[SIGINT, SIGTERM] };
        let may_abort = Arc::new(AtomicBool::new(false));
        let install = || -> std::io::Result<OwnedFd> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            // Registered before the pipe: a reader of the byte sees the flag.
            for signal in cutting {
                flag::register(*signal, Arc::clone(&may_abort))?;
            }
            // SIGHUP stays ignored if the caller used nohup(1).
            let heard =
                [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|&signal| !inherited::is_ignored(signal));
            for signal in heard {
                pipe::register(signal, theirs.try_clone()?)?;
            }
            Ok(ours.into())
        };
        let woken = install().map_err(|e| Error::failed("cannot install signal handlers").because(e))?;
        Ok(Signals { woken, may_abort })
    }

    /// Takes pending signals: `None` without any, else whether one of them may abort.
    pub fn take(&self) -> Option<bool> {
        rustix::io::read(&self.woken, &mut [0; 64]).ok()?;
        Some(self.may_abort.swap(false, Ordering::Relaxed))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }
}
