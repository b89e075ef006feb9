//! Bind mounts in a mount namespace that only this process and its children see. Mounts that a child has copied into a
//! new namespace stay until the last process of that namespace ends.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves this thread, and the threads that it starts later, to a new mount namespace. Other mounts of the host stay
/// visible; a later unmount on the host propagates to the namespace, and no mount of the namespace propagates to the
/// host.
///
/// # Errors
/// Returns an error if the kernel refuses a new namespace, for example to an ordinary user.
pub fn enter_namespace() -> io::Result<()> {
    // SAFETY: `unshare_unsafe` is unsafe only with `UnshareFlags::FILES`.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    Ok(mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// A bind mount in the namespace of [`enter_namespace`]. It is unmounted on drop, so that its mount point can be
/// removed.
#[derive(Debug)]
pub struct PrivateMount {
    target: PathBuf,
}

impl PrivateMount {
    /// Mounts a file or directory of the host on `target`, which exists and is of the same kind.
    ///
    /// # Errors
    /// Returns an error if a path does not exist or the kernel refuses the mount.
    pub fn bind(source: &Path, target: PathBuf) -> io::Result<PrivateMount> {
        let tree = open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
        move_mount(&tree, c"", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(PrivateMount { target })
    }
}

impl Drop for PrivateMount {
    fn drop(&mut self) {
        // Fails only if the mount is gone already.
        let _ = unmount(&self.target, UnmountFlags::DETACH);
    }
}
