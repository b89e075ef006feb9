//! The process of a VM, as seen from this process.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// The error for a process that is not visible on this host.
pub(super) fn no_vm_here(pid: u32) -> Error {
    Error::failed(format!("process {pid}, which opened the QMP socket, is not a process of this host"))
        .hint("run stencil on QEMU's host, in the PID namespace of QEMU")
}

/// Returns a path of this process for a path that another process sees in its own root and working directory. If both
/// have the same root, the result stays valid when the other process exits.
pub(super) fn path_of(pid: u32, path: &Path) -> PathBuf {
    let of_process = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let same = |name: &str| {
        let (own, other) = (Path::new("/proc/self").join(name), of_process(name));
        identity(&own).is_some_and(|own| Some(own) == identity(&other))
    };
    if same("root") && same("ns/mnt") {
        if path.is_absolute() {
            return path.to_owned();
        }
        if let Ok(directory) = std::fs::read_link(of_process("cwd")) {
            return directory.join(path);
        }
    }
    match path.strip_prefix("/") {
        Ok(rest) => of_process("root").join(rest),
        Err(_) => of_process("cwd").join(path),
    }
}
