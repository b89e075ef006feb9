//! Creates a new mount.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};
use stencilfs::control::places;
use stencilfs::control::{MountLock, MountOptions, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::files::mount;
use stencilfs::sys::fuse::device;
use stencilfs::sys::memory::memfd::SharedCounters;
use stencilfs::sys::process::ProcessId;

use super::mountpoint as place;
use crate::protocol::fds;
use crate::protocol::ledger::Ledger;
use crate::protocol::stats::Stats;
use crate::supervisor::machine::{Backings, InitialState, MountFacts, Removal};
use crate::supervisor::program::Program;
use crate::supervisor::resources::Resources;
use crate::supervisor::{AcquiredMount, cache, callers};

/// Mounts, and reads the kernel's INIT request. Unmounts on failure.
///
/// # Errors
/// Returns an error that names the obstacle and a remedy.
pub fn prepare(mut options: MountOptions) -> Result<AcquiredMount> {
    let store = Store::open(&options.store)?;
    options.store = store.dir().to_owned();
    let fail = |what: &'static str| move |e| Error::failed(what).because(e);
    let fuse = device::open()?;
    options.mountpoint = place::canonical(&options.mountpoint)?;
    // The places are checked before the lock, because the lock creates the runtime directory.
    places::check(&mut options)?;
    let _lock = MountLock::acquire()?;
    options.mountpoint = place::mountpoint(&options.mountpoint)?;
    places::check(&mut options)?;
    let record = RecordDir::create(ProcessId::current()?)?;
    let counters = SharedCounters::create().map_err(fail("cannot create the counters page"))?;
    let ledger = Ledger::create().map_err(fail("cannot create the ledger"))?;
    let program = Program::own().map_err(fail("cannot open the program file of this process"))?;
    mount::mount_fuse(&fuse, &options.store, &options.mountpoint, options.noexec)?;
    let device = place::device_of(&fuse, &options.mountpoint).inspect_err(|_| {
        if is_there(&fuse, &options.mountpoint)
            && let Err(error) = mount::unmount(&options.mountpoint, true)
        {
            log::error!("cannot unmount {}: {error}", options.mountpoint.display());
        }
    })?;
    let mountpoint = options.mountpoint.clone();
    let start = || -> Result<AcquiredMount> {
        // A mount with another runtime directory does not take the same lock.
        place::expect_lowest(&mountpoint, device)?;
        let init = device::read_init(&fuse).map_err(fail("cannot read the kernel's INIT request"))?;
        let chosen = cache::choose(&options, &init)?;
        let listener = callers::listen_at(&record)?;
        let stats = Stats::new(counters);
        let initial_state = InitialState {
            mount: MountFacts {
                options,
                store_id: store.id(),
                device,
                init,
                init_reply: None,
                chosen,
                record: record.path().to_owned(),
                counters_page: fds::identity(stats.page().fd())?,
            },
            program,
            backings: Backings::default(),
            server: None,
            leaving: Vec::new(),
            removal: Removal::default(),
            has_served: false,
            restarts: 0,
            draining: false,
            rings: stats.page().rings(),
        };
        let resources = Resources { fuse, stats, record, listener, ledger };
        // The record is written before the lock is released: the next startup must find the record.
        resources.write_record(&initial_state.mount, None, &initial_state.program)?;
        Ok(AcquiredMount { initial_state, resources, link: None, drains: false })
    };
    start().inspect_err(|_| unmount(&mountpoint, device))
}

/// Returns true if the connection's mount is the topmost mount at the mountpoint. Called if the mount table does not
/// show the mount. Uses the kernel's cached attributes, without a request to the mount. On kernels that do not report
/// the device of a connection, assumes that the mount is there, since this process has just made it.
fn is_there(fuse: &OwnedFd, mountpoint: &Path) -> bool {
    let Ok(Some(ours)) = device::connection_of(fuse) else { return true };
    let there = statx(CWD, mountpoint, AtFlags::STATX_DONT_SYNC, StatxFlags::INO);
    there.is_ok_and(|there| makedev(there.stx_dev_major, there.stx_dev_minor) == ours)
}

/// Unmounts a mount that no server will serve.
pub fn unmount(mountpoint: &Path, device: u64) {
    if place::device_at(mountpoint).is_ok_and(|there| there == device)
        && let Err(error) = mount::unmount(mountpoint, true)
    {
        log::error!("cannot unmount {}: {error}", mountpoint.display());
    }
}
