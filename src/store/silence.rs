//! Waiting for a pipe or a socket, for as long as is wanted and no longer than its silence is borne.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// How often a reader that waits looks whether it is to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// Waits until something can be read. `check` says whether to go on; `fail` words what the system says. False when
/// nothing came for `limit`; a `limit` of `None` or zero is none.
pub(super) fn wait_readable(
    file: &File,
    limit: Option<Duration>,
    check: impl Fn() -> Result<()>,
    fail: impl Fn(io::Error) -> Error,
) -> Result<bool> {
    let limit = limit.filter(|limit| !limit.is_zero());
    let start = Instant::now();
    loop {
        check()?;
        let timeout = Timespec { tv_sec: 0, tv_nsec: PATIENCE.subsec_nanos().into() };
        match poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&timeout)) {
            // Asked after the poll: what came while this process was stopped counts.
            Ok(0) if limit.is_some_and(|limit| start.elapsed() >= limit) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(fail(e.into())),
        }
    }
}

/// What to do about a sender that is silent.
pub(super) const REMEDY: &str = "see whether the sender still runs and its link is up, then run it again from the start; \
                                 --stall-timeout SECONDS waits longer, 0 without end";
