//! A new mount.

use std::path::Path;

use stencilfs::control::{MountOptions, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::{fuse_dev, mount};

use super::{Taken, cache, checks};
use crate::backings::Backings;
use crate::kept::{Kept, Ledger, Program};
use crate::stats::Stats;

/// Mounts, and takes the kernel's first word. A mount that cannot go on is taken away again.
///
/// # Errors
/// What is in the way, with its remedy.
pub fn prepare(mut options: MountOptions) -> Result<Taken> {
    options.mountpoint = checks::mountpoint(&options.mountpoint)?;
    let store = Store::open(&options.store)?;
    options.store = store.dir().to_owned();
    let fail = |what: &'static str| move |e| Error::failed(what).because(e);
    let fuse = fuse_dev::open()?;
    let record = RecordDir::create(ProcessId::me()?)?;
    let counters = SharedCounters::create().map_err(fail("cannot make the counters page"))?;
    let ledger = Ledger::create().map_err(fail("cannot make the ledger"))?;
    let program = Program::own().map_err(fail("cannot open this program"))?;
    mount::mount_fuse(&fuse, &options.store, &options.mountpoint, options.noexec)?;
    let device = checks::device_at(&options.mountpoint).inspect_err(|_| {
        // Nothing is known of what is there but that this process has just put it there.
        if let Err(error) = mount::unmount(&options.mountpoint, true) {
            log::error!("cannot unmount {}: {error}", options.mountpoint.display());
        }
    })?;
    let mountpoint = options.mountpoint.clone();
    let begin = || -> Result<Taken> {
        let init = fuse_dev::read_init(&fuse).map_err(fail("the kernel does not begin to speak"))?;
        let chosen = cache::choose(&options, &init)?;
        let listener = crate::control::open(&record)?;
        let stats = Stats::new(counters);
        let store_id = Some(store.id());
        let (reply, restarts, terminations, previous) = (None, 0, 0, None);
        #[rustfmt::skip]
        let kept = Kept {
            options, store_id, device, init, reply, chosen, restarts, terminations, fuse, stats, record, listener,
            program, previous, ledger,
        };
        Ok(Taken {
            kept,
            backings: Backings::default(),
            server: None,
            leaving: Vec::new(),
            condemned: Vec::new(),
        })
    };
    begin().inspect_err(|_| unmount(&mountpoint, device))
}

/// Takes the mount away: nobody would answer it any more.
pub fn unmount(mountpoint: &Path, device: u64) {
    if checks::device_at(mountpoint).is_ok_and(|there| there == device)
        && let Err(error) = mount::unmount(mountpoint, true)
    {
        log::error!("cannot unmount {}: {error}", mountpoint.display());
    }
}
