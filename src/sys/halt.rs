//! Why a living process does nothing: a job control signal, a debugger, or a frozen control group.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::procfs;

/// What holds a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Halt {
    /// SIGSTOP or one of its relatives.
    Stopped,
    /// A tracer.
    Traced,
    /// The freezer of this control group: of version 1 not even SIGKILL ends the process (cgroup-v1/freezer-subsystem).
    Frozen(PathBuf),
}

/// What holds that process; `None` for one that runs, is gone or cannot be looked into.
pub fn of(pid: u32) -> Option<Halt> {
    let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    if let Some(file) = text("cgroup").and_then(|groups| frozen(&groups)) {
        return Some(Halt::Frozen(file));
    }
    let status = text("status")?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:"))?.trim_start().chars().next();
    match state {
        Some('T') => Some(Halt::Stopped),
        Some('t') => Some(Halt::Traced),
        _ => None,
    }
}

/// The file by which the first frozen group of these is thawed.
fn frozen(groups: &str) -> Option<PathBuf> {
    let mounts = procfs::mounts().ok()?;
    let root = |name: &str| {
        let own = |path: &Path| path.file_name().is_some_and(|last| last == name);
        let line = match name {
            "" => mounts.iter().find(|line| line.fs_type == "cgroup2"),
            _ => mounts.iter().find(|line| line.fs_type == "cgroup" && own(&line.mountpoint)),
        };
        line.map(|line| line.mountpoint.clone())
    };
    for line in groups.lines() {
        let mut words = line.splitn(3, ':').skip(1);
        let (controllers, group) = (words.next()?, words.next()?);
        let (hierarchy, file, word) = match controllers {
            "" => ("", "cgroup.freeze", "1"),
            _ if controllers.split(',').any(|c| c == "freezer") => ("freezer", "freezer.state", "FROZEN"),
            _ => continue,
        };
        let Some(root) = root(hierarchy) else { continue };
        let path = root.join(group.trim_start_matches('/')).join(file);
        if fs::read_to_string(&path).is_ok_and(|state| state.trim() == word) {
            return Some(path);
        }
    }
    None
}

impl Halt {
    /// How it is let go.
    pub fn remedy(&self, pid: u32) -> String {
        match self {
            Halt::Stopped => format!("let it go on: kill -CONT {pid}"),
            Halt::Traced => "end its debugger".to_owned(),
            Halt::Frozen(file) => {
                let word = if file.ends_with("freezer.state") { "THAWED" } else { "0" };
                format!("let it go on: echo {word} > {}", file.display())
            }
        }
    }
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Halt::Stopped => write!(f, "it is stopped (SIGSTOP)"),
            Halt::Traced => write!(f, "a debugger has stopped it"),
            Halt::Frozen(file) => {
                write!(f, "its control group is frozen ({})", file.parent().unwrap_or(file).display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_stopped_process_is_told_from_one_that_runs() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let (pid, signal) = (child.id(), |name: &str| {
            let done = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
            assert!(done.success());
        });
        assert_eq!(of(pid), None);
        signal("-STOP");
        while of(pid) != Some(Halt::Stopped) {}
        assert_eq!(Halt::Stopped.remedy(pid), format!("let it go on: kill -CONT {pid}"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(pid), None);
    }
}
