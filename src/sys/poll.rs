//! poll(2) with a [`Duration`] as time limit, and a writer that waits on non-blocking descriptors.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until a descriptor is ready, at most for `limit`. A `limit` that does not fit into a timespec means no limit.
///
/// # Errors
/// Returns an error if the system call fails, including `EINTR`.
pub fn poll_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> rustix::io::Result<usize> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    poll(fds, limit.as_ref())
}

/// Writes to a descriptor without buffering, and waits if a non-blocking descriptor accepts no data: another process
/// may have made the shared open file description of an inherited pipe or terminal non-blocking.
#[derive(Debug)]
pub struct Patient<F>(pub F);

impl<F: AsFd> Write for Patient<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.0, bytes) {
                Err(Errno::AGAIN) => poll_for(&mut [PollFd::new(&self.0, PollFlags::OUT)], None).map(drop)?,
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::poll::*;
    use std::time::Instant;

    #[test]
    fn poll_respects_the_limit_and_huge_limits_mean_none() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let start = Instant::now();
        let wait = |limit| poll_for(&mut [PollFd::new(&ours, PollFlags::IN)], limit);
        assert_eq!(wait(Some(Duration::from_millis(5))), Ok(0));
        assert!(start.elapsed() >= Duration::from_millis(5));
        drop(theirs);
        assert_eq!((wait(Some(Duration::MAX)), wait(None)), (Ok(1), Ok(1)));
    }
}
