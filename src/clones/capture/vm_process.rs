//! The process of a VM, as seen from this process.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::units::Bytes;

/// The error for a process that is not visible on this host.
pub(super) fn no_vm_here(pid: u32) -> Error {
    Error::failed(format!("process {pid}, which opened the VM's socket, is not a process of this host"))
        .hint("run stencil on the host of the VM, in the PID namespace of its VMM")
}

/// Returns true if a process is a Firecracker: by the name of the program, or by an option that only Firecracker has.
pub(super) fn is_firecracker(pid: u32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    program.file_name().is_some_and(|name| name.to_string_lossy().contains("firecracker"))
        || line.split(|byte| *byte == 0).any(is_api_option)
}

/// Returns true for Firecracker's `--api-sock`, and false for Cloud Hypervisor's `--api-socket`.
fn is_api_option(word: &[u8]) -> bool {
    word.strip_prefix(b"--api-sock").is_some_and(|rest| rest.is_empty() || rest.starts_with(b"="))
}

/// The user and the rights of a process.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Credentials {
    /// Real, effective, saved and file system user id.
    pub uids: [u32; 4],
    /// Real, effective, saved and file system group id.
    pub gids: [u32; 4],
    /// Permitted capabilities.
    pub capabilities: u64,
}

impl Credentials {
    /// Returns the credentials of a process (`self` for this process), or `None` if the process has exited.
    pub fn of(pid: impl std::fmt::Display) -> Option<Credentials> {
        Credentials::parse(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Credentials> {
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
        let ids = |key| {
            let numbers: Option<Vec<u32>> =
                field(key)?.split_ascii_whitespace().map(|word| word.parse().ok()).collect();
            numbers?.try_into().ok()
        };
        let capabilities = u64::from_str_radix(field("CapPrm")?, 16).ok()?;
        Some(Credentials { uids: ids("Uid")?, gids: ids("Gid")?, capabilities })
    }

    /// Returns true if a process with these credentials may open the files in `/proc/PID/fd` of a process with the
    /// credentials `other`: the rules of `ptrace(2)`, as far as they do not depend on `CAP_SYS_PTRACE`.
    fn can_inspect(&self, other: &Credentials) -> bool {
        (self.uids, self.gids) == (other.uids, other.gids) && other.capabilities & !self.capabilities == 0
    }
}

/// Returns true if a process can open the files of this process by their paths in `/proc`: if it has the same root
/// directory and namespaces, and the credentials for it.
pub(super) fn can_open_own_files(pid: u32) -> bool {
    let (own, other) = (Credentials::of("self"), Credentials::of(pid));
    own.zip(other).is_some_and(|(own, other)| other.can_inspect(&own))
        && ["root", "ns/mnt", "ns/pid", "ns/user"].iter().all(|name| is_same(pid, name))
}

/// Returns the limit of a process on the size of the files that it writes (`RLIMIT_FSIZE`): a longer write, or
/// `ftruncate(2)`, ends the process with SIGXFSZ. `None` means unlimited.
pub(super) fn file_size_limit(pid: u32) -> Option<Bytes> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max file size"))?;
    line.split_ascii_whitespace().next()?.parse().ok().map(Bytes::new)
}

/// Compares an object in the `/proc` directory of a process with that of this process.
fn is_same(pid: u32, name: &str) -> bool {
    let identity = |path: PathBuf| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let own = identity(Path::new("/proc/self").join(name));
    own.is_some() && own == identity(PathBuf::from(format!("/proc/{pid}/{name}")))
}

/// Returns a path of this process for a path that another process sees in its own root and working directory. If both
/// have the same root, the result stays valid when the other process exits.
pub(super) fn path_of(pid: u32, path: &Path) -> PathBuf {
    let of_process = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    if is_same(pid, "root") && is_same(pid, "ns/mnt") {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_the_option_of_firecracker_only() {
        let is = |word: &str| is_api_option(word.as_bytes());
        assert!(is("--api-sock") && is("--api-sock=/run/fc.sock"));
        assert!(!is("--api-socket") && !is("--api-socket=/run/ch.sock") && !is("-qmp") && !is(""));
    }

    #[test]
    fn only_a_process_with_all_rights_can_inspect() {
        let status = |uid: u32, gid: u32, caps: &str| {
            let text =
                format!("Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t{gid}\t{gid}\t{gid}\t{gid}\n");
            Credentials::parse(&format!("{text}CapInh:\t0\nCapPrm:\t{caps}\n")).unwrap()
        };
        let root = status(0, 0, "000001ffffffffff");
        assert!(root.can_inspect(&root));
        for other in [status(0, 0, "0"), status(0, 5, "000001ffffffffff"), status(123, 123, "0")] {
            assert!(!other.can_inspect(&root), "{other:?}");
        }
        assert_eq!(Credentials::parse("Name:\tx\n"), None);
    }

    #[test]
    fn a_process_without_a_limit_may_write_files_of_any_size() {
        assert!(Credentials::of("self").is_some());
        assert_eq!(file_size_limit(std::process::id()), None);
    }
}
