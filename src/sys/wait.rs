//! poll(2) with a limit that is a [`Duration`], and a writer that waits.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until one of them has something to say; no longer than `limit`, where there is one. A limit that no clock can
/// hold is none.
///
/// # Errors
/// The system's, `EINTR` among them.
pub fn poll_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> rustix::io::Result<usize> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    poll(fds, limit.as_ref())
}

/// Writes to a descriptor without a buffer, and waits where the descriptor is non-blocking and takes nothing: a pipe or
/// terminal that was inherited can be made so by another process that has it open.
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
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_limit_ends_the_wait_and_the_longest_is_none() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let begun = Instant::now();
        let wait = |limit| poll_for(&mut [PollFd::new(&ours, PollFlags::IN)], limit);
        assert_eq!(wait(Some(Duration::from_millis(5))), Ok(0));
        assert!(begun.elapsed() >= Duration::from_millis(5));
        drop(theirs);
        assert_eq!((wait(Some(Duration::MAX)), wait(None)), (Ok(1), Ok(1)));
    }
}
