//! What may take long or block, done in a process of its own, so that the supervisor never waits. A job is a child of the
//! supervisor with its rights; it lives for one task and is killed at its time limit.

mod backing_files;
mod unmount;
mod users;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use stencilfs::control::{Cache, Channel, Failure, FileKey, MountOptions, Received, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::{self, Fork};
use stencilfs::units::Bytes;

use super::event::JobResult;
use super::machine::TRIAL_LIMIT;
use super::program::Program;
use crate::protocol::ledger::Ledger;

/// Creating and freezing files may wait for the file system.
const FILE_LIMIT: Duration = Duration::from_secs(30);
/// Unmounting waits for pages that are being read, and closing for freed room.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(60);
/// The search for users of backings.
const USERS_LIMIT: Duration = Duration::from_secs(2);
/// The search for processes that an abort hurts.
const VICTIMS_LIMIT: Duration = Duration::from_secs(1);

/// What a job sends at its end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The work is done; what it made comes as a descriptor.
    Done,
    /// Indices of keys that no process uses.
    Unused(Vec<u64>),
    /// The work failed.
    Failed(Failure),
}

/// A job that runs. Killed when it is dropped.
#[derive(Debug)]
pub struct Job {
    /// Readable once the job has ended.
    pub channel: Channel,
    pidfd: OwnedFd,
    deadline: Instant,
}

impl Job {
    /// Runs `work` in a child. Descriptors that are for the supervisor alone are closed there: a child that cannot end must
    /// not keep them.
    ///
    /// # Errors
    /// Returns an error if no child can be started.
    fn start(
        limit: Duration,
        hidden: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Job> {
        let (ours, theirs) = Channel::pair().map_err(no_child)?;
        let parent = std::process::id();
        match process::fork_single_threaded()? {
            Fork::Parent(pid) => Job::new(ours, pid, limit),
            Fork::Child => {
                let hide = || -> Result<()> {
                    if !process::set_parent_death_signal(parent)? {
                        process::leave(0);
                    }
                    let null = File::open("/dev/null").map_err(no_child)?;
                    let close = |fd: &BorrowedFd<'_>| device::replace_descriptor(*fd, &null);
                    hidden.iter().try_for_each(close).map_err(no_child)
                };
                let (outcome, fd) = hide()
                    .and_then(|()| work())
                    .unwrap_or_else(|e| (Outcome::Failed(Failure::from(&e)), None));
                let _ = theirs.send(&outcome, fd.as_ref().map(AsFd::as_fd));
                process::leave(0)
            }
        }
    }

    fn new(channel: Channel, pid: u32, limit: Duration) -> Result<Job> {
        let pidfd =
            process::pidfd(pid)?.ok_or_else(|| Error::failed(format!("process {pid} is not a child")))?;
        Ok(Job { channel, pidfd, deadline: Instant::now() + limit })
    }

    /// The result, once the job has ended or its time is up.
    pub fn result(&self) -> Option<JobResult> {
        let failed = |why: &str| Some(JobResult::Failed(Error::failed(why)));
        match self.channel.try_receive() {
            Ok(Received::Message(Outcome::Done, fd)) => Some(JobResult::Done(fd)),
            Ok(Received::Message(Outcome::Unused(indices), _)) => Some(JobResult::Unused(indices)),
            Ok(Received::Message(Outcome::Failed(failure), _)) => {
                Some(JobResult::Failed(failure.into_error()))
            }
            Ok(Received::Nothing) if Instant::now() < self.deadline => None,
            Ok(Received::Nothing) => failed("it did not answer in time"),
            Ok(Received::Closed) => failed("it exited without an answer"),
            Err(e) => failed(&format!("its answer cannot be parsed: {e}")),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

fn no_child(e: io::Error) -> Error {
    Error::failed("cannot start a job").because(e).remedy("check the limits of processes and open files")
}

/// Creates the empty file of a backing.
///
/// # Errors
/// Returns an error if no child can be started; so do the functions below.
pub fn create_backing(hidden: &[BorrowedFd<'_>], cache: &Cache, size: Bytes, data: Bytes) -> Result<Job> {
    Job::start(FILE_LIMIT, hidden, || Ok((Outcome::Done, Some(backing_files::create(cache, size, data)?))))
}

/// Makes the filled file of a backing immutable.
///
/// # Errors
/// Same as [`create_backing`].
pub fn freeze_backing(
    hidden: &[BorrowedFd<'_>],
    cache: &Cache,
    file: &OwnedFd,
    reserved: Bytes,
) -> Result<Job> {
    Job::start(FILE_LIMIT, hidden, || {
        backing_files::freeze(cache, file, reserved).map(|()| (Outcome::Done, None))
    })
}

/// Finds the keys whose inodes no process uses by passthrough.
///
/// # Errors
/// Same as [`create_backing`].
pub fn find_unused(hidden: &[BorrowedFd<'_>], store: &Path, device: u64, keys: &[FileKey]) -> Result<Job> {
    Job::start(USERS_LIMIT * 2, hidden, || {
        Ok((Outcome::Unused(users::unused(store, device, keys, USERS_LIMIT)?), None))
    })
}

/// Ends the mount. A forced end aborts the connection and logs which processes lose memory.
///
/// # Errors
/// Same as [`create_backing`].
pub fn unmount(
    hidden: &[BorrowedFd<'_>],
    options: &MountOptions,
    device: u64,
    mode: UnmountMode,
    fuse: &OwnedFd,
) -> Result<Job> {
    let abort = match mode {
        UnmountMode::Force => unmount::abort_of(fuse, device),
        UnmountMode::Plain | UnmountMode::Lazy => Ok(None),
    };
    Job::start(UNMOUNT_LIMIT, hidden, || {
        if mode == UnmountMode::Force
            && let Ok(users) = users::find(device, VICTIMS_LIMIT)
        {
            log::warn!(
                "the connection is aborted; these processes lose pages that they have not read: {users}"
            );
        }
        unmount::end(options, device, mode, abort).map(|()| (Outcome::Done, None))
    })
}

/// Closes files that only this process has open: in a child that is the last to have them.
///
/// # Errors
/// Same as [`create_backing`]; this process closes the files then.
pub fn close_files(hidden: &[BorrowedFd<'_>], files: Vec<OwnedFd>) -> Result<Job> {
    let lost = |e: io::Error| Error::failed("cannot tell a job that files are closed").because(e);
    let closed = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| lost(e.into()))?;
    let job = Job::start(UNMOUNT_LIMIT, hidden, || {
        // The child exits, and closes its copies, only after the supervisor has closed its own.
        rustix::io::read(&closed, &mut [0; 8]).map_err(|e| lost(e.into()))?;
        Ok((Outcome::Done, None))
    })?;
    drop(files);
    rustix::io::write(&closed, &1u64.to_ne_bytes()).map_err(|e| lost(e.into()))?;
    Ok(job)
}

/// Has a program check whether it can continue from the ledger.
///
/// # Errors
/// Returns an error if the program cannot be started.
pub fn check_program(program: &Program, ledger: &Ledger) -> Result<Job> {
    let ledger = ledger.read_only().map_err(|e| Error::failed("cannot hand over the ledger").because(e))?;
    let (ours, theirs) = Channel::pair().map_err(no_child)?;
    let child = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()))
        .arg("check")
        .stdin(Stdio::from(ledger))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .process_group(0)
        .spawn()
        .map_err(|e| {
            Error::io("cannot start the program", &program.path, e).remedy("name a stencil-mountd")
        })?;
    Job::new(ours, child.id(), TRIAL_LIMIT)
}
