//! Restores the state of a mount from the ledger and the descriptors of another supervisor.

use std::os::fd::OwnedFd;

use stencilfs::control::{BackingRow, RecordDir, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memory::memfd::SharedCounters;
use stencilfs::sys::process::ProcessId;

use crate::protocol::fds;
use crate::protocol::ledger::Ledger;
use crate::protocol::stats::{Counter, Stats};
use crate::supervisor::callers;
use crate::supervisor::machine::{Backings, InitialState, MountFacts, Removal};
use crate::supervisor::program::Program;
use crate::supervisor::resources::Resources;

/// The descriptors of a mount, from another supervisor or its server.
pub struct MountFds {
    pub fuse: OwnedFd,
    pub counters: OwnedFd,
    pub ledger: Ledger,
    pub program: Program,
    pub listener: Option<OwnedFd>,
    /// Files of backings, in no particular order.
    pub files: Vec<OwnedFd>,
}

/// Restores a mount from the mount state in its ledger and from its descriptors. The caller holds the lock on `record`.
///
/// # Errors
/// Returns an error if the counters page cannot be mapped or the control socket cannot be created.
pub fn restore(snapshot: Snapshot, record: RecordDir, found: MountFds) -> Result<(InitialState, Resources)> {
    let counters = SharedCounters::map(found.counters)
        .map_err(|e| Error::failed("cannot map the counters page").because(e))?;
    let listener = match found.listener {
        Some(listener) => listener,
        None => callers::listen_at(&record)?,
    };
    let mut files = found.files;
    let backings = Backings::restore(snapshot.backings, |row: &BackingRow| {
        let at = files.iter().position(|fd| fds::has_identity(fd, row.identity))?;
        Some(files.swap_remove(at))
    });
    let stats = Stats::new(counters);
    let initial_state = InitialState {
        mount: MountFacts {
            options: snapshot.options,
            store_id: snapshot.store_id,
            device: snapshot.device,
            init: snapshot.init,
            init_reply: snapshot.reply,
            chosen: snapshot.chosen,
            record: record.path().to_owned(),
            counters_page: fds::identity(stats.page().fd())?,
        },
        program: found.program,
        backings,
        server: None,
        leaving: snapshot.leaving,
        removal: Removal::restore(&snapshot.condemned, std::time::Instant::now()),
        has_served: stats.get(Counter::Answers) > 0,
        restarts: snapshot.restarts,
        // Another supervisor's termination does not count: this process has received no signal.
        draining: snapshot.supervisor == ProcessId::current()? && snapshot.draining,
        rings: stats.page().rings(),
    };
    let MountFds { fuse, ledger, .. } = found;
    Ok((initial_state, Resources { fuse, stats, record, listener, ledger }))
}
