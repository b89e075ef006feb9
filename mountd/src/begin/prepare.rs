//! A new mount.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};
use stencilfs::control::{MountLock, MountOptions, RecordDir, places};
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
    let store = Store::open(&options.store)?;
    options.store = store.dir().to_owned();
    let fail = |what: &'static str| move |e| Error::failed(what).because(e);
    let fuse = fuse_dev::open()?;
    options.mountpoint = checks::canonical(&options.mountpoint)?;
    // First: the turn makes the runtime directory.
    places::check(&mut options)?;
    let _turn = MountLock::acquire()?;
    options.mountpoint = checks::mountpoint(&options.mountpoint)?;
    places::check(&mut options)?;
    let record = RecordDir::create(ProcessId::me()?)?;
    let counters = SharedCounters::create().map_err(fail("cannot make the counters page"))?;
    let ledger = Ledger::create().map_err(fail("cannot make the ledger"))?;
    let program = Program::own().map_err(fail("cannot open this program"))?;
    mount::mount_fuse(&fuse, &options.store, &options.mountpoint, options.noexec)?;
    let device = checks::device_of(&fuse, &options.mountpoint).inspect_err(|_| {
        if is_there(&fuse, &options.mountpoint)
            && let Err(error) = mount::unmount(&options.mountpoint, true)
        {
            log::error!("cannot unmount {}: {error}", options.mountpoint.display());
        }
    })?;
    let mountpoint = options.mountpoint.clone();
    let begin = || -> Result<Taken> {
        // One of another runtime directory does not wait for this one's turn.
        checks::is_lowest(&mountpoint, device)?;
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
        // Whoever has the next turn sees it.
        kept.write_record(None)?;
        Ok(Taken {
            kept,
            backings: Backings::default(),
            server: None,
            leaving: Vec::new(),
            condemned: Vec::new(),
            drains: false,
        })
    };
    begin().inspect_err(|_| unmount(&mountpoint, device))
}

/// Whether the connection's mount is what is seen there, where it cannot be found in the list of mounts. The kernel is
/// asked, not the mount. Where it does not say, all that is known is that this process has just put it there.
fn is_there(fuse: &OwnedFd, mountpoint: &Path) -> bool {
    let Ok(Some(ours)) = fuse_dev::connection_of(fuse) else { return true };
    let there = statx(CWD, mountpoint, AtFlags::STATX_DONT_SYNC, StatxFlags::INO);
    there.is_ok_and(|there| makedev(there.stx_dev_major, there.stx_dev_minor) == ours)
}

/// Takes the mount away: nobody would answer it any more.
pub fn unmount(mountpoint: &Path, device: u64) {
    if checks::device_at(mountpoint).is_ok_and(|there| there == device)
        && let Err(error) = mount::unmount(mountpoint, true)
    {
        log::error!("cannot unmount {}: {error}", mountpoint.display());
    }
}
