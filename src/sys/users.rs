//! Who uses a file system: found by device and inode number in every process, never by path or open count.
//!
//! A process that waits for an answer in the middle of an `execve` (it closes a file of a file system that does not
//! answer) holds a lock that readers of its `maps`, `stat`, `environ` and `fd` wait for, as long as it waits itself. So
//! each look happens on a thread that nobody has to wait for.
//!
//! A process that does not answer in time, or that this process has no right to look into, is [`Unseen`]: it counts as a
//! possible user. Exempt are threads of the kernel, and process 1 of the initial PID namespace, which may refuse even root.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, statx};
use rustix::io::Errno;

use super::{probe, procfs, tasks};
use crate::error::Result;

/// A process that has not let itself be looked into for so long is left aside. Even a busy host is faster.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// A look that takes longer may be stuck: another thread goes on with the others meanwhile.
const QUICK: Duration = Duration::from_millis(20);

/// Most threads that are not known to be stuck.
const MOST_AT_A_TIME: usize = 256;

/// Enough for reading and parsing; a stuck thread keeps little.
const STACK: usize = 256 << 10;

/// What a look at many processes brought.
#[derive(Debug)]
pub struct Looks<T> {
    /// What was seen, by pid.
    pub seen: Vec<(u32, T)>,
    /// Processes that could not be looked into in time, by pid.
    pub unseen: Vec<u32>,
}

struct Shared<T, F> {
    look: F,
    state: Mutex<State<T>>,
    moved: Condvar,
}

struct State<T> {
    /// Pids that nobody has begun with, the next one last.
    queue: Vec<u32>,
    /// Which pid is looked at, and since when.
    busy: HashMap<u32, Instant>,
    seen: Vec<(u32, T)>,
    /// Nobody waits for answers any more.
    over: bool,
}

impl<T, F> Shared<T, F> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, F: Fn(u32) -> Option<T>> Shared<T, F> {
    /// Looks at one process after the other until none is left.
    fn work(&self) {
        let mut state = self.state();
        while !state.over {
            let Some(pid) = state.queue.pop() else { break };
            state.busy.insert(pid, Instant::now());
            drop(state);
            let seen = (self.look)(pid);
            state = self.state();
            state.busy.remove(&pid);
            state.seen.extend(seen.map(|seen| (pid, seen)));
        }
        self.moved.notify_one();
    }
}

/// Runs `look` for each of these processes, on threads. One that takes longer than `patience` is left behind with
/// its thread; it ends with this process at the latest, for the locks that it may wait for can be killed.
pub fn look_at_each<T, F>(pids: Vec<u32>, patience: Duration, look: F) -> Looks<T>
where
    T: Send + 'static,
    F: Fn(u32) -> Option<T> + Send + Sync + 'static,
{
    let mut queue = pids;
    queue.reverse();
    let state = State { queue, busy: HashMap::new(), seen: Vec::new(), over: false };
    let shared = Arc::new(Shared { look, state: Mutex::new(state), moved: Condvar::new() });
    let start = |count: usize| {
        (0..count).all(|_| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().stack_size(STACK).spawn(move || shared.work()).is_ok()
        })
    };
    let usual = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let mut can_start = start(usual);
    let mut state = shared.state();
    loop {
        let left = state.queue.len();
        let slow = |than: Duration| state.busy.values().filter(|since| since.elapsed() > than).count();
        let (stuck, waiting) = (slow(patience), state.busy.len());
        // Without threads nobody will come to the rest.
        if waiting == stuck && (left == 0 || !can_start) {
            break;
        }
        let nobody_moves = waiting > 0 && slow(QUICK) == waiting;
        if nobody_moves && left > 0 && waiting - stuck < MOST_AT_A_TIME {
            drop(state);
            can_start = start(waiting.min(MOST_AT_A_TIME));
            state = shared.state();
        }
        state = shared.moved.wait_timeout(state, QUICK).unwrap_or_else(PoisonError::into_inner).0;
    }
    state.over = true;
    let mut unseen = std::mem::take(&mut state.queue);
    unseen.extend(state.busy.keys());
    unseen.sort_unstable();
    let mut seen = std::mem::take(&mut state.seen);
    seen.sort_by_key(|(pid, _)| *pid);
    Looks { seen, unseen }
}

/// Processes that a search could not look into: each of them may be what was searched for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Those that did not answer in time.
    pub silent: Vec<u32>,
    /// Those that this process has no right to look into.
    pub closed: Vec<u32>,
}

impl Unseen {
    /// True when every process was seen.
    pub fn is_empty(&self) -> bool {
        self.silent.is_empty() && self.closed.is_empty()
    }

    /// All of them, in ascending order.
    pub fn pids(&self) -> Vec<u32> {
        let mut all = [&self.silent[..], &self.closed[..]].concat();
        all.sort_unstable();
        all
    }

    /// Names them, if there are any; `what` is what each of them may be.
    pub fn describe(&self, what: &str) -> Option<String> {
        let mut parts = Vec::new();
        if !self.silent.is_empty() {
            let (limit, list) = (PATIENCE.as_secs(), list_pids(&self.silent));
            parts
                .push(format!("processes that may {what} could not be looked into within {limit} s: {list}"));
        }
        if !self.closed.is_empty() {
            let list = list_pids(&self.closed);
            parts.push(format!("no right to look into processes that may {what}: {list}"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// What to do about them.
    pub fn remedy(&self) -> &'static str {
        match self.closed.is_empty() {
            true => "they wait for a file system that does not answer: `stencil doctor` names what is stuck",
            false => "run it as root of the host, outside of containers, with all capabilities",
        }
    }
}

/// Why a look into a process has failed.
#[derive(Debug)]
struct Closed;

/// What a search through all processes brought.
#[derive(Debug)]
pub struct Sight<T> {
    /// What was seen, by pid.
    pub seen: Vec<(u32, T)>,
    /// Processes that could not be looked into.
    pub unseen: Unseen,
}

/// So often all processes are listed again, for those that were started meanwhile.
const LISTINGS: usize = 4;

/// Looks into every process but those that are exempt, also into those that are started meanwhile: a parent that has not
/// been looked into yet may end and leave a child behind.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn look_at_all<T, F>(patience: Duration, look: F) -> Result<Sight<T>>
where
    T: Send + 'static,
    F: Fn(u32) -> io::Result<Option<T>> + Send + Sync + 'static,
{
    let (mut seen, mut unseen) = (Vec::new(), Unseen::default());
    let (look, mut known) = (Arc::new(look), HashSet::new());
    for _ in 0..LISTINGS {
        let new: Vec<u32> = procfs::pids()?.into_iter().filter(|pid| known.insert(*pid)).collect();
        if new.is_empty() {
            break;
        }
        let part = look_at_these(new, patience, Arc::clone(&look));
        seen.extend(part.seen);
        unseen.silent.extend(part.unseen.silent);
        unseen.closed.extend(part.unseen.closed);
    }
    seen.sort_by_key(|(pid, _)| *pid);
    Ok(Sight { seen, unseen })
}

/// As [`look_at_all`], into these processes.
pub fn look_at_these<T, F>(pids: Vec<u32>, patience: Duration, look: Arc<F>) -> Sight<T>
where
    T: Send + 'static,
    F: Fn(u32) -> io::Result<Option<T>> + Send + Sync + 'static,
{
    let looks = look_at_each(pids, patience, move |pid| match look(pid) {
        Ok(seen) => seen.map(Ok),
        Err(_) if is_exempt(pid) => None,
        Err(error) => {
            log::debug!("process {pid}: {error}");
            Some(Err(Closed))
        }
    });
    let mut sight = Sight { seen: Vec::new(), unseen: Unseen { silent: looks.unseen, closed: Vec::new() } };
    for (pid, look) in looks.seen {
        match look {
            Ok(seen) => sight.seen.push((pid, seen)),
            Err(Closed) => sight.unseen.closed.push(pid),
        }
    }
    sight
}

/// True for a process that cannot be looked into and is known to use no template: a thread of the kernel; and process 1
/// of the initial PID namespace, which has more rights than root where it is the manager of a container or of a virtual
/// machine. `doctor` names it.
fn is_exempt(pid: u32) -> bool {
    tasks::is_kernel_thread(pid) || (pid == 1 && probe::in_initial_pid_namespace())
}

/// A process that uses a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub pid: u32,
    /// Its command's name, at most 15 bytes.
    pub name: String,
    /// Inodes that it has mapped.
    pub mapped: BTreeSet<u64>,
    /// Inodes that a thread of it has open, or as its working directory or root; or that are its program.
    pub open: BTreeSet<u64>,
}

/// Who uses a file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users {
    /// Those that were seen to, by pid.
    pub found: Vec<User>,
    /// Those that could not be looked into: each may be one more.
    pub unseen: Unseen,
}

/// What a process uses of some file systems: device (as `st_dev`) and inode numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsedFiles {
    /// Files that it maps.
    pub mapped: BTreeSet<(u64, u64)>,
    /// Files that a thread of it has open, or as its working directory or root; or that are its program.
    pub open: BTreeSet<(u64, u64)>,
}

/// Every process but this one that has a file on one of `devices` open, or maps a file that `is_wanted` (by device and
/// inode number). The file systems themselves are never asked: their servers may be dead.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn users_where(
    devices: Vec<u64>,
    patience: Duration,
    is_wanted: impl Fn(u64, u64) -> bool + Send + Sync + 'static,
) -> Result<Sight<UsedFiles>> {
    log::debug!("all processes are searched");
    let me = std::process::id();
    look_at_all(patience, move |pid| {
        if pid == me {
            return Ok(None);
        }
        let lines = procfs::maps(pid, &is_wanted).map_err(io::Error::other)?;
        let mapped: BTreeSet<_> = lines.into_iter().flatten().map(|line| (line.dev, line.ino)).collect();
        let open = open_inodes(pid, &devices)?;
        Ok((!mapped.is_empty() || !open.is_empty()).then_some(UsedFiles { mapped, open }))
    })
}

/// Every process but this one that uses files on `device` (as `st_dev`), as [`users_where`].
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn users_of(device: u64, patience: Duration) -> Result<Users> {
    let sight = users_where(vec![device], patience, move |dev, _| dev == device)?;
    let inodes = |files: BTreeSet<(u64, u64)>| files.into_iter().map(|(_, ino)| ino).collect();
    let user = |(pid, used): (u32, UsedFiles)| User {
        pid,
        name: name_of(pid),
        mapped: inodes(used.mapped),
        open: inodes(used.open),
    };
    Ok(Users { found: sight.seen.into_iter().map(user).collect(), unseen: sight.unseen })
}

/// Inodes on these devices that a process has open, by any of its threads: each may have its own table of files.
fn open_inodes(pid: u32, devices: &[u64]) -> io::Result<BTreeSet<(u64, u64)>> {
    let mut found = BTreeSet::new();
    for tid in tasks::threads(pid)? {
        for name in ["cwd", "root", "exe"] {
            found.extend(inode_on(devices, &CWD, &tasks::folder(pid, tid).join(name))?);
        }
    }
    for thread in tasks::file_tables(pid)? {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(thread.join("fd"), flags, Mode::empty());
        let Some(dir) = unless_gone(opened)? else { continue };
        for entry in Dir::read_from(&dir)? {
            // The thread has ended, and with it the table, unless others have that too.
            let Some(entry) = unless_gone(entry)? else { break };
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => found.extend(inode_on(devices, &dir, Path::new(name))?),
            }
        }
    }
    Ok(found)
}

/// The inode that a link of `/proc` leads to, if it is on one of these devices.
///
/// # Errors
/// Without the right to follow it. A file that fails in another way is of another file system: a template's is not asked
/// for anything.
fn inode_on(devices: &[u64], dir: &dyn AsFd, name: &Path) -> io::Result<Option<(u64, u64)>> {
    let ask = |wanted| statx(dir, name, AtFlags::STATX_DONT_SYNC, wanted);
    // Another user's FUSE mount refuses everything but the number of its device.
    let denied = |error: &Errno| matches!(*error, Errno::ACCESS | Errno::PERM);
    match ask(StatxFlags::INO).or_else(|e| if denied(&e) { ask(StatxFlags::empty()) } else { Err(e) }) {
        Ok(stat) => {
            let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
            Ok(devices.contains(&device).then_some((device, stat.stx_ino)))
        }
        Err(error) if denied(&error) => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Nothing for a process, thread or descriptor that is gone.
fn unless_gone<T>(result: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The command's name of a process, also of one that nobody can look into; empty when it is gone.
pub fn name_of(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// Most processes that are named in one line.
const NAMED: usize = 20;

/// `12 (qemu), 13 (sh)`: processes for one line, the first twenty by number and name.
pub fn list<'a>(processes: impl ExactSizeIterator<Item = (u32, &'a str)>) -> String {
    let beyond = processes.len().saturating_sub(NAMED);
    let mut words: Vec<String> = processes.take(NAMED).map(|(pid, name)| format!("{pid} ({name})")).collect();
    if beyond > 0 {
        words.push(format!("and {beyond} more"));
    }
    words.join(", ")
}

/// [`list`] of processes whose names are still to be asked for.
pub fn list_pids(pids: &[u32]) -> String {
    let named: Vec<(u32, String)> = pids.iter().map(|&pid| (pid, name_of(pid))).collect();
    list(named.iter().map(|(pid, name)| (*pid, name.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    #[test]
    fn many_that_are_stuck_cost_the_patience_once_and_hide_nobody() {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let inside = Arc::clone(&gate);
        let begun = Instant::now();
        // Every third one waits for ever, as behind a lock.
        let looks = look_at_each((1..=90).collect(), Duration::from_millis(400), move |pid| {
            if pid % 3 == 0 {
                let (open, changed) = &*inside;
                let mut open = open.lock().unwrap();
                while !*open {
                    open = changed.wait(open).unwrap();
                }
            }
            (pid % 2 == 0).then_some(pid * 10)
        });
        let took = begun.elapsed();
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        let free: Vec<(u32, u32)> =
            (1..=90).filter(|n| n % 3 != 0 && n % 2 == 0).map(|n| (n, n * 10)).collect();
        assert_eq!(looks.seen, free);
        assert_eq!(looks.unseen, (1..=90).filter(|n| n % 3 == 0).collect::<Vec<u32>>());
        assert!(took < Duration::from_secs(4), "{took:?}");
    }

    #[test]
    fn a_slow_one_within_the_patience_is_seen() {
        let looks = look_at_each(vec![1, 2], Duration::from_secs(20), |pid| {
            std::thread::sleep(Duration::from_millis(u64::from(pid) * 60));
            Some(pid)
        });
        assert_eq!((looks.seen, looks.unseen), (vec![(1, 1), (2, 2)], vec![]));
        let none = look_at_each(vec![], PATIENCE, |_| Some(()));
        assert!(none.seen.is_empty() && none.unseen.is_empty());
    }

    #[test]
    fn a_user_is_known_by_what_it_has_open_maps_and_stands_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("open");
        fs::write(&path, "text").unwrap();
        let mut child = Command::new("cat")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(fs::File::open(&path).unwrap())
            .spawn()
            .unwrap();
        let file = fs::metadata(&path).unwrap();
        let folder = fs::metadata(dir.path()).unwrap();
        let program = fs::metadata(format!("/proc/{}/exe", child.id())).unwrap();
        let user = |device: u64| {
            let users = users_of(device, PATIENCE).unwrap();
            users.found.into_iter().find(|user| user.pid == child.id())
        };
        let found = user(file.dev()).expect("it has a file open there");
        assert!(found.open.contains(&file.ino()) && found.open.contains(&folder.ino()), "{found:?}");
        assert_eq!(found.name, "cat");
        assert!(user(program.dev()).unwrap().mapped.contains(&program.ino()));
        assert_eq!(user(procfs::makedev(0, 999_999)), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn lists_of_processes_end_somewhere() {
        assert_eq!(list([(1, "a"), (2, "b")].into_iter()), "1 (a), 2 (b)");
        let many: Vec<(u32, &str)> = (0..25).map(|pid| (pid, "x")).collect();
        assert!(list(many.into_iter()).ends_with("19 (x), and 5 more"));
    }
}
