//! poll(2) with a limit that is a [`Duration`].

use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};

/// Waits until one of them has something to say; no longer than `limit`, where there is one. A limit that no clock can
/// hold is none.
///
/// # Errors
/// The system's, `EINTR` among them.
pub fn poll_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> rustix::io::Result<usize> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    poll(fds, limit.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::PollFlags;
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
