//! A mount whose descriptors were handed to this process: by the program that it was before, or by a service manager
//! that kept them while nobody lived.

use std::os::fd::OwnedFd;

use rustix::process::Signal;
use stencilfs::control::{Channel, MountOptions, RecordDir, Snapshot};
use stencilfs::error::{Code, Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::sys::process::ProcessId;

use super::{Found, option_conflicts, restore, takeover};
use crate::protocol::fds;
use crate::protocol::ledger::{self, Ledger};
use crate::protocol::named_fds::Fds;
use crate::supervisor::Taken;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// A connection, and what its supervisor wrote down.
type Connection = (Ledger, Snapshot, OwnedFd);

/// Goes on with what the program before had.
///
/// # Errors
/// Names what is missing.
pub fn from_fds(fds: &mut Fds) -> Result<Taken> {
    let connection = connection(fds)?;
    let record = RecordDir::inherited(connection.1.record.clone(), fds.need("record")?);
    go_on(fds, connection, record)
}

/// Goes on with what a service manager kept of a mount that nobody lives for; none where its supervisor lives, which
/// serves it until its last clone ends.
///
/// # Errors
/// Names what is missing; [`Code::InUse`] where another supervisor takes it over just now.
pub fn from_manager(fds: &mut Fds, asked: &MountOptions) -> Result<Option<Taken>> {
    let connection = connection(fds)?;
    let snapshot = &connection.1;
    if snapshot.supervisor.is_alive() {
        log::info!(
            "an earlier mount is left to its supervisor, process {}: it serves until the last clone ends",
            snapshot.supervisor.pid
        );
        return Ok(None);
    }
    // Nobody serves its clones: they are not left alone for another store's sake. But nobody finds its templates any more.
    let other =
        option_conflicts::same_store(asked, &snapshot.options.store, snapshot.store_id.as_deref()).err();
    if let Some(other) = &other {
        log::error!(
            "{other}: it is served, at no path, until its last clone ends; then this one ends, to be started again"
        );
    }
    let record = match RecordDir::take_over(&snapshot.record) {
        // Of a mount that nobody lives for any more it may have been removed.
        Err(error) if error.code() == Code::NotFound => RecordDir::create(ProcessId::me()?)?,
        other => other?,
    };
    go_on(fds, connection, record).map(|taken| Some(Taken { drains: other.is_some(), ..taken }))
}

fn go_on(fds: &mut Fds, connection: Connection, record: RecordDir) -> Result<Taken> {
    let (ledger, snapshot, fuse) = connection;
    let counters =
        fds.all("counters").into_iter().rfind(|page| snapshot.page.is_none_or(|its| fds::is(page, its)));
    let missing =
        |what| Error::failed(format!("no descriptor '{what}' of this mount was handed to this program"));
    let counters = counters.ok_or_else(|| missing("counters"))?;
    // Servers go on from the program before, until a new one has proved itself.
    let (previous, program) = (fds.take("previous"), fds.take("program"));
    let program = Program::new(previous.or(program).ok_or_else(|| missing("program"))?);
    let (listener, link) = (fds.take("listener"), fds.take("peer").map(Channel::new));
    let row = snapshot.server.clone();
    let found = Found { fuse, counters, ledger, program, listener, files: fds.rest() };
    let (mut begin, resources) = restore(snapshot, record, found)?;
    let link = match (&row, link) {
        // A child of this process, with the socket to it.
        (Some(row), Some(link)) if row.process.is_alive() => {
            takeover::greet(&link);
            let table = takeover::table_of(row.process.pid);
            Some((link, table))
        }
        // A server without a socket is of no use: its successor gets what it had read.
        (Some(row), None) => {
            if let Err(error) = row.process.signal(Signal::KILL) {
                log::warn!("cannot kill the previous server: {error}");
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

/// The connection that lives, and its ledger. A manager may have kept descriptors of an earlier mount as well, whose
/// device number another one can have by now: of several ledgers it is the one that was written by the last supervisor.
fn connection(fds: &mut Fds) -> Result<Connection> {
    let mut living: Vec<OwnedFd> = fds.all("fuse");
    if living.len() > 1 {
        living.retain(|fuse| !fuse_dev::is_over(fuse));
    }
    let mut why = Error::failed("no ledger was handed to this program");
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
            why = Error::failed(
                "no connection of the mount that the ledger is about was handed to this program",
            )
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
