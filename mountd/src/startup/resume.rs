//! Takes over a mount whose descriptors were passed to this process: by the program that the process executed before,
//! or by a service manager that held them while supervisor and server were dead.

use std::os::fd::OwnedFd;

use rustix::process::Signal;
use stencilfs::control::{Channel, MountOptions, RecordDir, Snapshot};
use stencilfs::error::{Code, Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::ProcessId;

use super::restore::{Found, restore};
use super::{option_conflicts, takeover};
use crate::protocol::fds;
use crate::protocol::ledger::{self, Ledger};
use crate::protocol::named_fds::NamedFds;
use crate::supervisor::Taken;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// A ledger, its contents, and the FUSE connection that it describes.
type Connection = (Ledger, Snapshot, OwnedFd);

/// Continues with the descriptors of the program that this process executed before.
///
/// # Errors
/// Returns an error that names the missing descriptor.
pub fn from_fds(fds: &mut NamedFds) -> Result<Taken> {
    let connection = connection(fds)?;
    let record = RecordDir::inherited(connection.1.record.clone(), fds.need("record")?);
    resume(fds, connection, record)
}

/// Takes over a mount from the descriptors that a service manager holds. Returns `None` if the supervisor of that mount
/// is alive: the supervisor serves the mount until the last clone ends.
///
/// # Errors
/// Returns an error that names the missing descriptor, and [`Code::InUse`] if another supervisor is taking over the
/// mount.
pub fn from_manager(fds: &mut NamedFds, requested: &MountOptions) -> Result<Option<Taken>> {
    let connection = connection(fds)?;
    let snapshot = &connection.1;
    if snapshot.supervisor.is_alive() {
        log::info!(
            "the earlier mount stays with its supervisor, process {}, which serves until the last clone ends",
            snapshot.supervisor.pid
        );
        return Ok(None);
    }
    // The clones of a mount of another store must still be served, but its templates must no longer be found.
    let other = option_conflicts::same_store(requested, &snapshot.options.store, &snapshot.store_id).err();
    if let Some(other) = &other {
        log::error!(
            "{other}: serving the detached mount until its last clone ends; then this service must start again"
        );
    }
    let record = match RecordDir::take_over(&snapshot.record) {
        // The record of a mount without live processes may have been removed.
        Err(error) if error.code() == Code::NotFound => RecordDir::create(ProcessId::me()?)?,
        other => other?,
    };
    resume(fds, connection, record).map(|taken| Some(Taken { drains: other.is_some(), ..taken }))
}

fn resume(named: &mut NamedFds, connection: Connection, record: RecordDir) -> Result<Taken> {
    let (ledger, snapshot, fuse) = connection;
    let counters = named.all("counters").into_iter().rfind(|fd| fds::has_identity(fd, snapshot.page));
    let missing = |what| Error::failed(format!("missing descriptor '{what}' of this mount"));
    let counters = counters.ok_or_else(|| missing("counters"))?;
    // Servers are started from the previous program until a server of the new program has proved itself.
    let (previous, program) = (named.take("previous"), named.take("program"));
    let program = Program::new(previous.or(program).ok_or_else(|| missing("program"))?);
    let (listener, link) = (named.take("listener"), named.take("peer").map(Channel::new));
    let row = snapshot.server.clone();
    let found = Found { fuse, counters, ledger, program, listener, files: named.rest() };
    let (mut begin, resources) = restore(snapshot, record, found)?;
    let link = match (&row, link) {
        // Server and link are those that this process had before exec.
        (Some(row), Some(link)) if row.process.is_alive() => {
            takeover::greet(&link);
            let table = takeover::table_of(row.process.pid);
            Some((link, table))
        }
        // A server without a link is useless: it is killed, and its successor serves its pending requests.
        (Some(row), None) => {
            if let Err(error) = row.process.signal(Signal::KILL) {
                log::warn!("cannot kill server {}: {error}", row.process.pid);
            }
            None
        }
        _ => None,
    };
    if link.is_some() {
        begin = InitialState { server: row, ..begin };
    } else {
        drop(begin.backings.drop_unfinished());
    }
    Ok(Taken { begin, resources, link, drains: false })
}

/// Returns the live connection and its ledger. A service manager may also hold the descriptors of an earlier mount,
/// whose device number the kernel may have reused: of several ledgers, the one of the latest supervisor is the right
/// one.
fn connection(fds: &mut NamedFds) -> Result<Connection> {
    let mut living: Vec<OwnedFd> = fds.all("fuse");
    if living.len() > 1 {
        living.retain(|fuse| !device::is_over(fuse));
    }
    let mut why = Error::failed("missing descriptor 'ledger'");
    let mut found: Option<(Ledger, Snapshot, usize)> = None;
    for ledger in fds.all("ledger") {
        let (ledger, snapshot) = match ledger::read(ledger) {
            Ok(read) => read,
            Err(error) => {
                why = error;
                continue;
            }
        };
        let Some(at) = living.iter().position(|fuse| takeover::is_of(fuse, snapshot.device)) else {
            why =
                Error::failed("missing descriptor 'fuse': no connection belongs to the mount of the ledger")
                    .remedy("unmount and mount again");
            continue;
        };
        let newer =
            |(_, other, _): &(_, Snapshot, _)| other.supervisor.identity <= snapshot.supervisor.identity;
        if found.as_ref().is_none_or(newer) {
            found = Some((ledger, snapshot, at));
        }
    }
    found.map(|(ledger, snapshot, at)| (ledger, snapshot, living.swap_remove(at))).ok_or(why)
}
