//! Unmounting, in a job: umount(2) waits for pending reads of pages, and the supervisor must answer requests meanwhile.

use std::io;
use std::os::fd::OwnedFd;

use stencilfs::control::{MountOptions, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::mount::{self, Abort};
use stencilfs::sys::fuse::device;

/// Unmounts. A forced unmount then aborts the connection through `abort`.
///
/// # Errors
/// Returns [`Code::InUse`](stencilfs::error::Code::InUse) if the mount is in use and not forced.
pub fn unmount(
    options: &MountOptions,
    device: u64,
    mode: UnmountMode,
    abort: io::Result<Option<Abort>>,
) -> Result<()> {
    let path = &options.mountpoint;
    let attached = match mount::at(path) {
        // Even if the mount table cannot be read, a forced unmount can abort the connection.
        Err(error) if mode != UnmountMode::Force => return Err(error),
        there => there.ok().flatten().is_some_and(|there| there.dev == device),
    };
    if !attached && mode != UnmountMode::Force {
        return Err(Error::in_use(
            "the mount is already detached, and is served until the last process that uses it ends",
        )
        .at(path)
        .hint(
            "see 'stencil status'; --force aborts the mount and kills processes that still need its pages",
        ));
    }
    if attached {
        mount::unmount(path, mode != UnmountMode::Plain).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => Error::in_use("the mount is in use")
                .at(path)
                .hint("stop the processes that use it, or detach it with -l to serve them until they end"),
            _ => Error::io("cannot unmount", path, e),
        })?;
    }
    let aborted = abort.and_then(|abort| abort.map_or(Ok(()), Abort::now));
    aborted.map_err(|e| Error::io("cannot abort the connection", path, e))
}

/// Opens the abort file of the mount's connection in fusectl. The file must be opened before the unmount, because
/// afterwards the kernel may reuse the device number. Returns `None` if the connection is closed.
///
/// # Errors
/// Returns an error if the file cannot be opened.
pub fn open_abort_file(fuse: &OwnedFd, device: u64) -> io::Result<Option<Abort>> {
    let abort = Abort::of(device);
    // If the connection is open now, the device number was that of this mount when the file was opened.
    if device::is_over(fuse) { Ok(None) } else { abort.map(Some) }
}
