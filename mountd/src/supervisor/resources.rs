//! The descriptors of a mount that outlive servers and supervisors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use stencilfs::control::{Record, RecordDir, ServeMode, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::read_ahead;
use stencilfs::sys::probe;
use stencilfs::sys::process::ProcessId;

use super::callers::Callers;
use super::machine::MountFacts;
use super::program::Program;
use crate::protocol::fds;
use crate::protocol::ledger::Ledger;
use crate::protocol::stats::Stats;

/// Descriptors of a mount.
#[derive(Debug)]
pub struct Resources {
    /// The FUSE connection.
    pub fuse: OwnedFd,
    /// The counters page.
    pub stats: Stats,
    /// The record and its lock.
    pub record: RecordDir,
    /// The control socket.
    pub listener: OwnedFd,
    /// The ledger.
    pub ledger: Ledger,
}

impl Resources {
    /// Returns the descriptors that no job may hold, as the job may outlive the supervisor: the connection, the record
    /// and its lock, the control socket, and the sockets of its callers.
    pub fn supervisor_only<'a>(&'a self, callers: &'a Callers) -> Vec<BorrowedFd<'a>> {
        let fds = [self.fuse.as_fd(), self.record.folder(), self.listener.as_fd()];
        fds.into_iter().chain(callers.channels().map(|(_, channel)| channel)).collect()
    }

    /// Writes the mount state to the ledger.
    ///
    /// # Errors
    /// Returns an error if the state does not fit into the ledger.
    pub fn save(&mut self, snapshot: &Snapshot) -> Result<()> {
        let text = serde_json::to_vec(snapshot)
            .map_err(|e| Error::failed(format!("cannot write the ledger: {e}")))?;
        self.ledger.write(&text).map_err(|e| Error::failed("cannot write the ledger").because(e))
    }

    /// Sets the kernel's read-ahead for files served by decode. The kernel must have accepted the INIT reply before.
    pub fn set_read_ahead(mount: &MountFacts) {
        let size = mount.options.read_ahead(ServeMode::Decode);
        if let Err(error) = read_ahead::set(mount.device, size) {
            log::warn!(
                "cannot set the read-ahead of {} to {size}: {error}",
                mount.options.mountpoint.display()
            );
        }
    }

    /// Writes the record of the mount, which lets other programs find the mount, its supervisor and its server.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written.
    pub fn write_record(
        &self,
        mount: &MountFacts,
        server: Option<ProcessId>,
        program: &Program,
    ) -> Result<()> {
        let supervisor = ProcessId::current()?;
        self.record.write(&Record {
            mountpoint: mount.options.mountpoint.clone(),
            store: mount.options.store.clone(),
            store_id: mount.store_id.clone(),
            device: mount.device,
            supervisor_pid: supervisor.pid,
            supervisor_identity: supervisor.identity,
            server_pid: server.map(|s| s.pid),
            server_identity: server.map_or(0, |s| s.identity),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ledger: fds::identity(&self.ledger)?,
            program: fds::identity(&program.file)?,
            pid_namespace: probe::pid_namespace(),
        })
    }
}
