//! Takes over a mount whose descriptors were passed to this process: by the program that this process ran before
//! execve(2), or by a service manager that stored the descriptors while supervisor and server were dead.

use std::os::fd::OwnedFd;

use rustix::process::Signal;
use stencilfs::control::{Channel, MountOptions, RecordDir, Snapshot};
use stencilfs::error::{Code, Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::ProcessId;

use super::restore::{MountFds, restore};
use super::{option_conflicts, takeover};
use crate::protocol::fds;
use crate::protocol::ledger::{self, Ledger};
use crate::protocol::named_fds::NamedFds;
use crate::supervisor::AcquiredMount;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// A ledger, the mount state in it, and the FUSE connection of that mount.
type Connection = (Ledger, Snapshot, OwnedFd);

/// Continues with the descriptors of the program that this process ran before execve(2).
///
/// # Errors
/// Returns an error that names the missing descriptor.
pub fn from_fds(fds: &mut NamedFds) -> Result<AcquiredMount> {
    let connection = connection(fds)?;
    let record = RecordDir::inherited(connection.1.record.clone(), fds.need("record")?);
    resume(fds, connection, record)
}

/// Takes over a mount with the descriptors that a service manager stored. Returns `None` if the supervisor of that
/// mount is alive: then that supervisor serves the mount until the last clone ends.
///
/// # Errors
/// Returns an error that names the missing descriptor, and [`Code::InUse`] if another supervisor is taking over the
/// mount.
pub fn from_manager(fds: &mut NamedFds, requested: &MountOptions) -> Result<Option<AcquiredMount>> {
    let connection = connection(fds)?;
    let snapshot = &connection.1;
    if snapshot.supervisor.is_alive() {
        log::info!(
            "the earlier mount is still supervised by process {}, which serves the mount until the last clone ends",
            snapshot.supervisor.pid
        );
        return Ok(None);
    }
    // A mount of another store must still serve its clones, but its templates must no longer be found at the
    // mountpoint.
    let conflict = option_conflicts::same_store(requested, &snapshot.options.store, &snapshot.store_id).err();
    if let Some(conflict) = &conflict {
        log::error!(
            "{conflict}; serving the mount of {}, detached, until its last clone ends; then restart the service",
            snapshot.options.store.display()
        );
    }
    let record = match RecordDir::take_over(&snapshot.record) {
        // Another command may have removed the record, as no process of the mount was alive.
        Err(error) if error.code() == Code::NotFound => RecordDir::create(ProcessId::current()?)?,
        other => other?,
    };
    resume(fds, connection, record)
        .map(|acquired| Some(AcquiredMount { drains: conflict.is_some(), ..acquired }))
}

fn resume(named: &mut NamedFds, connection: Connection, record: RecordDir) -> Result<AcquiredMount> {
    let (ledger, snapshot, fuse) = connection;
    let counters = named.all("counters").into_iter().rfind(|fd| fds::has_identity(fd, snapshot.page));
    let missing = |what| Error::failed(format!("missing descriptor '{what}' of this mount"));
    let counters = counters.ok_or_else(|| missing("counters"))?;
    // Servers are started from the previous program until a server of the new program has answered a request.
    let (previous, program) = (named.take("previous"), named.take("program"));
    let program = Program::new(previous.or(program).ok_or_else(|| missing("program"))?);
    let (listener, link) = (named.take("listener"), named.take("peer").map(Channel::new));
    let row = snapshot.server.clone();
    let found = MountFds { fuse, counters, ledger, program, listener, files: named.rest() };
    let (mut initial_state, resources) = restore(snapshot, record, found)?;
    let link = match (&row, link) {
        // The server and the link to it are unchanged by execve(2).
        (Some(row), Some(link)) if row.process.is_alive() => {
            takeover::announce_supervisor(&link);
            let table = takeover::in_flight_table(row.process.pid);
            Some((link, table))
        }
        // A server without a link cannot be supervised: kill it; its successor serves its pending requests.
        (Some(row), None) => {
            if let Err(error) = row.process.signal(Signal::KILL) {
                log::warn!("cannot kill server {}: {error}", row.process.pid);
            }
            None
        }
        _ => None,
    };
    if link.is_some() {
        initial_state = InitialState { server: row, ..initial_state };
    } else {
        drop(initial_state.backings.drop_unfinished());
    }
    Ok(AcquiredMount { initial_state, resources, link, drains: false })
}

/// Returns the open connection and its ledger. A service manager may also have stored the descriptors of an earlier
/// mount, whose device number the kernel may have reused: of several matching ledgers, returns the ledger of the latest
/// supervisor.
fn connection(fds: &mut NamedFds) -> Result<Connection> {
    let mut connections: Vec<OwnedFd> = fds.all("fuse");
    if connections.len() > 1 {
        connections.retain(|fuse| !device::is_over(fuse));
    }
    let mut failure = Error::failed("missing descriptor 'ledger'");
    let mut found: Option<(Ledger, Snapshot, usize)> = None;
    for ledger in fds.all("ledger") {
        let (ledger, snapshot) = match ledger::read(ledger) {
            Ok(read) => read,
            Err(error) => {
                failure = error;
                continue;
            }
        };
        let Some(at) = connections.iter().position(|fuse| takeover::belongs_to(fuse, snapshot.device)) else {
            failure =
                Error::failed("missing descriptor 'fuse': the ledger belongs to none of the connections")
                    .hint("run 'stencil umount MNT', then 'stencil mount MNT' or the service of the mount");
            continue;
        };
        let newer =
            |(_, other, _): &(_, Snapshot, _)| other.supervisor.identity <= snapshot.supervisor.identity;
        if found.as_ref().is_none_or(newer) {
            found = Some((ledger, snapshot, at));
        }
    }
    found.map(|(ledger, snapshot, at)| (ledger, snapshot, connections.swap_remove(at))).ok_or(failure)
}
