//! Jobs: operations that may take long or block, each in a separate process, so that the supervisor never waits. A job
//! is a child of the supervisor with the same privileges. It executes one task, and is killed if it times out.

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
use stencilfs::control::{
    BackingKind, Cache, Channel, Chosen, Failure, FileKey, MountOptions, Received, UnmountMode,
};
use stencilfs::error::{Error, Result};
use stencilfs::store::{Proof, Store};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::{self, Fork};
use stencilfs::units::Bytes;

use super::event::JobResult;
use super::kernel_decode;
use super::machine::TRIAL_TIMEOUT;
use super::program::Program;
use crate::protocol::ledger::Ledger;

/// For creating and freezing files, which may wait for the file system.
const FILE_TIMEOUT: Duration = Duration::from_secs(30);
/// For unmounting, which waits for pending reads of pages, and for closing files, which waits until their space is
/// freed.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);
/// For the search for processes that use backings.
const USERS_TIMEOUT: Duration = Duration::from_secs(2);
/// For the search for processes that an abort of the connection affects.
const AFFECTED_TIMEOUT: Duration = Duration::from_secs(1);

/// The message with the result of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The job is done. The descriptor of the message is the file, for a job that creates or opens a file.
    Done,
    /// The descriptor of the message is a file that the kernel decodes.
    Decoded {
        /// Proof of the verification of the file.
        proof: Proof,
        /// When the file was verified before.
        verified_at: Option<u64>,
    },
    /// Indices of the keys whose files no process uses.
    Unused(Vec<u64>),
    /// The operation failed.
    Failed(Failure),
}

/// A running job. Dropping the value kills the process.
#[derive(Debug)]
pub struct Job {
    /// Becomes readable when the job ends.
    pub channel: Channel,
    pidfd: OwnedFd,
    deadline: Instant,
}

impl Job {
    /// Runs `work` in a child process. The child closes the descriptors `hidden`: a child that cannot be killed while
    /// it waits for a file system must not keep them open.
    ///
    /// # Errors
    /// Returns an error if the child cannot be started.
    fn start(
        timeout: Duration,
        hidden: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Job> {
        let (ours, theirs) = Channel::pair().map_err(no_child)?;
        let parent = std::process::id();
        match process::fork_single_threaded()? {
            Fork::Parent(pid) => Job::new(ours, pid, timeout),
            Fork::Child => {
                let close_hidden = || -> Result<()> {
                    if !process::set_parent_death_signal(parent)? {
                        process::leave(0);
                    }
                    let null = File::open("/dev/null").map_err(no_child)?;
                    let close = |fd: &BorrowedFd<'_>| device::replace_descriptor(*fd, &null);
                    hidden.iter().try_for_each(close).map_err(no_child)
                };
                let (outcome, fd) = close_hidden()
                    .and_then(|()| work())
                    .unwrap_or_else(|e| (Outcome::Failed(Failure::from(&e)), None));
                let _ = theirs.send(&outcome, fd.as_ref().map(AsFd::as_fd));
                process::leave(0)
            }
        }
    }

    fn new(channel: Channel, pid: u32, timeout: Duration) -> Result<Job> {
        let pidfd = process::pidfd(pid)?
            .ok_or_else(|| Error::failed(format!("process {pid} is not a child of the supervisor")))?;
        Ok(Job { channel, pidfd, deadline: Instant::now() + timeout })
    }

    /// Returns the result if the job has ended or timed out.
    pub fn result(&self) -> Option<JobResult> {
        let failed = |why: &str| Some(JobResult::Failed(Error::failed(why)));
        match self.channel.try_receive() {
            Ok(Received::Message(Outcome::Done, fd)) => Some(JobResult::Done(fd)),
            Ok(Received::Message(Outcome::Decoded { proof, verified_at }, Some(file))) => {
                Some(JobResult::Decoded(kernel_decode::Opened { file, proof, verified_at }))
            }
            Ok(Received::Message(Outcome::Decoded { .. }, None)) => failed("the job has sent no file"),
            Ok(Received::Message(Outcome::Unused(indices), _)) => Some(JobResult::Unused(indices)),
            Ok(Received::Message(Outcome::Failed(failure), _)) => {
                Some(JobResult::Failed(failure.into_error()))
            }
            Ok(Received::Nothing) if Instant::now() < self.deadline => None,
            Ok(Received::Nothing) => failed("the job timed out"),
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
    Error::failed("cannot start a job").because(e).hint("check the limits of processes and open files")
}

/// Starts a job that creates the empty file of a backing.
///
/// # Errors
/// Returns an error if the child cannot be started.
pub fn create_backing(hidden: &[BorrowedFd<'_>], cache: &Cache, size: Bytes, data: Bytes) -> Result<Job> {
    Job::start(FILE_TIMEOUT, hidden, || Ok((Outcome::Done, Some(backing_files::create(cache, size, data)?))))
}

/// Starts a job that makes the filled file of a backing immutable. For kernel decode the file is an image, and the
/// result of the job is the file that the kernel decodes.
///
/// # Errors
/// Same as [`create_backing`].
pub fn freeze_backing(
    hidden: &[BorrowedFd<'_>],
    (chosen, options): (&Chosen, &MountOptions),
    key: &FileKey,
    file: &OwnedFd,
    reserved: Bytes,
) -> Result<Job> {
    Job::start(FILE_TIMEOUT, hidden, || {
        backing_files::freeze(&chosen.cache, file, reserved)?;
        match chosen.kind {
            BackingKind::Copy => Ok((Outcome::Done, None)),
            BackingKind::Kernel => {
                let kernel_decode::Opened { file, proof, verified_at } =
                    kernel_decode::open(options, key, file)?;
                Ok((Outcome::Decoded { proof, verified_at }, Some(file)))
            }
        }
    })
}

/// Starts a job that remembers in the store when a file was verified with a proof, or forgets the verification.
///
/// # Errors
/// Same as [`create_backing`].
pub fn remember(
    hidden: &[BorrowedFd<'_>],
    store: &Path,
    key: &FileKey,
    verified: Option<(Proof, u64)>,
) -> Result<Job> {
    Job::start(FILE_TIMEOUT, hidden, || {
        let store = Store::open(store)?;
        match verified {
            Some((proof, at)) => store.set_verified(&key.digest, &key.file, proof, at)?,
            None => store.forget_verified(&key.digest, &key.file)?,
        }
        Ok((Outcome::Done, None))
    })
}

/// Starts a job that finds the keys whose files no process uses through a backing.
///
/// # Errors
/// Same as [`create_backing`].
pub fn find_unused(hidden: &[BorrowedFd<'_>], store: &Path, device: u64, keys: &[FileKey]) -> Result<Job> {
    Job::start(USERS_TIMEOUT * 2, hidden, || {
        Ok((Outcome::Unused(users::unused(store, device, keys, USERS_TIMEOUT)?), None))
    })
}

/// Starts a job that unmounts. A forced unmount logs the processes that use the mount, and aborts the connection.
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
        UnmountMode::Force => unmount::open_abort_file(fuse, device),
        UnmountMode::Plain | UnmountMode::Lazy => Ok(None),
    };
    Job::start(UNMOUNT_TIMEOUT, hidden, || {
        if mode == UnmountMode::Force
            && let Ok(users) = users::find(device, AFFECTED_TIMEOUT)
        {
            log::warn!(
                "aborting the connection; these processes can no longer read pages of the mount: {users}"
            );
        }
        unmount::unmount(options, device, mode, abort).map(|()| (Outcome::Done, None))
    })
}

/// Starts a job that closes files which no other process has open. This process closes its descriptors first, so that
/// the exit of the job frees the space of the files.
///
/// # Errors
/// Same as [`create_backing`]; then this process closes the files.
pub fn close_files(hidden: &[BorrowedFd<'_>], files: Vec<OwnedFd>) -> Result<Job> {
    let lost = |e: io::Error| Error::failed("cannot signal a job through an eventfd").because(e);
    let closed = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| lost(e.into()))?;
    let job = Job::start(UNMOUNT_TIMEOUT, hidden, || {
        // The child keeps its duplicates open until the supervisor has closed the originals.
        rustix::io::read(&closed, &mut [0; 8]).map_err(|e| lost(e.into()))?;
        Ok((Outcome::Done, None))
    })?;
    drop(files);
    rustix::io::write(&closed, &1u64.to_ne_bytes()).map_err(|e| lost(e.into()))?;
    Ok(job)
}

/// Starts `stencil-mountd check` of another program, which checks whether the program can read the ledger.
///
/// # Errors
/// Returns an error if the program cannot be started.
pub fn check_program(program: &Program, ledger: &Ledger) -> Result<Job> {
    let ledger = ledger
        .read_only()
        .map_err(|e| Error::failed("cannot open the ledger for the new program").because(e))?;
    let (ours, theirs) = Channel::pair().map_err(no_child)?;
    let child = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()))
        .arg("check")
        .stdin(Stdio::from(ledger))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .process_group(0)
        .spawn()
        .map_err(|e| {
            Error::io("cannot start the program", &program.path, e).hint("use a stencil-mountd binary")
        })?;
    Job::new(ours, child.id(), TRIAL_TIMEOUT)
}
