//! One capture of a VM at a time.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::vm::no_vm_here;
use crate::error::{Error, Result};
use crate::sys::locks;

/// No other capture touches the VM while this lives, here or in a process that has inherited it. The lock is on the
/// process's folder in `/proc`: it goes with the VM, and no file is left.
#[derive(Debug)]
pub struct VmLock(OwnedFd);

impl VmLock {
    /// Takes it for the VM of that process.
    ///
    /// # Errors
    /// [`Code::InUse`](crate::error::Code::InUse) that names who has it.
    pub fn take(pid: u32) -> Result<VmLock> {
        let folder = File::open(format!("/proc/{pid}")).map_err(|e| no_vm_here(pid).because(e))?;
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(VmLock(folder.into())),
            Err(Errno::WOULDBLOCK) => {
                let who = locks::flock_holders(&folder)
                    .first()
                    .map_or_else(|| "another process".into(), |p| format!("process {p}"));
                Err(Error::in_use(format!("{who} captures this VM (process {pid}), or brings it back"))
                    .remedy("run it again when that capture has ended, and its helper with it"))
            }
            Err(e) => Err(Error::failed(format!("cannot lock the VM of process {pid}")).because(e.into())),
        }
    }

    /// For a process that is to inherit it.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn share(&self) -> Result<OwnedFd> {
        let shared = self.0.as_fd().try_clone_to_owned();
        shared.map_err(|e| Error::failed("cannot copy a descriptor").because(e))
    }
}
