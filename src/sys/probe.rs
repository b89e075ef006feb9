//! Capabilities of the host: kernel release and settings, privileges, file systems, sandbox interfaces.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::units::Bytes;

/// Release of a kernel, major and minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRelease {
    /// First number of the release.
    pub major: u32,
    /// Second number of the release.
    pub minor: u32,
}

impl KernelRelease {
    /// The oldest supported kernel. `cachestat` requires 6.5, `PAGEMAP_SCAN` 6.7, FUSE passthrough and
    /// `FUSE_NOTIFY_RESEND` 6.9.
    pub const OLDEST: KernelRelease = KernelRelease { major: 6, minor: 9 };

    /// Parses a release name such as `6.18.44-cloud`.
    pub fn parse(text: &str) -> Option<KernelRelease> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        Some(KernelRelease { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
    }

    /// Returns the release of the running kernel and its full name.
    ///
    /// # Errors
    /// Returns an error if the name has no release number.
    pub fn running() -> Result<(KernelRelease, String)> {
        let name = rustix::system::uname().release().to_string_lossy().into_owned();
        let release = Self::parse(&name)
            .ok_or_else(|| Error::failed(format!("invalid kernel release '{name}': no release number")))?;
        Ok((release, name))
    }
}

impl std::fmt::Display for KernelRelease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Returns the selected word of a kernel setting such as `always [madvise] never`.
pub fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

/// Returns the trimmed text of a small kernel file, or `None` if the file cannot be read.
pub fn setting(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Returns the number in a small kernel file, or `None` if there is none.
pub fn number(path: &str) -> Option<u64> {
    setting(path)?.parse().ok()
}

/// Returns true if the kernel commits memory strictly (`vm.overcommit_memory=2`): `MAP_NORESERVE` then has no effect.
pub fn commits_strictly() -> bool {
    number("/proc/sys/vm/overcommit_memory") == Some(2)
}

/// Returns true if this process has the effective capability `CAP_SYS_ADMIN` (bit 21).
pub fn has_sys_admin() -> bool {
    capability(21)
}

/// Returns the inode number of the PID namespace of this process, or `None` without `/proc`.
pub fn pid_namespace() -> Option<u64> {
    // A process stays in its PID namespace: unshare(2) and setns(2) affect only its children.
    static NAMESPACE: OnceLock<Option<u64>> = OnceLock::new();
    *NAMESPACE.get_or_init(|| namespace("pid"))
}

/// Inode numbers of the initial namespaces, constants of the kernel (`PROC_*_INIT_INO` of `proc_ns.h`).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// Returns true if this process sees all processes of the host.
pub fn in_initial_pid_namespace() -> bool {
    pid_namespace() == Some(INITIAL_PID_NAMESPACE)
}

/// Returns true if the capabilities of this process apply to the whole host. Capabilities in another user namespace do
/// not apply to processes outside of it.
pub fn in_initial_user_namespace() -> bool {
    namespace("user") == Some(INITIAL_USER_NAMESPACE)
}

fn namespace(kind: &str) -> Option<u64> {
    fs::metadata(format!("/proc/self/ns/{kind}")).ok().map(|file| std::os::unix::fs::MetadataExt::ino(&file))
}

fn capability(bit: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|mask| mask >> bit & 1 == 1)
}

/// Properties of a mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// Type name, or the magic number in hexadecimal for other types.
    pub name: String,
    /// Free space for unprivileged users.
    pub free: Bytes,
    /// True if the file system is mounted read-only.
    pub read_only: bool,
}

impl FileSystem {
    /// Returns true if files are stored only in memory and swap.
    pub fn is_memory(&self) -> bool {
        matches!(self.name.as_str(), "tmpfs" | "ramfs")
    }
}

/// Returns the file system that contains `path`.
///
/// # Errors
/// Returns an error if statfs(2) or statvfs(3) fails.
pub fn file_system(path: &Path) -> Result<FileSystem> {
    let io = |e: rustix::io::Errno| Error::io("cannot read file system properties", path, e.into());
    let kind = rustix::fs::statfs(path).map_err(io)?;
    let space = rustix::fs::statvfs(path).map_err(io)?;
    let magic = kind.f_type.cast_unsigned() & 0xFFFF_FFFF;
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

/// Minimum Landlock ABI version for the restrictions of a server.
pub const MIN_LANDLOCK_VERSION: u32 = 6;

/// Returns the Landlock ABI version of the kernel, or `None` if Landlock is not built in or not enabled.
pub fn landlock_version() -> Option<u32> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call accesses no memory, creates nothing and returns a number.
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

/// Returns true if the kernel supports seccomp filters with the action `SECCOMP_RET_KILL_PROCESS`.
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
    fn compares_releases_as_numbers() {
        let old = KernelRelease::parse("6.1.0-32-amd64").unwrap();
        let new = KernelRelease::parse("6.18.44-fc").unwrap();
        assert!(old < KernelRelease::OLDEST && new > KernelRelease::OLDEST);
        assert_eq!(KernelRelease::parse("linux"), None);
        assert!(KernelRelease::running().is_ok());
    }

    #[test]
    fn returns_the_selected_word() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("none"), None);
    }

    #[test]
    fn reads_file_system_properties() {
        assert!(file_system(Path::new("/")).unwrap().free.get() > 0);
        assert_eq!(file_system(Path::new("/no/such")).unwrap_err().code(), crate::error::Code::NotFound);
    }
}
