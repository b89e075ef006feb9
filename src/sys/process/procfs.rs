//! Readers of `/proc`. Parsers take text, so that unit tests can pass strings.
//!
//! A process may exit at any moment: functions that read about one process return `None` if it has exited.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys::process::tasks;
use crate::units::Bytes;

/// File system type of Stencil mounts in `/proc/mounts`.
pub const FS_TYPE: &str = "fuse.stencil";

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapLine {
    /// Address of the first byte.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
    /// Permissions, such as `rw-p`.
    pub perms: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device number of the file in the encoding of `st_dev`; 0 for anonymous memory.
    pub dev: u64,
    /// Inode number of the file; 0 for anonymous memory.
    pub ino: u64,
    /// The rest of the line: a path, a name such as `[heap]`, or empty.
    pub path: String,
}

impl MapLine {
    /// Returns the size of the mapping.
    pub fn len(&self) -> Bytes {
        Bytes::new(self.end.saturating_sub(self.start))
    }

    /// Returns true if the mapping has no bytes, which the kernel never prints.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Returns true for `MAP_PRIVATE`.
    pub fn is_private(&self) -> bool {
        self.perms.ends_with('p')
    }

    /// Returns true for memory that a VMM can have mapped over a template: private, anonymous, writable, without a
    /// name.
    pub fn is_unnamed_memory(&self) -> bool {
        self.ino == 0 && self.path.is_empty() && self.perms.starts_with("rw") && self.is_private()
    }
}

/// Parses the lines of a `maps` file for which `wanted(dev, ino)` is true. Invalid lines are ignored.
pub fn parse_maps(text: &str, wanted: impl Fn(u64, u64) -> bool) -> Vec<MapLine> {
    text.lines().filter_map(|line| parse_map_line(line, &wanted)).collect()
}

fn parse_map_line(line: &str, wanted: &impl Fn(u64, u64) -> bool) -> Option<MapLine> {
    let mut rest = line;
    let mut field = || {
        rest = rest.trim_start_matches(' ');
        let end = rest.find(' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail;
        word
    };
    let (range, perms, offset, dev, ino) = (field(), field(), field(), field(), field());
    let (major, minor) = dev.split_once(':')?;
    let dev = makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let ino = ino.parse().ok()?;
    if !wanted(dev, ino) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some(MapLine {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        perms: perms.to_owned(),
        offset: u64::from_str_radix(offset, 16).ok()?,
        dev,
        ino,
        path: rest.trim_start_matches(' ').to_owned(),
    })
}

/// Builds a device number in the encoding of `st_dev`.
pub fn makedev(major: u32, minor: u32) -> u64 {
    rustix::fs::makedev(major, minor)
}

/// Returns the mappings of a process for which `wanted(dev, ino)` is true, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if `/proc/PID/maps` cannot be read (a process of another user, without `CAP_SYS_PTRACE`).
pub fn maps(pid: u32, wanted: impl Fn(u64, u64) -> bool) -> Result<Option<Vec<MapLine>>> {
    Ok(maps_text(pid)?.map(|(_, text)| parse_maps(&text, wanted)))
}

/// Returns a thread that has the memory of the process, and the text of `/proc/PID/maps`. Returns `None` if the process
/// has exited.
///
/// # Errors
/// Same as [`maps`].
pub fn maps_text(pid: u32) -> Result<Option<(u32, String)>> {
    let read = |path: &Path| {
        let text = read_lossy(&path.join("maps"))?;
        Ok((!text.is_empty()).then(|| (tasks::thread_of(path).unwrap_or(pid), text)))
    };
    tasks::through_memory(pid, read)
        .map_err(|e| Error::io("cannot read process information", format!("/proc/{pid}/maps"), e))
}

/// Returns the pids of all processes that are visible in this PID namespace, in ascending order.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn pids() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").map_err(|e| Error::io("cannot list processes", "/proc", e))?;
    let mut pids: Vec<u32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    Ok(pids)
}

/// Fields of `/proc/PID/status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Name of the command, at most 15 bytes.
    pub name: String,
    /// Pid of the process that the thread belongs to.
    pub tgid: u32,
    /// True for a thread of the kernel.
    pub is_kernel_thread: bool,
    /// Real user id.
    pub uid: u32,
    /// Pid of the parent.
    pub ppid: u32,
    /// Number of threads.
    pub threads: u64,
    /// Size of the page tables (`VmPTE`).
    pub page_tables: Bytes,
    /// Resident anonymous memory, including private copies of file pages.
    pub rss_anon: Bytes,
    /// Swapped-out memory.
    pub swap: Bytes,
    /// True if the process may have 2 MiB entries (`THP_enabled`): prctl(2) can disable them.
    pub may_have_huge_pages: bool,
}

/// Parses the text of a `status` file.
pub fn parse_status(text: &str) -> Status {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let mut words = value.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        let number = || first.parse::<u64>().unwrap_or(0);
        match key {
            "Name" => status.name = value.trim().to_owned(),
            "Tgid" => status.tgid = first.parse().unwrap_or(0),
            "Kthread" => status.is_kernel_thread = first == "1",
            "Uid" => status.uid = first.parse().unwrap_or(0),
            "PPid" => status.ppid = first.parse().unwrap_or(0),
            "Threads" => status.threads = number(),
            "VmPTE" => status.page_tables = kib(number()),
            "RssAnon" => status.rss_anon = kib(number()),
            "VmSwap" => status.swap = kib(number()),
            "THP_enabled" => status.may_have_huge_pages = first == "1",
            _ => {}
        }
    }
    status
}

/// Returns fields of `/proc/PID/status`, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn status(pid: u32) -> Result<Option<Status>> {
    match read_memory_of(pid, "status", has_page_tables)? {
        None => Ok(read_of(pid, "status")?.map(|text| parse_status(&text))),
        text => Ok(text.map(|text| parse_status(&text))),
    }
}

/// Returns fields of the `status` file in the `/proc` directory of a thread, or `None` if the thread has no memory.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn status_with_memory(folder: &Path) -> io::Result<Option<Status>> {
    let text = read_lossy(&folder.join("status"))?;
    Ok(has_page_tables(&text).then(|| parse_status(&text)))
}

fn has_page_tables(status: &str) -> bool {
    status.contains("\nVmPTE:")
}

/// Returns fields of `/proc/TID/status` of a thread, or `None` if the thread has exited. Does not block.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn status_of_thread(tid: u32) -> Result<Option<Status>> {
    Ok(read_of(tid, "status")?.map(|text| parse_status(&text)))
}

/// Fields of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// State: `R`, `S`, `D`, `Z`, …
    pub state: char,
    /// Pid of the parent.
    pub ppid: u32,
    /// Number of threads that have not exited.
    pub threads: u64,
    /// Start time in clock ticks since boot, as counted in the time namespace of the reader. Comparable with other
    /// times, but not an identity of the process.
    pub start_ticks: u64,
}

impl Stat {
    /// Returns false for a zombie. A process whose first thread has exited is also in state `Z`, but keeps its
    /// descriptors and mappings while other threads live, so it counts as alive.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X') || self.threads > 1
    }
}

/// Parses the text of a `stat` file.
pub fn parse_stat(text: &str) -> Option<Stat> {
    // The command name in parentheses may contain any character, including parentheses.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        ppid: fields.get(1)?.parse().ok()?,
        threads: fields.get(17)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Returns fields of `/proc/PID/stat`, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn stat(pid: u32) -> Result<Option<Stat>> {
    Ok(read_of(pid, "stat")?.and_then(|text| parse_stat(&text)))
}

/// Returns the wait(2) status of a zombie, field 52 of `/proc/PID/stat`. Returns `None` for a live or reaped process,
/// and without permission to read the status: the kernel then prints 0, and refuses `/proc/PID/io` by the same check
/// (`ptrace_may_access`).
pub fn exit_status_of_zombie(pid: u32) -> Option<i32> {
    let text = read_of(pid, "stat").ok()??;
    let is_zombie = matches!(parse_stat(&text)?.state, 'Z' | 'X');
    let (_, rest) = text.rsplit_once(") ")?;
    let is_permitted = || fs::read(format!("/proc/{pid}/io")).is_ok();
    rest.split_ascii_whitespace().nth(49).filter(|_| is_zombie && is_permitted())?.parse().ok()
}

/// Returns the command line of a process as words, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn cmdline(pid: u32) -> Result<Option<Vec<String>>> {
    let text = match read_memory_of(pid, "cmdline", |text| !text.is_empty())? {
        None => read_of(pid, "cmdline")?,
        text => text,
    };
    Ok(text.map(|text| {
        text.split('\0')
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .split_last()
            .map_or(vec![], |(_, all)| all.to_vec())
    }))
}

/// Returns one value of `/proc/meminfo` (such as `MemAvailable`), or `None` if the kernel does not print it.
///
/// # Errors
/// Returns an error if `/proc/meminfo` cannot be read.
pub fn meminfo(key: &str) -> Result<Option<Bytes>> {
    Ok(parse_meminfo(&read_text(Path::new("/proc/meminfo"))?, key))
}

/// Parses one value of the text of a `meminfo` file.
pub fn parse_meminfo(text: &str, key: &str) -> Option<Bytes> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.split_ascii_whitespace().next()?.parse().ok().map(kib)
}

/// Returns the size of the free pages in per-CPU lists, which neither `MemFree` nor `MemAvailable` includes.
///
/// # Errors
/// Returns an error if `/proc/zoneinfo` cannot be read.
pub fn per_cpu_free() -> Result<Bytes> {
    Ok(parse_per_cpu_free(&read_text(Path::new("/proc/zoneinfo"))?))
}

/// Sums the per-CPU counts in the text of a `zoneinfo` file.
pub fn parse_per_cpu_free(text: &str) -> Bytes {
    let pages: u64 = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("count:")?.trim().parse::<u64>().ok())
        .sum();
    Bytes::new(pages * crate::units::PAGE_SIZE)
}

/// One line of `/proc/PID/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// Device number in the encoding of `st_dev`.
    pub dev: u64,
    /// Path of the mountpoint.
    pub mountpoint: PathBuf,
    /// Per-mount options.
    pub options: String,
    /// File system type (`fuse.stencil`, `ext4`).
    pub fs_type: String,
    /// Mounted device or other source.
    pub source: String,
    /// Per-superblock options.
    pub super_options: String,
}

/// Returns all mounts in the mount namespace of this process.
///
/// # Errors
/// Returns an error if `/proc/self/mountinfo` cannot be read.
pub fn mounts() -> Result<Vec<MountLine>> {
    Ok(parse_mountinfo(&read_text(Path::new("/proc/self/mountinfo"))?))
}

/// Parses the text of a `mountinfo` file.
pub fn parse_mountinfo(text: &str) -> Vec<MountLine> {
    text.lines()
        .filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let head: Vec<&str> = head.split(' ').collect();
            let mut tail = tail.split(' ');
            let (major, minor) = head.get(2)?.split_once(':')?;
            Some(MountLine {
                dev: makedev(major.parse().ok()?, minor.parse().ok()?),
                mountpoint: PathBuf::from(unescape(head.get(4)?)),
                options: (*head.get(5)?).to_owned(),
                fs_type: tail.next()?.to_owned(),
                source: unescape(tail.next()?),
                super_options: tail.next().unwrap_or_default().to_owned(),
            })
        })
        .collect()
}

/// Decodes the octal escapes of the kernel in paths (`\040` for a space).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn kib(number: u64) -> Bytes {
    Bytes::new(number.saturating_mul(1024))
}

/// Reads a file of a process. Returns `None` if the process has exited.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn read_of(pid: u32, name: &str) -> Result<Option<String>> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    match read_lossy(&path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(Error::io("cannot read process information", path, e)),
    }
}

/// Reads a file about the memory of a process through a thread for which `has_memory` accepts the text.
fn read_memory_of(pid: u32, name: &str, has_memory: impl Fn(&str) -> bool) -> Result<Option<String>> {
    let read = |path: &Path| read_lossy(&path.join(name)).map(|text| has_memory(&text).then_some(text));
    tasks::through_memory(pid, read)
        .map_err(|e| Error::io("cannot read process information", format!("/proc/{pid}/{name}"), e))
}

/// Reads a small kernel file as text; invalid UTF-8 is replaced.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn read_text(path: &Path) -> Result<String> {
    read_lossy(path).map_err(|e| Error::io("cannot read", path, e))
}

fn read_lossy(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::with_capacity(16 << 10);
    // Without a limit, `read_to_end` first asks for the size and the position of the file, which these files do not
    // have.
    fs::File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use crate::sys::process::procfs::*;

    #[test]
    fn parses_map_lines() {
        let text = "\
7f0000000000-7f0000200000 rw-p 00100000 00:2f 9223372036854775806              /mnt/by-id/ab cd/memory (deleted)
7f0000200000-7f0000201000 ---p 00000000 00:00 0 
7ffc0000-7ffd0000 rw-p 00000000 00:00 0                          [stack]
garbage
";
        let all = parse_maps(text, |_, _| true);
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].ino, 9_223_372_036_854_775_806);
        assert_eq!(all[0].dev, makedev(0, 0x2f));
        assert_eq!(all[0].offset, 1 << 20);
        assert_eq!(all[0].len().get(), 2 << 20);
        assert_eq!(all[0].path, "/mnt/by-id/ab cd/memory (deleted)");
        assert!(all[0].is_private());
        assert_eq!(all[2].path, "[stack]");
        assert_eq!(parse_maps(text, |dev, _| dev == makedev(0, 0x2f)).len(), 1);
    }

    #[test]
    fn parses_status_and_stat() {
        let status = parse_status(
            "Name:\tqemu (x)\nTgid:\t6\nPPid:\t7\nKthread:\t1\nUid:\t12\t0\t0\t0\nVmPTE:\t      44 kB\nRssAnon:\t 8 kB\nThreads:\t3\nVmSwap:\t0 kB\n",
        );
        assert_eq!((status.name.as_str(), status.uid, status.ppid, status.threads), ("qemu (x)", 12, 7, 3));
        assert_eq!((status.tgid, status.is_kernel_thread), (6, true));
        assert_eq!((status.page_tables.get(), status.rss_anon.get()), (44 << 10, 8 << 10));
        let stat =
            parse_stat("12 (a) b) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 77812 1 2 3").unwrap();
        assert_eq!((stat.state, stat.ppid, stat.threads, stat.start_ticks), ('S', 1, 1, 77812));
        assert_eq!(parse_stat("12 (a"), None);
    }

    #[test]
    fn parses_meminfo_and_zoneinfo() {
        assert_eq!(
            parse_meminfo("MemFree: 1 kB\nMemAvailable:   5 kB\n", "MemAvailable"),
            Some(Bytes::new(5120))
        );
        assert_eq!(parse_meminfo("MemFree: 1 kB\n", "Mem"), None);
        let zone = "Node 0, zone DMA\n  pagesets\n    cpu: 0\n              count:    3\n              high:     9\n    cpu: 1\n              count: 2\n";
        assert_eq!(parse_per_cpu_free(zone).get(), 5 * 4096);
        assert!(per_cpu_free().is_ok() && meminfo("MemTotal").unwrap().is_some());
    }

    #[test]
    fn parses_mount_lines_with_spaces_in_paths() {
        let text =
            "36 25 0:47 / /mnt/a\\040b rw,nosuid shared:1 master:2 - fuse.stencil /var/lib/s rw,user_id=0\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts[0].mountpoint, PathBuf::from("/mnt/a b"));
        assert_eq!((mounts[0].dev, mounts[0].fs_type.as_str()), (makedev(0, 47), "fuse.stencil"));
    }

    #[test]
    fn reads_live_and_missing_processes() {
        let me = std::process::id();
        assert!(stat(me).unwrap().unwrap().is_alive());
        assert!(maps(me, |_, _| true).unwrap().unwrap().len() > 3);
        assert!(cmdline(me).unwrap().unwrap()[0].contains("stencil"));
        assert_eq!(status(u32::MAX >> 1).unwrap(), None);
        assert_eq!(status_of_thread(u32::MAX >> 1).unwrap(), None);
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let status = status_of_thread(thread).unwrap().unwrap();
        assert_eq!((status.tgid, status.is_kernel_thread), (me, false));
    }
}
