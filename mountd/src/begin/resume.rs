//! A mount whose descriptors were handed to this process: by the program that it was before, or by a service manager
//! that kept them while nobody lived.

use stencilfs::control::{Channel, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::ProcessId;

use super::{Fds, Found, Taken, adopt, restore};
use crate::kept::{self, Ledger, Program};
use crate::supervisor::Server;

/// Goes on with these.
///
/// # Errors
/// Names what is missing.
pub fn from_fds(fds: &mut Fds) -> Result<Taken> {
    let unreadable = |e| Error::failed("the ledger cannot be read").because(e);
    let (ledger, text) = Ledger::open(fds.need("ledger")?).map_err(unreadable)?;
    let snapshot = kept::parse(&text)?;
    let record = match fds.take("record") {
        Some(folder) => RecordDir::inherited(snapshot.record.clone(), folder),
        // Of a mount that nobody lives for any more the record may have been removed.
        None => RecordDir::take_over(&snapshot.record).or_else(|_| RecordDir::create(ProcessId::me()?))?,
    };
    let row = snapshot.server.clone().filter(|row| row.process.is_alive());
    // Servers go on from the program before, until a new one has proved itself.
    let program = fds.take("previous");
    let program = match program {
        Some(program) => program,
        None => fds.need("program")?,
    };
    let _ = fds.take("program");
    let found = Found {
        fuse: fds.need("fuse")?,
        counters: fds.need("counters")?,
        ledger,
        program: Program::new(program),
        listener: fds.take("listener"),
        files: Vec::new(),
    };
    let link = fds.take("peer").map(Channel::new);
    let found = Found { files: fds.rest(), ..found };
    let (kept, mut backings) = restore(snapshot, record, found)?;
    let server = match (row, link) {
        (Some(row), Some(link)) => {
            adopt::greet(&link);
            let table = adopt::table_of(row.process.pid);
            Server::new(row, link, &kept).ok().map(|server| (server, table))
        }
        // A server whose link is lost is of no use: its successor gets what it had read.
        (Some(row), None) => {
            let _ = row.process.signal(rustix::process::Signal::KILL);
            None
        }
        (None, _) => None,
    };
    if server.is_none() {
        drop(backings.forget_unfinished());
    }
    Ok(Taken { kept, backings, server })
}
