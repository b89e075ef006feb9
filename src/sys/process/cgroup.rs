//! Cgroups, version 1 and 2: the cgroup of a process, its counter of OOM kills, and what it leaves below its limits.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys::process::procfs::{self, MountLine};
use crate::units::{Bytes, PAGE_SIZE};

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

/// Memory of one cgroup and of the cgroups below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMemory {
    /// Directory of the cgroup.
    pub path: PathBuf,
    /// Limit (`memory.max`, `memory.limit_in_bytes`); `None` without a limit.
    pub limit: Option<Bytes>,
    /// Use at which the kernel slows the processes down (`memory.high` of version 2).
    pub high: Option<Bytes>,
    /// Memory that counts for the limit.
    pub used: Bytes,
    /// Cached pages of files. The kernel reclaims them before it kills a process. Pages of a tmpfs are not among them.
    pub files: Bytes,
    /// Memory of the kernel for these processes: page tables, stacks, descriptions of processes and mappings.
    pub kernel: Option<Bytes>,
}

/// The largest limit that version 1 stores (`PAGE_COUNTER_MAX`), which means that there is none.
const UNLIMITED_V1: u64 = i64::MAX.cast_unsigned() / PAGE_SIZE * PAGE_SIZE;

impl GroupMemory {
    /// Reads the files of a cgroup. Returns `None` for a directory without the files of a memory controller.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read or parsed.
    fn read(directory: &Path) -> Result<Option<GroupMemory>> {
        for (limit, used, prefix) in [
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ] {
            let Some(used) = read_number(directory, used)? else { continue };
            let stat = read_if_there(&directory.join("memory.stat"))?.unwrap_or_default();
            let field = |name: &str| parse_field(&stat, &format!("{prefix}{name}"));
            let files = [field("inactive_file"), field("active_file")];
            let kernel = field("kernel")
                .map_or_else(|| read_number(directory, "memory.kmem.usage_in_bytes"), |n| Ok(Some(n)))?;
            return Ok(Some(GroupMemory {
                path: directory.to_owned(),
                limit: read_limit(directory, limit)?.filter(|limit| *limit < UNLIMITED_V1).map(Bytes::new),
                high: read_limit(directory, "memory.high")?.map(Bytes::new),
                used: Bytes::new(used),
                files: Bytes::new(files.into_iter().flatten().fold(0, u64::saturating_add)),
                kernel: kernel.map(Bytes::new),
            }));
        }
        Ok(None)
    }

    /// Returns how much memory the cgroup leaves below a limit. Cached pages of files count as free.
    pub fn left_below(&self, limit: Bytes) -> Bytes {
        limit.saturating_sub(self.used.saturating_sub(self.files))
    }
}

/// Returns the cgroup with this directory and those above it, the inner ones first, as far as the memory controller is
/// enabled for them.
///
/// # Errors
/// Returns an error if a file cannot be read or parsed.
pub fn memory_groups(directory: &Path) -> Result<Vec<GroupMemory>> {
    directory.ancestors().filter_map(|directory| GroupMemory::read(directory).transpose()).collect()
}

/// Returns how much memory the cgroups of a process leave below their limits, or `None` without a limit.
pub fn memory_left(pid: u32) -> Option<Bytes> {
    let groups = memory_groups(&memory_directory(pid)?).ok()?;
    groups.iter().filter_map(|group| Some(group.left_below(group.limit?))).min()
}

/// Returns the directory of the cgroup of a process in the hierarchy of the memory controller, or `None` without this
/// controller.
pub fn memory_directory(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let directories = candidates(&text).into_iter().filter_map(|file| Some(file.parent()?.to_owned()));
    // A group that cannot be read must not pass for one without a limit.
    directories
        .into_iter()
        .find(|directory| memory_groups(directory).map_or(true, |groups| !groups.is_empty()))
}

/// Returns the cgroup whose limit on tasks is the next to be reached, of a process and of the cgroup with a directory, and
/// how many tasks it leaves. Returns `None` without a limit.
///
/// # Errors
/// Returns an error if a file cannot be read or parsed.
pub fn tasks_left(pid: Option<u32>, directory: Option<&Path>) -> Result<Option<(PathBuf, u64)>> {
    let text = pid.map(|pid| procfs::read_of(pid, "cgroup")).transpose()?.flatten().unwrap_or_default();
    let of_process = files_of(&text, "pids", "pids.max", "pids.max");
    let directories = of_process.iter().filter_map(|file| file.parent()).chain(directory);
    let mut least: Option<(PathBuf, u64)> = None;
    for directory in directories.flat_map(Path::ancestors) {
        let Some(limit) = read_limit(directory, "pids.max")? else { continue };
        let left = limit.saturating_sub(read_number(directory, "pids.current")?.unwrap_or(0));
        if least.as_ref().is_none_or(|(_, least)| left < *least) {
            least = Some((directory.to_owned(), left));
        }
    }
    Ok(least)
}

/// Returns the directories of a cgroup and of all cgroups below.
///
/// # Errors
/// Returns an error if a directory cannot be read.
pub fn tree(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: io::Error| Error::io("cannot read the cgroup", directory, e);
    let mut directories = vec![directory.to_owned()];
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            directories.extend(tree(&entry.path())?);
        }
    }
    Ok(directories)
}

/// Returns the inode number of a cgroup, by which `/proc/kpagecgroup` names it.
///
/// # Errors
/// Returns an error if the directory cannot be read.
pub fn inode(directory: &Path) -> Result<u64> {
    let found = fs::metadata(directory).map_err(|e| Error::io("cannot read the cgroup", directory, e))?;
    Ok(found.ino())
}

/// Returns the number of processes in a cgroup, without those of the cgroups below.
///
/// # Errors
/// Returns an error if the list cannot be read.
pub fn processes(directory: &Path) -> Result<u64> {
    Ok(read_if_there(&directory.join("cgroup.procs"))?.unwrap_or_default().lines().count() as u64)
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("cannot read", path, e)),
    }
}

fn read_number(directory: &Path, name: &str) -> Result<Option<u64>> {
    let path = directory.join(name);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| not_a_number(&path))
}

/// Reads a limit. Returns `None` for the word `max`, and for a file that does not exist.
fn read_limit(directory: &Path, name: &str) -> Result<Option<u64>> {
    let path = directory.join(name);
    match read_if_there(&path)?.as_deref().map(str::trim) {
        None | Some("max") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| not_a_number(&path)),
    }
}

fn not_a_number(path: &Path) -> Error {
    Error::failed("cannot parse the file of a cgroup: expected a number").at(path)
}

/// Parses the line `NAME NUMBER` of a `memory.stat`.
fn parse_field(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Returns the counter files for the cgroups of a `/proc/PID/cgroup`: that of version 1, if version 1 has the memory
/// controller, before those of version 2.
fn candidates(text: &str) -> Vec<PathBuf> {
    files_of(text, "memory", "memory.oom_control", "memory.events")
}

/// Returns the paths that a file can have for the cgroups of a `/proc/PID/cgroup`: `first` with version 1, if version 1
/// has the controller, before `second` with version 2.
fn files_of(text: &str, controller: &str, first: &str, second: &str) -> Vec<PathBuf> {
    let lines = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let file = |directory: &str, path: &str, name: &str| {
        PathBuf::from(format!("{ROOT}{directory}{}/{name}", path.trim_end_matches('/')))
    };
    let old = lines()
        .filter(|(controllers, _)| controllers.split(',').any(|c| c == controller))
        .map(|(_, path)| file(&format!("/{controller}"), path, first));
    let unified = lines()
        .filter(|(controllers, _)| controllers.is_empty())
        .flat_map(|(_, path)| ["", "/unified"].map(|directory| file(directory, path, second)));
    old.chain(unified).collect()
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

    /// Writes files of a cgroup: name and content, in turn.
    fn group(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        files.iter().for_each(|(name, text)| fs::write(directory.join(name), text).unwrap());
    }

    fn left(directory: &Path) -> Option<u64> {
        let groups = memory_groups(directory).unwrap();
        groups.iter().filter_map(|group| Some(group.left_below(group.limit?).get())).min()
    }

    #[test]
    fn memory_left_is_limit_minus_use() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(left(dir.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "300\n");
        assert_eq!(left(dir.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left(dir.path()), Some(700));
        write("memory.stat", "anon 5\ninactive_file 40\nactive_file 10\nshmem 90\n");
        assert_eq!(left(dir.path()), Some(750));
        write("memory.stat", "");
        write("memory.max", "200\n");
        assert_eq!(left(dir.path()), Some(0));
    }

    #[test]
    fn reads_groups_of_both_versions_up_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        // As below /sys/fs/cgroup, where the root of version 2 has no limit and no use.
        let (slice, inner) = (dir.path().join("tenant.slice"), dir.path().join("tenant.slice/vm"));
        group(&slice, &[("memory.max", "5000"), ("memory.current", "4000"), ("memory.high", "4500")]);
        group(
            &inner,
            &[
                ("memory.max", "max"),
                ("memory.high", "max"),
                ("memory.current", "900"),
                ("memory.stat", "anon 500\nkernel 77\ninactive_file 30\n"),
            ],
        );
        let groups = memory_groups(&inner).unwrap();
        assert_eq!(groups.iter().map(|group| &group.path).collect::<Vec<_>>(), [&inner, &slice]);
        assert_eq!((groups[0].limit, groups[0].kernel), (None, Some(Bytes::new(77))));
        assert_eq!((groups[0].high, groups[1].high), (None, Some(Bytes::new(4500))));
        assert_eq!(left(&inner), Some(1000));

        let old = dir.path().join("old");
        group(
            &old,
            &[
                ("memory.limit_in_bytes", "9223372036854771712"),
                ("memory.usage_in_bytes", "300"),
                ("memory.kmem.usage_in_bytes", "44"),
                ("memory.stat", "inactive_file 9\ntotal_inactive_file 20\ntotal_active_file 5\n"),
            ],
        );
        let groups = memory_groups(&old).unwrap();
        let expected = GroupMemory {
            path: old.clone(),
            limit: None,
            high: None,
            used: Bytes::new(300),
            files: Bytes::new(25),
            kernel: Some(Bytes::new(44)),
        };
        assert_eq!(groups, [expected]);
        fs::write(old.join("memory.limit_in_bytes"), "1000").unwrap();
        assert_eq!(left(&old), Some(725));
    }

    #[test]
    fn a_limit_that_is_no_number_is_an_error_and_never_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "maximum", "-1", "1e9", "99999999999999999999999", "10 20", "\0"] {
            group(dir.path(), &[("memory.max", text), ("memory.current", "1")]);
            assert!(memory_groups(dir.path()).is_err(), "{text:?}");
        }
        group(dir.path(), &[("memory.max", "10"), ("memory.current", "many")]);
        assert!(memory_groups(dir.path()).is_err());
        // Fields that cannot be parsed count as no reclaimable memory.
        let stat = "inactive_file\nactive_file x\ninactive_file_2 7\n";
        group(dir.path(), &[("memory.current", "4"), ("memory.stat", stat)]);
        assert_eq!(left(dir.path()), Some(6));
    }

    #[test]
    fn names_the_group_that_leaves_the_fewest_tasks() {
        let paths = files_of("8:pids:/vm\n0::/u\n", "pids", "pids.max", "pids.max");
        assert_eq!(paths[0], Path::new("/sys/fs/cgroup/pids/vm/pids.max"));
        assert_eq!(paths[1], Path::new("/sys/fs/cgroup/u/pids.max"));
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("vm");
        group(dir.path(), &[("pids.max", "100"), ("pids.current", "60")]);
        group(&inner, &[("pids.max", "max"), ("pids.current", "1")]);
        assert_eq!(tasks_left(None, Some(&inner)).unwrap(), Some((dir.path().to_owned(), 40)));
        group(&inner, &[("pids.max", "7")]);
        assert_eq!(tasks_left(None, Some(&inner)).unwrap(), Some((inner.clone(), 6)));
        group(&inner, &[("pids.max", "few")]);
        assert!(tasks_left(None, Some(&inner)).is_err());
        assert_eq!(tasks_left(Some(u32::MAX >> 1), None).unwrap(), None);
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
