//! What may take long or block, done in a process of its own, so that the supervisor never waits: it answers within
//! its limit or is ended. Each is a child of the supervisor, with its rights, and lives for one task.

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

/// What a job says at its end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is done; what it made comes as descriptor.
    Done,
    /// These are in use by nobody.
    Unused(Vec<u64>),
    /// It is not done.
    Failed(Failure),
}

/// One that runs.
#[derive(Debug)]
pub struct Job {
    /// Readable once it has ended, one way or the other.
    pub channel: Channel,
    pidfd: OwnedFd,
    /// When it is ended.
    pub deadline: Instant,
}

impl Job {
    /// Runs `work` in a child. What is the supervisor's alone is closed there: a child that cannot end must not keep it.
    ///
    /// # Errors
    /// When there can be no child.
    pub fn start(
        limit: Duration,
        supervisors: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<Option<OwnedFd>>,
    ) -> Result<Job> {
        Self::start_saying(limit, supervisors, || Ok((Outcome::Done, work()?)))
    }

    /// The same for work that says more than that it is done.
    ///
    /// # Errors
    /// When there can be no child.
    pub fn start_saying(
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

    /// Has a program say whether it could go on with what is in that ledger.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ask_program(limit: Duration, program: &Program, ledger: OwnedFd) -> Result<Job> {
        let (ours, theirs) = Channel::pair().map_err(no_child)?;
        let child = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()))
            .arg("check")
            .stdin(Stdio::from(ledger))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0)
            .spawn()
            .map_err(|e| {
                Error::io("cannot start the program", &program.name, e).remedy("name a stencil-mountd")
            })?;
        Job::new(ours, child.id(), limit)
    }

    fn new(channel: Channel, pid: u32, limit: Duration) -> Result<Job> {
        let pidfd =
            process::pidfd(pid)?.ok_or_else(|| Error::failed(format!("process {pid} is no child")))?;
        Ok(Job { channel, pidfd, deadline: Instant::now() + limit })
    }

    /// What it said; or that it ended without a word, or that its time is up.
    pub fn outcome(&self) -> Option<(Outcome, Option<OwnedFd>)> {
        let failed = |why: &str| Some((Outcome::Failed(Failure::from(&Error::failed(why))), None));
        match self.channel.try_receive() {
            Ok(Received::Message(outcome, fd)) => Some((outcome, fd)),
            Ok(Received::Nothing) if Instant::now() < self.deadline => None,
            Ok(Received::Nothing) => failed("it did not answer in time"),
            Ok(Received::Closed) => failed("it ended without a word"),
            Err(e) => failed(&format!("it cannot be understood: {e}")),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

fn no_child(e: io::Error) -> Error {
    Error::failed("cannot start a process for a task")
        .because(e)
        .remedy("see the limits of processes and open files")
}

/// Makes the empty file of a backing.
///
/// # Errors
/// The filesystem's, or that there is no room.
pub fn make_backing(cache: &Cache, size: Bytes, bytes: Bytes) -> Result<OwnedFd> {
    match cache {
        Cache::Directory(dir) => {
            let free = cache::free_in(dir)?;
            if bytes > free {
                return Err(Error::try_again(format!(
                    "its backing needs {bytes}, the cache's filesystem has {free} free"
                ))
                .at(dir)
                .remedy("free space there, or name another --cache-dir"));
            }
            unnamed_file(dir, size)
        }
        Cache::Memory => memfd::create("stencil-backing", size)
            .map_err(|e| Error::failed("cannot make a memory file").because(e)),
        Cache::Nowhere(why) => Err(Error::failed(why.clone())),
    }
}

fn unnamed_file(dir: &Path, size: Bytes) -> Result<OwnedFd> {
    let fail = |e: rustix::io::Errno| Error::io("cannot make a backing", dir, e.into());
    // With O_EXCL nobody can give it a name later.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    rustix::fs::ftruncate(&fd, size.get()).map_err(fail)?;
    Ok(fd)
}

/// Freezes a filled backing: from here on nobody can change it, whoever holds a descriptor. One that takes more room
/// than was set aside for it is refused.
///
/// # Errors
/// When the filesystem refuses.
pub fn freeze_backing(cache: &Cache, file: impl AsFd, reserved: Bytes) -> Result<()> {
    /// What a filesystem may add to the data: extent trees, preallocation.
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
            "the backing takes {} of room, {reserved} were set aside for it",
            Bytes::new(taken)
        )));
    }
    Ok(())
}
