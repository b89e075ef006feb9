//! Jobs: work that may take long or block runs in a child process, so that the supervisor never waits. A job is a child
//! of the supervisor with the same privileges, runs for one task, and is killed when its time limit is exceeded.

mod unmount;
mod users;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use stencilfs::control::{Cache, Channel, Failure, Received};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::{self, Fork};
use stencilfs::sys::{fuse_dev, memfd};
use stencilfs::units::Bytes;

use crate::begin::cache;
use crate::kept::Program;

pub use unmount::{abort_of, end as unmount};
pub use users::{find as find_users, unused};

/// Result of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The job succeeded; a descriptor may come with the result.
    Done,
    /// Indices of the backings that are unused.
    Unused(Vec<u64>),
    /// The job failed.
    Failed(Failure),
}

/// A running job.
#[derive(Debug)]
pub struct Job {
    /// Becomes readable when the job ends.
    pub channel: Channel,
    pidfd: OwnedFd,
    /// Time at which the job is killed.
    pub deadline: Instant,
}

impl Job {
    /// Runs `work` in a child. Closes the descriptors in `supervisors` there: a child that cannot exit must not hold
    /// them.
    ///
    /// # Errors
    /// Returns an error if the child cannot be started.
    pub fn start(
        limit: Duration,
        supervisors: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<Option<OwnedFd>>,
    ) -> Result<Job> {
        Self::start_with_outcome(limit, supervisors, || Ok((Outcome::Done, work()?)))
    }

    /// Same as [`start`](Self::start), for work that returns a specific outcome.
    ///
    /// # Errors
    /// Returns an error if the child cannot be started.
    pub fn start_with_outcome(
        limit: Duration,
        supervisors: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Job> {
        let (ours, theirs) = Channel::pair().map_err(no_child)?;
        let parent = std::process::id();
        match process::fork_single_threaded()? {
            Fork::Parent(pid) => Job::new(ours, pid, limit),
            Fork::Child => {
                let alone = || -> Result<()> {
                    if !process::die_with_parent(parent)? {
                        process::leave(0);
                    }
                    let null = File::open("/dev/null").map_err(no_child)?;
                    let close = |fd: &BorrowedFd<'_>| fuse_dev::replace_descriptor(*fd, &null);
                    supervisors.iter().try_for_each(close).map_err(no_child)
                };
                let (outcome, fd) = alone()
                    .and_then(|()| work())
                    .unwrap_or_else(|e| (Outcome::Failed(Failure::from(&e)), None));
                let _ = theirs.send(&outcome, fd.as_ref().map(AsFd::as_fd));
                process::leave(0)
            }
        }
    }

    /// Runs `program` with `check`, which checks whether it could take over with this ledger.
    ///
    /// # Errors
    /// Returns an error if the program cannot be started.
    pub fn ask_program(limit: Duration, program: &Program, ledger: OwnedFd) -> Result<Job> {
        let (ours, theirs) = Channel::pair().map_err(no_child)?;
        let child = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()))
            .arg("check")
            .stdin(Stdio::from(ledger))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0)
            .spawn()
            .map_err(|e| {
                Error::io("cannot start the program", &program.name, e).remedy("use a stencil-mountd binary")
            })?;
        Job::new(ours, child.id(), limit)
    }

    fn new(channel: Channel, pid: u32, limit: Duration) -> Result<Job> {
        let pidfd =
            process::pidfd(pid)?.ok_or_else(|| Error::failed(format!("process {pid} is not a child")))?;
        Ok(Job { channel, pidfd, deadline: Instant::now() + limit })
    }

    /// Returns the result of the job; `None` while the job runs. A job that exits without a result has failed, and so
    /// has one that exceeds its time limit.
    pub fn outcome(&self) -> Option<(Outcome, Option<OwnedFd>)> {
        let failed = |why: &str| Some((Outcome::Failed(Failure::from(&Error::failed(why))), None));
        match self.channel.try_receive() {
            Ok(Received::Message(outcome, fd)) => Some((outcome, fd)),
            Ok(Received::Nothing) if Instant::now() < self.deadline => None,
            Ok(Received::Nothing) => failed("timed out waiting for the job"),
            Ok(Received::Closed) => failed("the job exited without a result"),
            Err(e) => failed(&format!("cannot parse the result of the job: {e}")),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

fn no_child(e: io::Error) -> Error {
    Error::failed("cannot start a child process")
        .because(e)
        .remedy("check the limits on processes and open files")
}

/// Creates the empty file of a backing.
///
/// # Errors
/// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if the file system has too little free space, and an
/// error if a system call fails.
pub fn make_backing(cache: &Cache, size: Bytes, bytes: Bytes) -> Result<OwnedFd> {
    match cache {
        Cache::Directory(dir) => {
            let free = cache::free_in(dir)?;
            if bytes > free {
                return Err(Error::try_again(format!(
                    "the backing needs {bytes}, the cache's file system has {free} free"
                ))
                .at(dir)
                .remedy("free space there, or use another --cache-dir"));
            }
            unnamed_file(dir, size)
        }
        Cache::Memory => memfd::create("stencil-backing", size)
            .map_err(|e| Error::failed("cannot create a memory file").because(e)),
        Cache::Nowhere(why) => Err(Error::failed(why.clone())),
    }
}

fn unnamed_file(dir: &Path, size: Bytes) -> Result<OwnedFd> {
    let fail = |e: rustix::io::Errno| Error::io("cannot create a backing", dir, e.into());
    // With O_EXCL the file cannot be linked to a name later.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    rustix::fs::ftruncate(&fd, size.get()).map_err(fail)?;
    Ok(fd)
}

/// Freezes a filled backing: afterwards no open descriptor can change it. Rejects a backing that occupies more space
/// than was reserved.
///
/// # Errors
/// Returns an error if the file system refuses, or the backing is too large.
pub fn freeze_backing(cache: &Cache, file: impl AsFd, reserved: Bytes) -> Result<()> {
    /// Space that a file system may use beyond the data (extent trees, preallocation), in bytes.
    const SLACK: u64 = 16 << 20;
    let fail = |e: io::Error| Error::failed("cannot freeze the backing").because(e);
    match cache {
        Cache::Directory(_) => cache::freeze(&file).map_err(|e| fail(e.into()))?,
        Cache::Memory => memfd::freeze(&file).map_err(fail)?,
        Cache::Nowhere(why) => return Err(Error::failed(why.clone())),
    }
    let taken = rustix::fs::fstat(&file).map_err(|e| fail(e.into()))?.st_blocks as u64 * 512;
    if taken > reserved.get() + reserved.get() / 64 + SLACK {
        return Err(Error::failed(format!(
            "the backing occupies {}, but {reserved} were reserved",
            Bytes::new(taken)
        )));
    }
    Ok(())
}
