//! What keeps a process from running until somebody lets it: a signal, a debugger, the freezer of its control group.

use std::fmt;
use std::path::{Path, PathBuf};

use super::procfs;

/// Why a process does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pause {
    /// A signal: SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU.
    Stopped,
    /// A tracer.
    Traced,
    /// The freezer of its control group, or of one above.
    Frozen {
        /// The file by which it was frozen.
        file: PathBuf,
        /// What thaws it, written to that file.
        thaw: &'static str,
    },
}

/// Why a process does not run; `None` for a process that runs, has ended or cannot be looked into. A frozen control group
/// comes first: a signal does not reach a frozen process.
pub fn of(pid: u32) -> Option<Pause> {
    frozen(pid).or_else(|| match procfs::stat(pid).ok()??.state {
        'T' => Some(Pause::Stopped),
        't' => Some(Pause::Traced),
        _ => None,
    })
}

impl Pause {
    /// The command or action that lets the process run again.
    pub fn remedy(&self, pid: u32) -> String {
        match self {
            Pause::Stopped => format!("let it go on: `kill -CONT {pid}`"),
            Pause::Traced => "let it go on, or end the debugger".to_owned(),
            Pause::Frozen { file, thaw } => {
                format!("thaw it: `echo {thaw} > {}`, or as its manager does it", file.display())
            }
        }
    }
}

/// A predicate: `is stopped (SIGSTOP)`.
impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pause::Stopped => "is stopped (SIGSTOP)",
            Pause::Traced => "is stopped by a debugger",
            Pause::Frozen { .. } => "is frozen by its control group",
        })
    }
}

/// A hierarchy of control groups with a freezer.
struct Freezer {
    /// Type of its file system, and a word of its options.
    mount: (&'static str, &'static str),
    /// The file and line of a frozen group.
    frozen: (&'static str, &'static str),
    /// The file and line of a group that is the cause.
    cause: (&'static str, &'static str),
    /// The file and word that thaw it.
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
        let is_it = |mount: &&procfs::MountLine| {
            let has = mount.super_options.split(',').any(|one| one == option);
            mount.fs_type == kind && (option.is_empty() || has)
        };
        let root = &mounts.iter().find(is_it)?.mountpoint;
        let has = |group: &Path, (file, line): (&str, &str)| {
            procfs::read_text(&group.join(file)).is_ok_and(|text| text.lines().any(|found| found == line))
        };
        let own = root.join(path.trim_start_matches('/'));
        if !has(&own, freezer.frozen) {
            return None;
        }
        // The uppermost one that was told to freeze: those beneath it stay frozen as long as it is.
        let told = own.ancestors().take_while(|group| group != root).filter(|g| has(g, freezer.cause));
        let (file, thaw) = freezer.thaw;
        Some(Pause::Frozen { file: told.last().unwrap_or(&own).join(file), thaw })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_stopped_process_is_told_from_one_that_runs() {
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
