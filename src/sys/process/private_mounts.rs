//! Mounts that only one command sees, in a mount namespace of its own. They end with the last process of the namespace,
//! without an unmount.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::CWD;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A bind mount of a file or directory of the host. Both paths are absolute; the mount point exists and is of the same
/// kind.
#[derive(Debug, Clone)]
pub struct PrivateMount {
    /// Path on the host.
    pub source: CString,
    /// Mount point.
    pub target: CString,
}

/// Gives the command a mount namespace with these mounts. Other mounts of the host stay visible; a later unmount on the
/// host propagates to the namespace, and no mount of the namespace propagates to the host.
pub fn mount_privately(command: &mut Command, mounts: Vec<PrivateMount>) -> &mut Command {
    // SAFETY: the closure makes system calls only and allocates nothing, because the paths are C strings.
    // `unshare_unsafe` is unsafe only with `UnshareFlags::FILES`.
    unsafe {
        command.pre_exec(move || {
            unshare_unsafe(UnshareFlags::NEWNS)?;
            mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
            mounts.iter().try_for_each(mount)
        })
    }
}

fn mount(mount: &PrivateMount) -> io::Result<()> {
    let tree = open_tree(
        CWD,
        mount.source.as_c_str(),
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&tree, c"", CWD, mount.target.as_c_str(), flags)?)
}
