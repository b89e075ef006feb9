//! Takes a mount away. The kernel waits in there for pages that are being read: nobody who must answer may do it.

use std::io;
use std::os::fd::OwnedFd;

use stencilfs::control::{MountOptions, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::sys::mount::{self, Abort};

/// Ends the mount, where it is forced with the abort that was opened before.
///
/// # Errors
/// [`Code::InUse`](stencilfs::error::Code::InUse) where it is in use and not forced.
pub fn end(
    options: &MountOptions,
    device: u64,
    mode: UnmountMode,
    abort: io::Result<Option<Abort>>,
) -> Result<()> {
    let path = &options.mountpoint;
    let attached = match mount::at(path) {
        // The connection can be aborted all the same.
        Err(error) if mode != UnmountMode::Force => return Err(error),
        there => there.ok().flatten().is_some_and(|there| there.dev == device),
    };
    if !attached && mode != UnmountMode::Force {
        return Err(Error::in_use("it is detached already, and served until its last user ends")
            .at(path)
            .remedy("`stencil status` names it; --force ends it, and whoever still needs it"));
    }
    if attached {
        mount::unmount(path, mode != UnmountMode::Plain).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => Error::in_use("the mount is in use")
                .at(path)
                .remedy("stop its users, or detach it with -l: they are then served until they end"),
            _ => Error::io("cannot unmount", path, e),
        })?;
    }
    let aborted = abort.and_then(|abort| abort.map_or(Ok(()), Abort::now));
    aborted.map_err(|e| Error::io("cannot abort the connection", path, e))
}

/// The abort of the mount's connection, for who holds that: once the mount is gone, its number may be another's. None
/// where it is over.
///
/// # Errors
/// The kernel's.
pub fn abort_of(fuse: &OwnedFd, device: u64) -> io::Result<Option<Abort>> {
    let abort = Abort::of(device);
    // Where it is not over yet, its number was its own.
    if fuse_dev::is_over(fuse) { Ok(None) } else { abort.map(Some) }
}
