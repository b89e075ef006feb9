//! Pipes, named or not, and terminals: opened and written without a wait that no signal and no time limit could end.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::wait::poll_for;
use crate::error::{Error, Result};

/// How often a reader or writer that waits looks whether it is to stop.
const INTERVAL: Duration = Duration::from_millis(100);

/// After `POLLOUT` a pipe takes so many bytes at once (`PIPE_BUF`).
const AT_ONCE: usize = 4096;

/// Opens a file for reading. A named pipe without a writer is opened as well: whoever reads it polls it first.
///
/// # Errors
/// The system's.
pub fn open_source(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Waits until something can be read. `check` says whether to go on; `fail` words what the system says. False when
/// nothing came for `limit`; a `limit` of `None` or zero is none.
///
/// # Errors
/// Those of `check` and `fail`.
pub fn wait_readable(
    file: &File,
    limit: Option<Duration>,
    check: impl Fn() -> Result<()>,
    fail: impl Fn(io::Error) -> Error,
) -> Result<bool> {
    let limit = limit.filter(|limit| !limit.is_zero());
    let start = Instant::now();
    loop {
        check()?;
        match poll_for(&mut [PollFd::new(file, PollFlags::IN)], Some(INTERVAL)) {
            // Asked after the poll: what came while this process was stopped counts.
            Ok(0) if limit.is_some_and(|limit| start.elapsed() >= limit) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(fail(e.into())),
        }
    }
}

/// A pipe, a terminal or a file that is written in order. Waits for its reader, but not beyond an interrupt.
#[derive(Debug)]
pub struct Sink<'a> {
    file: File,
    /// Whether a write comes back in place of waiting.
    non_blocking: bool,
    interrupt: Option<&'a AtomicBool>,
}

impl<'a> Sink<'a> {
    /// Opens what is there for writing. A named pipe is waited for until it has a reader: at most for `limit`, where
    /// there is one that is not zero.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) when nobody reads it; [`Code::Failed`](crate::error::Code) after
    /// an interrupt; the system's.
    pub fn open(path: &Path, limit: Option<Duration>, interrupt: Option<&'a AtomicBool>) -> Result<Sink<'a>> {
        let start = Instant::now();
        loop {
            if is_set(interrupt) {
                return Err(Error::failed("interrupted: nobody read it yet").at(path));
            }
            let mut options = OpenOptions::new();
            match options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path) {
                Ok(file) => return Ok(Sink { file, non_blocking: true, interrupt }),
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
                Err(e) => return Err(Error::io("cannot write", path, e)),
            }
            if let Some(limit) = limit.filter(|limit| !limit.is_zero() && start.elapsed() >= *limit) {
                return Err(Error::try_again(format!(
                    "nobody has opened it for reading for {} s",
                    limit.as_secs_f64()
                ))
                .at(path)
                .remedy("start its reader, then run it again; --stall-timeout SECONDS waits longer, 0 without end"));
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Standard output. The descriptor is shared with others, so it is not made non-blocking: a pipe is opened again.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn stdout(interrupt: Option<&'a AtomicBool>) -> Result<Sink<'a>> {
        let failed = |e: io::Error| Error::failed("cannot write to standard output").because(e);
        let shared = File::from(rustix::io::dup(io::stdout()).map_err(|e| failed(e.into()))?);
        let is_pipe = shared.metadata().map_err(failed)?.file_type().is_fifo();
        let again = || {
            let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()
        };
        Ok(match is_pipe.then(again).flatten() {
            Some(file) => Sink { file, non_blocking: true, interrupt },
            None => Sink { file: shared, non_blocking: false, interrupt },
        })
    }

    /// Waits until something can be written.
    fn wait(&self) -> io::Result<()> {
        loop {
            if is_set(self.interrupt) {
                return Err(io::Error::other("interrupted"));
            }
            match poll_for(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(INTERVAL)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn is_set(interrupt: Option<&AtomicBool>) -> bool {
    interrupt.is_some_and(|interrupt| interrupt.load(Ordering::Relaxed))
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.wait()?;
            let most = if self.non_blocking { bytes.len() } else { bytes.len().min(AT_ONCE) };
            match rustix::io::write(self.file.as_fd(), bytes.get(..most).unwrap_or_default()) {
                // Made non-blocking by another process that has it open.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
