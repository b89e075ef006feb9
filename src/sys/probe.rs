//! What this host can do: one question a function, answers as values.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::units::Bytes;

/// Release of a kernel, as far as features hang on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRelease {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

impl KernelRelease {
    /// The oldest kernel that Stencil runs on: `cachestat` came with 6.5, `PAGEMAP_SCAN` with 6.7, FUSE
    /// passthrough and `FUSE_NOTIFY_RESEND` with 6.9.
    pub const OLDEST: KernelRelease = KernelRelease { major: 6, minor: 9 };

    /// Reads `6.18.44-cloud`.
    pub fn parse(text: &str) -> Option<KernelRelease> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        Some(KernelRelease { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
    }

    /// The running kernel, with its full name.
    ///
    /// # Errors
    /// When the name holds no release number.
    pub fn running() -> Result<(KernelRelease, String)> {
        let name = rustix::system::uname().release().to_string_lossy().into_owned();
        let release = Self::parse(&name)
            .ok_or_else(|| Error::failed(format!("cannot read a release number in kernel name '{name}'")))?;
        Ok((release, name))
    }
}

impl std::fmt::Display for KernelRelease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The chosen word of a kernel file like `always [madvise] never`.
pub fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

/// The trimmed text of a small kernel file, or `None` where this kernel has no such file.
pub fn setting(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A number in a small kernel file.
pub fn number(path: &str) -> Option<u64> {
    setting(path)?.parse().ok()
}

/// True when this process has the capability `CAP_SYS_ADMIN` (bit 21) in effect.
pub fn has_sys_admin() -> bool {
    capability(21)
}

/// The PID namespace of this process; `None` without `/proc`.
pub fn pid_namespace() -> Option<u64> {
    namespace("pid")
}

/// Inode numbers of the initial namespaces, which the kernel fixes (`PROC_*_INIT_INO` of its `proc_ns.h`).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// True where this process sees the processes of the whole host.
pub fn in_initial_pid_namespace() -> bool {
    pid_namespace() == Some(INITIAL_PID_NAMESPACE)
}

/// True where the capabilities of this process count on the whole host: those of another user namespace say nothing
/// about processes outside of it.
pub fn in_initial_user_namespace() -> bool {
    namespace("user") == Some(INITIAL_USER_NAMESPACE)
}

fn namespace(kind: &str) -> Option<u64> {
    fs::metadata(format!("/proc/self/ns/{kind}")).ok().map(|file| std::os::unix::fs::MetadataExt::ino(&file))
}

/// True when this process has the capability `CAP_SYS_PTRACE` (bit 19) in effect, on the whole host: it may look into
/// every process.
pub fn may_trace() -> bool {
    in_initial_user_namespace() && capability(19)
}

fn capability(bit: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|mask| mask >> bit & 1 == 1)
}

/// A file system, as far as Stencil cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type's name, or the magic number in hex.
    pub name: String,
    /// Free bytes for users without privileges.
    pub free: Bytes,
    /// Mounted read-only.
    pub read_only: bool,
}

impl FileSystem {
    /// True where files have no other place than RAM and swap.
    pub fn is_memory(&self) -> bool {
        matches!(self.name.as_str(), "tmpfs" | "ramfs")
    }
}

/// The file system that holds `path`.
///
/// # Errors
/// When `path` cannot be reached.
pub fn file_system(path: &Path) -> Result<FileSystem> {
    let io = |e: rustix::io::Errno| Error::io("cannot ask for the file system of", path, e.into());
    let kind = rustix::fs::statfs(path).map_err(io)?;
    let space = rustix::fs::statvfs(path).map_err(io)?;
    let magic = kind.f_type as u64 & 0xFFFF_FFFF;
    let name = match magic {
        0xEF53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683E => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x8584_58F6 => "ramfs".to_owned(),
        0x794C_7630 => "overlay".to_owned(),
        0x6573_5546 => "fuse".to_owned(),
        0xE0F5_E1E2 => "erofs".to_owned(),
        0x6969 => "nfs".to_owned(),
        other => format!("{other:#x}"),
    };
    Ok(FileSystem {
        name,
        free: Bytes::new(space.f_bavail.saturating_mul(space.f_frsize)),
        read_only: space.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
    })
}

/// The version of Landlock whose rights a server gives up.
pub const LANDLOCK_NEEDED: u32 = 7;

/// Version of the kernel's Landlock; none where it is not built in or not switched on.
pub fn landlock_version() -> Option<u32> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no memory and makes nothing: it answers with a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok().filter(|&v| v > 0)
}

/// True when the kernel can filter system calls, and end a process by it.
pub fn has_seccomp_filters() -> bool {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads the four bytes of `action` and changes nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, (&raw const action).cast::<u8>())
    };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers() {
        let old = KernelRelease::parse("6.1.0-32-amd64").unwrap();
        let new = KernelRelease::parse("6.18.44-fc").unwrap();
        assert!(old < KernelRelease::OLDEST && new > KernelRelease::OLDEST);
        assert_eq!(KernelRelease::parse("linux"), None);
        assert!(KernelRelease::running().is_ok());
    }

    #[test]
    fn chosen_words() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("none"), None);
    }

    #[test]
    fn file_system_of_proc_and_of_nothing() {
        assert!(file_system(Path::new("/")).unwrap().free.get() > 0);
        assert_eq!(file_system(Path::new("/no/such")).unwrap_err().code(), crate::error::Code::NotFound);
    }
}
