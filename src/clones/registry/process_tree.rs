//! The processes of a clone: the recorded process, and all processes that a command or a recipe has started.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::entry::{Entry, Kind};
use super::layout::clones_dir;
use crate::control::runtime::is_plain_name;
use crate::error::{Error, Result};
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::{self, ProcessId};
use crate::sys::process::{paused, procfs, tasks};

/// Environment variable of the processes of a clone, with the clone's directory as its value. Workers do not have this
/// variable, and a Firecracker in a jail has no environment.
const MARK: &[u8] = b"STENCIL_DIR=";

/// Time limit for the kernel to load a program, on a loaded host.
const EXEC_TIMEOUT: Duration = Duration::from_secs(1);

/// Time limit for a killed process to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The processes of clones, found by one scan of all processes.
#[derive(Debug)]
pub struct ProcessTrees {
    /// Living processes with the mark, by the directory that the mark names.
    marked: HashMap<Vec<u8>, Vec<ProcessId>>,
    /// Living processes that records name.
    recorded: HashSet<ProcessId>,
    /// Processes that could not be inspected in time.
    unseen: Vec<u32>,
}

impl ProcessTrees {
    /// Finds the processes of these clones.
    pub fn scan(entries: &[Entry]) -> ProcessTrees {
        let recorded: Vec<ProcessId> = entries.iter().filter_map(Entry::process).collect();
        let search = entries.iter().any(may_have_others);
        let pids = if search { procfs::pids().unwrap_or_default() } else { vec![] };
        let looks = holders::look_at_each(pids, SCAN_TIMEOUT, marked);
        let recorded = recorded.into_iter().filter(ProcessId::is_alive).collect();
        let mut trees = ProcessTrees { marked: HashMap::new(), recorded, unseen: looks.unseen };
        for (_, (process, dir)) in looks.seen {
            trees.marked.entry(dir).or_default().push(process);
        }
        trees
    }

    /// Returns the processes of one of the clones that were alive during the scan.
    pub fn of(&self, entry: &Entry) -> Vec<ProcessId> {
        let mut all: Vec<ProcessId> =
            entry.process().filter(|process| self.recorded.contains(process)).into_iter().collect();
        if may_have_others(entry) {
            let others = self.marked.get(entry.dir.as_os_str().as_encoded_bytes());
            all.extend(others.into_iter().flatten().filter(|p| Some(**p) != entry.process()));
        }
        all
    }

    /// Returns the processes that could not be inspected in time, if each may belong to the clone.
    pub fn unseen(&self, entry: &Entry) -> &[u32] {
        if may_have_others(entry) { &self.unseen } else { &[] }
    }
}

/// Returns the process and the directory of its clone, if the process is alive and belongs to a clone.
fn marked(pid: u32) -> Option<(ProcessId, Vec<u8>)> {
    let (process, pidfd) = ProcessId::living(pid).ok()??;
    let dir = mark_of(pid)?;
    // The process id was not reused if the process is still alive, so the mark belongs to this process.
    (!process::has_ended(&pidfd)).then_some((process, dir))
}

/// Returns the directory of the clone that a process belongs to. Processes that have exited or cannot be inspected
/// belong to no clone.
fn mark_of(pid: u32) -> Option<Vec<u8>> {
    let until = Instant::now() + EXEC_TIMEOUT;
    loop {
        let thread = tasks::with_memory(pid).ok()??;
        let environ = match fs::read(thread.join("environ")) {
            Err(error) if tasks::is_gone(&error) => continue,
            environ => environ.ok()?,
        };
        let mut mark =
            environ.split(|b| *b == 0).find_map(|word| word.strip_prefix(MARK)).map(<[u8]>::to_vec);
        if environ.is_empty() {
            mark = jailed(&thread);
        }
        if mark.is_some() || is_whole(&thread, &environ) || Instant::now() > until {
            return mark;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns the directory of the clone whose Firecracker this is. A jailer starts Firecracker with an empty environment,
/// with the id of the clone, and with another root directory, which only root can give to a process.
fn jailed(thread: &Path) -> Option<Vec<u8>> {
    let root = |path: &Path| fs::metadata(path).ok().map(|root| (root.dev(), root.ino()));
    if root(&thread.join("root"))? == root(Path::new("/"))? {
        return None;
    }
    let arguments = fs::read(thread.join("cmdline")).ok()?;
    let mut arguments = arguments.split(|b| *b == 0).skip_while(|word| *word != b"--id").skip(1);
    let id = std::str::from_utf8(arguments.next()?).ok().filter(|id| is_plain_name(id))?;
    Some(clones_dir().join(id).into_os_string().into_encoded_bytes())
}

/// Returns false while the kernel loads a program for the process: a read of the old memory may end early, and the new
/// memory has no environment yet. Also returns false for a thread that has just exited.
fn is_whole(thread: &Path, environ: &[u8]) -> bool {
    if fs::read_link(thread.join("exe")).is_err() {
        return false;
    }
    let stat = fs::read(thread.join("stat")).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // proc(5) counts fields from 1. The third field follows the name.
    let places: Vec<u64> = after_name.split(' ').map(|word| word.trim_end().parse().unwrap_or(0)).collect();
    let field = |number: usize| places.get(number - 2).copied().unwrap_or(0);
    let (code, start, end) = (field(26), field(50), field(51));
    // The kernel sets the address of the code after that of the environment. Until then, the environment may look
    // empty.
    code != 0 && end != 0 && end.saturating_sub(start) == environ.len() as u64
}

/// Returns false for workers, which are children of their zygote and die with it. The program of a recipe may be a
/// script that starts QEMU.
fn may_have_others(entry: &Entry) -> bool {
    entry.kind != Kind::Simulated
}

/// Returns the living processes of the clone with this directory, but no workers.
pub fn of_folder(dir: &Path) -> Vec<ProcessId> {
    let wanted = dir.as_os_str().as_encoded_bytes().to_vec();
    let looks = holders::look_at_each(procfs::pids().unwrap_or_default(), SCAN_TIMEOUT, marked);
    looks.seen.into_iter().filter(|(_, (_, dir))| *dir == wanted).map(|(_, (process, _))| process).collect()
}

/// Kills all processes of these clones, and waits until they have exited.
///
/// # Errors
/// Returns an error if a process cannot be killed or does not exit. All other processes are killed.
pub fn kill(entries: &[Entry]) -> Result<()> {
    // The next scan finds processes that were forked during a scan.
    for _ in 0..5 {
        let trees = ProcessTrees::scan(entries);
        let doomed: Vec<ProcessId> = entries.iter().flat_map(|e| trees.of(e)).collect();
        if doomed.is_empty() {
            return Ok(());
        }
        // All processes are signalled before the first wait.
        let failures: Vec<Option<Error>> =
            doomed.iter().map(|process| process.signal(Signal::KILL).err()).collect();
        let mut problem = failures.into_iter().flatten().next();
        let until = Instant::now() + KILL_TIMEOUT;
        for process in &doomed {
            let gone = process.wait_for_exit(until.saturating_duration_since(Instant::now()));
            problem = problem.or(match gone {
                Ok(true) => None,
                Ok(false) => Some(not_exiting(process)),
                Err(error) => Some(error),
            });
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
    }
    Err(Error::failed("a clone starts processes faster than they can be killed")
        .hint("stop the program that starts the processes, then run the command again"))
}

impl Entry {
    /// Kills the clone's processes, and removes its directory.
    ///
    /// # Errors
    /// Returns an error if a process cannot be killed or the directory cannot be removed.
    pub fn destroy(&self) -> Result<()> {
        kill(std::slice::from_ref(self))?;
        self.remove()
    }
}

fn not_exiting(process: &ProcessId) -> Error {
    let pid = process.pid;
    match paused::of(pid) {
        Some(pause) => Error::try_again(format!("process {pid} does not exit: it {pause}"))
            .hint(format!("{}; then run the command again", pause.remedy(pid))),
        None => Error::failed(format!("process {pid} does not exit"))
            .hint("run 'stencil status' and 'stencil doctor': the process may wait for a reply from a mount"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn finds_the_mark_of_a_process_that_executes_programs() {
        // The process executes programs in a loop.
        let mut command = Command::new("sh");
        let mut child = process::die_with_starter(&mut command)
            .args(["-c", "exec sh -c \"$AGAIN\""])
            .env("AGAIN", "exec sh -c \"$AGAIN\"")
            .env("STENCIL_DIR", "/its/own")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let marks: HashSet<_> = (0..20_000).map(|_| mark_of(child.id())).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(marks, HashSet::from([Some(b"/its/own".to_vec())]));
        assert_eq!(mark_of(2), None, "pid 2 is a kernel thread, or unused");
    }
}
