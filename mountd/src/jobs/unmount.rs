//! Takes a mount away. The kernel waits in there for pages that are being read: nobody who must answer may do it.

use stencilfs::control::{MountOptions, UnmountMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::mount;

/// Ends the mount.
///
/// # Errors
/// [`Code::InUse`](stencilfs::error::Code::InUse) where it is in use and not forced.
pub fn end(options: &MountOptions, device: u64, mode: UnmountMode) -> Result<()> {
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
    if mode == UnmountMode::Force { abort(options, device) } else { Ok(()) }
}

/// Aborts the connection: every waiting and every later request fails.
///
/// # Errors
/// The kernel's. A connection that is gone is none.
pub fn abort(options: &MountOptions, device: u64) -> Result<()> {
    match mount::abort_fuse_connection(device) {
        // The last user had gone already.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(|e| Error::io("cannot abort the connection", &options.mountpoint, e)),
    }
}
