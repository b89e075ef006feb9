//! Unmounts. umount(2) waits for pending reads of pages, so the supervisor, which must answer requests, cannot call it.

use std::io;
use std::os::fd::OwnedFd;

use stencilfs::control::{MountOptions, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::mount::{self, Abort};
use stencilfs::sys::fuse::device;

/// Unmounts; a forced unmount uses `abort`, which was opened before.
///
/// # Errors
/// Returns [`Code::InUse`](stencilfs::error::Code::InUse) if the mount is in use and not forced.
pub fn end(
    options: &MountOptions,
    device: u64,
    mode: UnmountMode,
    abort: io::Result<Option<Abort>>,
) -> Result<()> {
    let path = &options.mountpoint;
    let attached = match mount::at(path) {
        // A forced unmount can still abort the connection.
        Err(error) if mode != UnmountMode::Force => return Err(error),
        there => there.ok().flatten().is_some_and(|there| there.dev == device),
    };
    if !attached && mode != UnmountMode::Force {
        return Err(Error::in_use("the mount is already detached, and is served until its last use ends")
            .at(path)
            .remedy("see 'stencil status'; --force aborts it and kills processes that still need it"));
    }
    if attached {
        mount::unmount(path, mode != UnmountMode::Plain).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => Error::in_use("the mount is in use")
                .at(path)
                .remedy("stop the processes that use it, or detach it with -l to serve them until they end"),
            _ => Error::io("cannot unmount", path, e),
        })?;
    }
    let aborted = abort.and_then(|abort| abort.map_or(Ok(()), Abort::now));
    aborted.map_err(|e| Error::io("cannot abort the connection", path, e))
}

/// Opens the abort file of the mount's connection. The caller holds the connection: after the unmount the kernel may
/// reuse the device number. Returns `None` if the connection is closed.
///
/// # Errors
/// Returns an error if the file in fusectl cannot be opened.
pub fn abort_of(fuse: &OwnedFd, device: u64) -> io::Result<Option<Abort>> {
    let abort = Abort::of(device);
    // The connection is still open, so the number belonged to it when the file was opened.
    if device::is_over(fuse) { Ok(None) } else { abort.map(Some) }
}
