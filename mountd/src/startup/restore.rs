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

/// Descriptors of another supervisor.
pub struct Found {
    pub fuse: OwnedFd,
    pub counters: OwnedFd,
    pub ledger: Ledger,
    pub program: Program,
    pub listener: Option<OwnedFd>,
    pub files: Vec<OwnedFd>,
}

/// The mount of a ledger, with the descriptors that were found. The caller has locked `record`.
pub fn restore(snapshot: Snapshot, record: RecordDir, found: Found) -> Result<(InitialState, Resources)> {
    let counters = SharedCounters::map(found.counters)
        .map_err(|e| Error::failed("cannot map the page of counters").because(e))?;
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
    let begin = InitialState {
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
        // Another process has not been asked for the end.
        draining: snapshot.supervisor == ProcessId::me()? && snapshot.draining,
        rings: stats.page().rings(),
    };
    let Found { fuse, ledger, .. } = found;
    Ok((begin, Resources { fuse, stats, record, listener, ledger }))
}
