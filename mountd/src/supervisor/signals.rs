//! Signals that ask for the end of the mount, and which of them may cut off who uses it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level::pipe};
use stencilfs::error::{Error, Result};
use stencilfs::sys::inherited;

/// SIGTERM, SIGINT and, unless the caller has it ignored, SIGHUP, as they come.
#[derive(Debug)]
pub struct Signals {
    woken: OwnedFd,
    /// One has come that ends a mount which drains already. The end of a terminal or session is none: it sends several
    /// signals for one wish. Nor is a SIGTERM under a service manager: systemd sends a second one when the first did
    /// not end the service in time.
    cuts_off: Arc<AtomicBool>,
}

impl Signals {
    /// From now on they do not end this process.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Signals> {
        let managed = std::env::var_os("NOTIFY_SOCKET").as_deref().is_some_and(|name| name != OsStr::new(""));
        let cutting = if managed { &[SIGINT][..] } else { &[SIGINT, SIGTERM] };
        let cuts_off = Arc::new(AtomicBool::new(false));
        let begin = || -> std::io::Result<OwnedFd> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            // Before the byte that wakes: who reads that sees the flag.
            for signal in cutting {
                flag::register(*signal, Arc::clone(&cuts_off))?;
            }
            // An ignored SIGHUP stays so: the caller used nohup.
            let heard =
                [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|&signal| !inherited::is_ignored(signal));
            for signal in heard {
                pipe::register(signal, theirs.try_clone()?)?;
            }
            Ok(ours.into())
        };
        let woken = begin().map_err(|e| Error::failed("cannot wait for signals").because(e))?;
        Ok(Signals { woken, cuts_off })
    }

    /// Takes what has come: `None` for nothing, else whether one of them may cut off.
    pub fn take(&self) -> Option<bool> {
        rustix::io::read(&self.woken, &mut [0; 64]).ok()?;
        Some(self.cuts_off.swap(false, Ordering::Relaxed))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }
}
