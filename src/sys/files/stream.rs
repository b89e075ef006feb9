//! Pipes, FIFOs and terminals: open and write without a wait that neither a signal nor a time limit can end.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::poll::poll_for;

/// Interval at which a waiting reader or writer checks for an interrupt.
const INTERVAL: Duration = Duration::from_millis(100);

/// Bytes that a pipe accepts without blocking after `POLLOUT` (`PIPE_BUF`).
const PIPE_BUF: usize = 4096;

/// Opens a file for reading. Also opens a FIFO without a writer; the caller must poll before each read.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn open_source(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Waits until the file is readable. `check` returns an error to end the wait; `fail` converts the error of poll(2).
/// Returns false if nothing arrives for `limit`; `None` and zero mean no limit.
///
/// # Errors
/// Returns the error of `check` or `fail`.
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
            // The limit is checked after the poll, so that data counts that arrived while this process was stopped.
            Ok(0) if limit.is_some_and(|limit| start.elapsed() >= limit) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(fail(e.into())),
        }
    }
}

/// Sequential output to a pipe, a terminal or a file. Waits for a slow reader, but stops on an interrupt.
#[derive(Debug)]
pub struct Sink<'a> {
    file: File,
    /// True if write(2) returns EAGAIN instead of blocking.
    non_blocking: bool,
    interrupt: Option<&'a AtomicBool>,
}

impl<'a> Sink<'a> {
    /// Opens an existing file for writing. For a FIFO, waits until it has a reader, at most for `limit`; `None` and
    /// zero mean no limit.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if the FIFO has no reader after `limit`,
    /// [`Code::Failed`](crate::error::Code) after an interrupt, and an error if a system call fails.
    pub fn open(path: &Path, limit: Option<Duration>, interrupt: Option<&'a AtomicBool>) -> Result<Sink<'a>> {
        let start = Instant::now();
        loop {
            if is_set(interrupt) {
                return Err(Error::failed("interrupted while waiting for a reader").at(path));
            }
            let mut options = OpenOptions::new();
            match options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path) {
                Ok(file) => return Ok(Sink { file, non_blocking: true, interrupt }),
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
                Err(e) => return Err(Error::io("cannot write", path, e)),
            }
            if let Some(limit) = limit.filter(|limit| !limit.is_zero() && start.elapsed() >= *limit) {
                return Err(Error::try_again(format!(
                    "timed out after {} s waiting for a reader",
                    limit.as_secs_f64()
                ))
                .at(path)
                .hint(
                    "start the reader and run the command again, or set a longer --stall-timeout SECONDS (0: no limit)",
                ));
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Returns standard output. Its open file description is shared with other processes, so it must not be made
    /// non-blocking; a pipe is opened again instead.
    ///
    /// # Errors
    /// Returns an error if the limit of open files is reached.
    pub fn stdout(interrupt: Option<&'a AtomicBool>) -> Result<Sink<'a>> {
        let failed = |e: io::Error| Error::failed("cannot write to standard output").because(e);
        let shared = File::from(rustix::io::dup(io::stdout()).map_err(|e| failed(e.into()))?);
        let is_pipe = shared.metadata().map_err(failed)?.file_type().is_fifo();
        let reopen = || {
            let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).ok()
        };
        Ok(match is_pipe.then(reopen).flatten() {
            Some(file) => Sink { file, non_blocking: true, interrupt },
            None => Sink { file: shared, non_blocking: false, interrupt },
        })
    }

    /// Waits until the file is writable.
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
            let length = if self.non_blocking { bytes.len() } else { bytes.len().min(PIPE_BUF) };
            match rustix::io::write(self.file.as_fd(), bytes.get(..length).unwrap_or_default()) {
                // EAGAIN: another process has made the shared open file description non-blocking.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
