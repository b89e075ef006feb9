//! Memory cgroups, version 1 and 2: counters of OOM kills, and memory below the limit.

use std::fs;
use std::path::{Path, PathBuf};

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

/// Returns the difference between limit and use of one cgroup in bytes, or `None` without a limit.
fn left_in(directory: &Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
    let files = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")];
    files.into_iter().find_map(|(limit, used)| Some(number(limit)?.saturating_sub(number(used)?)))
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
    fn memory_left_is_limit_minus_use() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(left_in(dir.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "300\n");
        assert_eq!(left_in(dir.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_in(dir.path()), Some(700));
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
