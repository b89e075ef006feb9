//! Why a process does not run until another process resumes it: a signal, a debugger, or a cgroup freezer.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::sys::process::procfs;

/// The cause of a paused process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pause {
    /// A stop signal: SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU.
    Stopped,
    /// A tracer (debugger).
    Traced,
    /// The freezer of the cgroup of the process, or of an ancestor.
    Frozen {
        /// The cgroup file through which the group was frozen.
        file: PathBuf,
        /// The text that thaws the group when it is written to the file.
        thaw: &'static str,
    },
}

/// Returns why a process does not run, or `None` if the process runs, has exited or cannot be inspected. A frozen
/// cgroup takes precedence, because a frozen process does not react to signals.
pub fn of(pid: u32) -> Option<Pause> {
    frozen(pid).or_else(|| match procfs::stat(pid).ok()??.state {
        'T' => Some(Pause::Stopped),
        't' => Some(Pause::Traced),
        _ => None,
    })
}

impl Pause {
    /// Returns the command or action that resumes the process.
    pub fn remedy(&self, pid: u32) -> String {
        match self {
            Pause::Stopped => format!("resume the process with 'kill -CONT {pid}'"),
            Pause::Traced => "resume the process in the debugger, or quit the debugger".to_owned(),
            Pause::Frozen { file, thaw } => {
                format!("thaw the cgroup with its manager, or with 'echo {thaw} > {}'", file.display())
            }
        }
    }
}

/// A predicate without a subject, such as `is stopped by a signal`.
impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pause::Stopped => "is stopped by a signal",
            Pause::Traced => "is stopped by a debugger",
            Pause::Frozen { .. } => "is frozen by its cgroup",
        })
    }
}

/// A type of cgroup hierarchy with a freezer.
struct Freezer {
    /// The type of the file system, and a word of its mount options.
    mount: (&'static str, &'static str),
    /// The file and line of a frozen cgroup.
    frozen: (&'static str, &'static str),
    /// The file and line of a cgroup that was itself told to freeze.
    cause: (&'static str, &'static str),
    /// The file and text that thaw the cgroup.
    thaw: (&'static str, &'static str),
}

const V2: Freezer = Freezer {
    mount: ("cgroup2", ""),
    frozen: ("cgroup.events", "frozen 1"),
    cause: ("cgroup.freeze", "1"),
    thaw: ("cgroup.freeze", "0"),
};

const V1: Freezer = Freezer {
    mount: ("cgroup", "freezer"),
    frozen: ("freezer.state", "FROZEN"),
    cause: ("freezer.self_freezing", "1"),
    thaw: ("freezer.state", "THAWED"),
};

fn frozen(pid: u32) -> Option<Pause> {
    let text = procfs::read_text(Path::new(&format!("/proc/{pid}/cgroup"))).ok()?;
    let mounts = procfs::mounts().ok()?;
    text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let freezer = match controllers {
            "" => V2,
            all if all.split(',').any(|one| one == "freezer") => V1,
            _ => return None,
        };
        let (kind, option) = freezer.mount;
        let matches = |mount: &&procfs::MountLine| {
            let has = mount.super_options.split(',').any(|one| one == option);
            mount.fs_type == kind && (option.is_empty() || has)
        };
        let root = &mounts.iter().find(matches)?.mountpoint;
        let has = |group: &Path, (file, line): (&str, &str)| {
            procfs::read_text(&group.join(file)).is_ok_and(|text| text.lines().any(|found| found == line))
        };
        let own = root.join(path.trim_start_matches('/'));
        if !has(&own, freezer.frozen) {
            return None;
        }
        // The topmost cgroup that was told to freeze: its descendants stay frozen until it is thawed.
        let causes = own.ancestors().take_while(|group| group != root).filter(|g| has(g, freezer.cause));
        let (file, thaw) = freezer.thaw;
        Some(Pause::Frozen { file: causes.last().unwrap_or(&own).join(file), thaw })
    })
}

#[cfg(test)]
mod tests {
    use crate::sys::process::paused::*;
    use std::process::Command;

    #[test]
    fn detects_a_stopped_process() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id();
        assert_eq!(of(pid), None);
        let stopped = Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap();
        assert!(stopped.success());
        while of(pid) != Some(Pause::Stopped) {}
        assert!(Pause::Stopped.remedy(pid).contains(&format!("kill -CONT {pid}")));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(pid), None);
    }
}
