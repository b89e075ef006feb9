//! Cgroups, version 1 and 2: the cgroup of a process, its counter of OOM kills, and its memory below the limit.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::sys::process::procfs::{self, MountLine};
use crate::units::Bytes;

/// Where the cgroup file systems are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The OOM kill count of a cgroup or of the host at one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OomKills {
    /// The file with the counter.
    file: PathBuf,
    count: u64,
}

impl OomKills {
    /// Reads the counter for a live process: that of its cgroup, or that of the host if its cgroup has none. A zombie
    /// is unsuitable, because cgroup v1 moves zombies to the root of the hierarchy.
    pub fn of(pid: u32) -> Option<OomKills> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let files = candidates(&text).into_iter().chain([PathBuf::from("/proc/vmstat")]);
        files.into_iter().find_map(|file| {
            let count = parse(&fs::read_to_string(&file).ok()?)?;
            Some(OomKills { file, count })
        })
    }

    /// Returns true if the counter has risen since it was read.
    pub fn has_increased(&self) -> bool {
        fs::read_to_string(&self.file).ok().and_then(|text| parse(&text)).is_some_and(|now| now > self.count)
    }
}

/// Returns the cgroup of a process, with cgroup v1 that of the memory controller, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if the file cannot be read.
pub fn path(pid: u32) -> Result<Option<String>> {
    Ok(procfs::read_of(pid, "cgroup")?.map(|text| parse_path(&text)))
}

/// Returns the path of each memory cgroup below its root, by the inode number of its directory.
///
/// # Errors
/// Returns an error if the mounts cannot be listed.
pub fn memory_cgroups() -> Result<HashMap<u64, String>> {
    let mounts = procfs::mounts()?;
    let has_memory = |line: &&MountLine| match line.fs_type.as_str() {
        "cgroup" => line.super_options.split(',').any(|word| word == "memory"),
        "cgroup2" => line.mountpoint.join("cgroup.controllers").exists(),
        _ => false,
    };
    // With version 1, the memory controller is there and not in version 2.
    let of_version = |version: &str| mounts.iter().filter(has_memory).find(|line| line.fs_type == version);
    let Some(root) = of_version("cgroup").or_else(|| of_version("cgroup2")) else {
        return Ok(HashMap::new());
    };
    let (mut found, mut open) = (HashMap::new(), vec![root.mountpoint.clone()]);
    while let Some(directory) = open.pop() {
        // A cgroup may be removed at any time.
        let Ok(inode) = fs::metadata(&directory).map(|its| its.ino()) else { continue };
        let path = directory.strip_prefix(&root.mountpoint).unwrap_or(Path::new(""));
        found.insert(inode, format!("/{}", path.display()));
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        open.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    Ok(found)
}

/// Parses the text of a `cgroup` file.
fn parse_path(text: &str) -> String {
    let mut unified = "/";
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next(), parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
        if controllers.split(',').any(|c| c == "memory") {
            return path.to_owned();
        }
        if controllers.is_empty() {
            unified = path;
        }
    }
    unified.to_owned()
}

/// Returns how much memory the cgroups of a process leave below their limits, or `None` without a limit.
pub fn memory_left(pid: u32) -> Option<Bytes> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let directories = candidates(&text).into_iter().filter_map(|file| Some(file.parent()?.to_owned()));
    let left = directories.flat_map(|directory| {
        let within = |path: &&Path| path.starts_with(ROOT);
        directory.ancestors().take_while(within).filter_map(left_in).collect::<Vec<_>>()
    });
    left.min().map(Bytes::new)
}

/// Returns how many bytes one cgroup can still allocate below its limit, or `None` without a limit. Cached pages of
/// files count as free: the kernel reclaims them before it kills a process. Pages of a tmpfs are not among them.
fn left_in(directory: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    let cached = |prefix: &str| -> u64 {
        let fields = stat.lines().filter_map(|line| line.strip_prefix(prefix)?.split_once(' '));
        let of_files = fields.filter(|(name, _)| matches!(*name, "inactive_file" | "active_file"));
        of_files.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok()).sum()
    };
    let files =
        [("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")];
    files.into_iter().find_map(|(limit, used, prefix)| {
        let used = number(used)?.saturating_sub(cached(prefix));
        Some(number(limit)?.saturating_sub(used))
    })
}

/// Returns the counter files for the cgroups of a `/proc/PID/cgroup`: that of version 1, if version 1 has the memory
/// controller, before those of version 2.
fn candidates(text: &str) -> Vec<PathBuf> {
    let lines = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let file = |directory: &str, path: &str, name: &str| {
        PathBuf::from(format!("{ROOT}{directory}{}/{name}", path.trim_end_matches('/')))
    };
    let first = lines()
        .filter(|(controllers, _)| controllers.split(',').any(|c| c == "memory"))
        .map(|(_, path)| file("/memory", path, "memory.oom_control"));
    let second = lines()
        .filter(|(controllers, _)| controllers.is_empty())
        .flat_map(|(_, path)| ["", "/unified"].map(|directory| file(directory, path, "memory.events")));
    first.chain(second).collect()
}

/// Parses the line `oom_kill N`.
fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use crate::sys::process::cgroup::*;

    #[test]
    fn parses_the_cgroup_of_the_memory_controller() {
        assert_eq!(parse_path("5:memory:/vm/7\n0::/u\n"), "/vm/7");
        assert_eq!(parse_path("0::/u\n"), "/u");
    }

    #[test]
    fn memory_left_is_limit_minus_use() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(left_in(dir.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "300\n");
        assert_eq!(left_in(dir.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_in(dir.path()), Some(700));
        write("memory.stat", "anon 5\ninactive_file 40\nactive_file 10\nshmem 90\n");
        assert_eq!(left_in(dir.path()), Some(750));
        write("memory.stat", "");
        write("memory.max", "200\n");
        assert_eq!(left_in(dir.path()), Some(0));
    }

    #[test]
    fn reads_counters_of_both_cgroup_versions() {
        let paths = |text| candidates(text).iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(
            paths("4:cpu:/x\n3:memory:/vm/7\n0::/u\n")[0],
            "/sys/fs/cgroup/memory/vm/7/memory.oom_control"
        );
        assert_eq!(paths("0::/u.slice/a\n")[0], "/sys/fs/cgroup/u.slice/a/memory.events");
        assert_eq!(paths("0::/\n")[0], "/sys/fs/cgroup/memory.events");
        assert_eq!(parse("low 0\noom 3\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"), Some(5));
        assert!(OomKills::of(std::process::id()).is_some());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        let kills = OomKills { file: file.clone(), count: 2 };
        for (text, risen) in [("oom_kill 2\n", false), ("oom_kill 3\n", true), ("", false)] {
            fs::write(&file, text).unwrap();
            assert_eq!(kills.has_increased(), risen, "{text}");
        }
    }
}
