//! The processes that belong to a clone: the one in its record, and all that a command or a recipe has started.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::registry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::sys::process::{self, ProcessId};
use crate::sys::users::{self, PATIENCE};
use crate::sys::{pause, procfs, tasks};

/// What every process of a clone but a worker has in its environment, followed by the clone's folder.
const MARK: &[u8] = b"STENCIL_DIR=";

/// How long loading a program may take, on a busy host too.
const EXECUTING: Duration = Duration::from_secs(1);

/// How long a killed process may take to go.
const LAST_PATIENCE: Duration = Duration::from_secs(10);

/// Who belongs to which clone, found by one look at all processes.
#[derive(Debug)]
pub struct Families {
    /// The living processes with the mark, by the folder that it names.
    marked: HashMap<Vec<u8>, Vec<ProcessId>>,
    /// The living ones of those that records name.
    recorded: HashSet<ProcessId>,
}

impl Families {
    /// Looks for the families of these clones.
    pub fn look(entries: &[Entry]) -> Families {
        let recorded: Vec<ProcessId> = entries.iter().filter_map(Entry::process).collect();
        let search = entries.iter().any(may_have_others);
        let pids = if search { procfs::pids().unwrap_or_default() } else { vec![] };
        let looks = users::look_at_each(pids, PATIENCE, marked);
        let recorded = recorded.into_iter().filter(ProcessId::is_alive).collect();
        let mut families = Families { marked: HashMap::new(), recorded };
        for (_, (process, dir)) in looks.seen {
            families.marked.entry(dir).or_default().push(process);
        }
        families
    }

    /// The processes of one of them that were alive.
    pub fn of(&self, entry: &Entry) -> Vec<ProcessId> {
        let mut all: Vec<ProcessId> =
            entry.process().filter(|process| self.recorded.contains(process)).into_iter().collect();
        if may_have_others(entry) {
            let others = self.marked.get(entry.dir.as_os_str().as_encoded_bytes());
            all.extend(others.into_iter().flatten().filter(|p| Some(**p) != entry.process()));
        }
        all
    }
}

/// A living process that belongs to a clone, and the folder of that clone.
fn marked(pid: u32) -> Option<(ProcessId, Vec<u8>)> {
    let (process, pidfd) = ProcessId::living(pid).ok()??;
    let dir = mark_of(pid)?;
    // While it lives, nobody else has its number: the mark is its own.
    (!process::has_ended(&pidfd)).then_some((process, dir))
}

/// The folder of the clone that a process belongs to. One that may not be looked into, or has gone, is none of ours.
fn mark_of(pid: u32) -> Option<Vec<u8>> {
    let until = Instant::now() + EXECUTING;
    loop {
        let thread = tasks::with_memory(pid).ok()??;
        let environ = match fs::read(thread.join("environ")) {
            Err(error) if tasks::is_gone(&error) => continue,
            environ => environ.ok()?,
        };
        let mark = environ.split(|b| *b == 0).find_map(|word| word.strip_prefix(MARK)).map(<[u8]>::to_vec);
        if mark.is_some() || is_whole(&thread, &environ) || Instant::now() > until {
            return mark;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// False while the kernel loads a program for the process: of its memory the old one vanishes in the middle of a read, and
/// the new one has no environment yet. False also for a thread that has just ended.
fn is_whole(thread: &Path, environ: &[u8]) -> bool {
    if fs::read_link(thread.join("exe")).is_err() {
        return false;
    }
    let stat = fs::read(thread.join("stat")).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // proc(5) counts from 1, and the third field follows the name.
    let places: Vec<u64> = after_name.split(' ').map(|word| word.trim_end().parse().unwrap_or(0)).collect();
    let field = |number: usize| places.get(number - 2).copied().unwrap_or(0);
    let (code, start, end) = (field(26), field(50), field(51));
    // The code's place is written down when the environment's is known; until then that may look like an empty one.
    code != 0 && end != 0 && end.saturating_sub(start) == environ.len() as u64
}

/// A worker is its zygote's child and dies with it. What a recipe names may be a script that starts QEMU.
fn may_have_others(entry: &Entry) -> bool {
    entry.kind != Kind::Simulated
}

/// The living processes of the clone with this folder that its record does not name.
pub fn of_folder(dir: &Path) -> Vec<ProcessId> {
    let wanted = dir.as_os_str().as_encoded_bytes().to_vec();
    let looks = users::look_at_each(procfs::pids().unwrap_or_default(), PATIENCE, marked);
    looks.seen.into_iter().filter(|(_, (_, dir))| *dir == wanted).map(|(_, (process, _))| process).collect()
}

/// Kills all processes of these clones and waits until they are gone.
///
/// # Errors
/// When one may not be killed, or does not die. The others are killed all the same.
pub fn kill(entries: &[Entry]) -> Result<()> {
    // One that was forked during a look is found by the next one.
    for _ in 0..5 {
        let families = Families::look(entries);
        let doomed: Vec<ProcessId> = entries.iter().flat_map(|e| families.of(e)).collect();
        if doomed.is_empty() {
            return Ok(());
        }
        // All are told before any is waited for.
        let told: Vec<Option<Error>> =
            doomed.iter().map(|process| process.signal(Signal::KILL).err()).collect();
        let mut problem = told.into_iter().flatten().next();
        let until = Instant::now() + LAST_PATIENCE;
        for process in &doomed {
            let gone = process.wait_gone(until.saturating_duration_since(Instant::now()));
            problem = problem.or(match gone {
                Ok(true) => None,
                Ok(false) => Some(does_not_die(process)),
                Err(error) => Some(error),
            });
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
    }
    Err(Error::failed("a clone starts processes faster than they can be killed"))
}

fn does_not_die(process: &ProcessId) -> Error {
    let pid = process.pid;
    match pause::of(pid) {
        Some(pause) => Error::try_again(format!("process {pid} does not end: it {pause}"))
            .remedy(format!("{}; then run this again", pause.remedy(pid))),
        None => Error::failed(format!("process {pid} does not end"))
            .remedy("it waits for an answer of a mount: see `stencil status`, or abort its fuse connection"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_executes_a_program_shows_whose_it_is() {
        // It does nothing else.
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
        assert_eq!(mark_of(2), None, "a thread of the kernel, or nobody");
    }
}
