//! The lock of a VM, which allows one capture at a time.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::vm_process::no_vm_here;
use crate::error::{Error, Result};
use crate::sys::files::file_locks;

/// An exclusive lock on a VM, held while this value, or an inherited copy of its descriptor in another process, exists.
///
/// The lock is a `flock(2)` on the directory of the VMM's process in `/proc`: it disappears with the process and leaves
/// no file.
#[derive(Debug)]
pub struct VmLock(OwnedFd);

impl VmLock {
    /// Locks the VM of a VMM's process.
    ///
    /// # Errors
    /// Returns [`Code::InUse`](crate::error::Code::InUse) with the holder of the lock if the VM is locked.
    pub fn take(pid: u32) -> Result<VmLock> {
        let directory = File::open(format!("/proc/{pid}")).map_err(|e| no_vm_here(pid).because(e))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(VmLock(directory.into())),
            Err(Errno::WOULDBLOCK) => {
                let holder = file_locks::flock_holders(&directory)
                    .first()
                    .map_or_else(|| "another process".into(), |p| format!("process {p}"));
                Err(Error::in_use(format!("the VM (process {pid}) is in use by another capture ({holder})"))
                    .hint("run the command again when that capture and its helper have exited"))
            }
            Err(e) => Err(Error::failed(format!("cannot lock the VM of process {pid}")).because(e.into())),
        }
    }

    /// Duplicates the lock's descriptor for a process that inherits the lock.
    ///
    /// # Errors
    /// Returns an error if the limit on open files is reached.
    pub fn share(&self) -> Result<OwnedFd> {
        let shared = self.0.as_fd().try_clone_to_owned();
        shared.map_err(|e| Error::failed("cannot duplicate a file descriptor").because(e))
    }
}
