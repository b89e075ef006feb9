//! Finds the processes that use a file system, by device and inode number in every process, never by path or open
//! count.
//!
//! A process that is blocked in the middle of an `execve` (closing a file of an unresponsive file system) holds a lock
//! that readers of its `maps`, `stat`, `environ` and `fd` in `/proc` wait for. Each process is therefore inspected on a
//! thread that the caller can abandon.
//!
//! A process that cannot be inspected in time, or that this process may not inspect, is [`Unseen`] and counts as a
//! possible user. Exempt are kernel threads, and process 1 of the initial PID namespace, which may refuse even root.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, statx};
use rustix::io::Errno;

use crate::error::Result;
use crate::sys::probe;
use crate::sys::process::{procfs, tasks};

/// Time limit for the inspection of a process. Even a busy host needs less.
pub const SCAN_TIMEOUT: Duration = Duration::from_secs(2);

/// A usual inspection that takes longer may be blocked; another thread then continues with the remaining processes.
const SLOW_INSPECTION: Duration = Duration::from_millis(20);

/// Maximum number of threads that have not exceeded the time limit.
const MAX_THREADS: usize = 256;

/// Stack size of a thread in bytes: enough for reading and parsing, and little memory for an abandoned thread.
const STACK_SIZE: usize = 256 << 10;

/// The result of inspecting a list of processes.
#[derive(Debug)]
pub struct Looks<T> {
    /// Results by pid.
    pub seen: Vec<(u32, T)>,
    /// Pids of the processes that could not be inspected in time.
    pub unseen: Vec<u32>,
}

struct Shared<T, F> {
    look: F,
    state: Mutex<State<T>>,
    progress: Condvar,
}

struct State<T> {
    /// Pids that no thread has taken yet, the next one last.
    queue: Vec<u32>,
    /// Pids under inspection, with the start time of the inspection.
    busy: HashMap<u32, Instant>,
    seen: Vec<(u32, T)>,
    /// Set when the caller no longer waits for results.
    over: bool,
}

impl<T, F> Shared<T, F> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, F: Fn(u32) -> Option<T>> Shared<T, F> {
    /// Inspects one process after another until the queue is empty.
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
        self.progress.notify_one();
    }
}

/// Runs `look` for each of the processes on several threads. A call that takes longer than `timeout` is abandoned
/// together with its thread. An abandoned thread ends with this process at the latest, because waits for the locks in
/// question are killable.
pub fn look_at_each<T, F>(pids: Vec<u32>, timeout: Duration, look: F) -> Looks<T>
where
    T: Send + 'static,
    F: Fn(u32) -> Option<T> + Send + Sync + 'static,
{
    look_slowly(pids, SLOW_INSPECTION, timeout, look)
}

/// Same as [`look_at_each`] for inspections that usually take up to `slow`. While all inspections take longer, more
/// threads start.
pub fn look_slowly<T, F>(pids: Vec<u32>, slow: Duration, timeout: Duration, look: F) -> Looks<T>
where
    T: Send + 'static,
    F: Fn(u32) -> Option<T> + Send + Sync + 'static,
{
    let mut queue = pids;
    queue.reverse();
    let state = State { queue, busy: HashMap::new(), seen: Vec::new(), over: false };
    let shared = Arc::new(Shared { look, state: Mutex::new(state), progress: Condvar::new() });
    let start = |count: usize| {
        (0..count).all(|_| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().stack_size(STACK_SIZE).spawn(move || shared.work()).is_ok()
        })
    };
    let usual = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let mut can_start = start(usual);
    let mut state = shared.state();
    loop {
        let left = state.queue.len();
        let longer = |than: Duration| state.busy.values().filter(|since| since.elapsed() > than).count();
        let (stuck, busy) = (longer(timeout), state.busy.len());
        // If no thread can be started, the rest of the queue stays unseen.
        if busy == stuck && (left == 0 || !can_start) {
            break;
        }
        let all_slow = busy > 0 && longer(slow) == busy;
        if all_slow && left > 0 && busy - stuck < MAX_THREADS {
            drop(state);
            can_start = start(busy.min(MAX_THREADS));
            state = shared.state();
        }
        let waited = shared.progress.wait_timeout(state, SLOW_INSPECTION);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    state.over = true;
    let mut unseen = std::mem::take(&mut state.queue);
    unseen.extend(state.busy.keys());
    unseen.sort_unstable();
    let mut seen = std::mem::take(&mut state.seen);
    seen.sort_by_key(|(pid, _)| *pid);
    Looks { seen, unseen }
}

/// Processes that a search could not inspect: each of them may be one of the processes that the search looks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Processes that could not be inspected in time.
    pub silent: Vec<u32>,
    /// Processes that this process has no permission to inspect.
    pub closed: Vec<u32>,
}

impl Unseen {
    /// Returns true if every process was inspected.
    pub fn is_empty(&self) -> bool {
        self.silent.is_empty() && self.closed.is_empty()
    }

    /// Returns all of the pids in ascending order.
    pub fn pids(&self) -> Vec<u32> {
        let mut all = [&self.silent[..], &self.closed[..]].concat();
        all.sort_unstable();
        all
    }

    /// Returns an error message, or `None` if there are no such processes. `what` completes "processes that may …".
    pub fn describe(&self, what: &str) -> Option<String> {
        let mut parts = Vec::new();
        if !self.silent.is_empty() {
            let (limit, list) = (SCAN_TIMEOUT.as_secs(), list_pids(&self.silent));
            parts.push(format!("timed out after {limit} s inspecting processes that may {what}: {list}"));
        }
        if !self.closed.is_empty() {
            let list = list_pids(&self.closed);
            parts.push(format!("no permission to inspect processes that may {what}: {list}"));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Returns the remedy for the error message.
    pub fn remedy(&self) -> &'static str {
        match self.closed.is_empty() {
            true => "run 'stencil doctor' to find the unresponsive file system that blocks these processes",
            false => "run the command as root on the host, outside of containers, with all capabilities",
        }
    }
}

/// This process has no permission to inspect a process.
#[derive(Debug)]
struct Closed;

/// The result of a search through processes.
#[derive(Debug)]
pub struct Sight<T> {
    /// Results by pid.
    pub seen: Vec<(u32, T)>,
    /// Processes that could not be inspected.
    pub unseen: Unseen,
}

/// Maximum number of times that all processes are listed, to include processes that start during the search.
const MAX_LISTINGS: usize = 4;

/// Inspects every process except the exempt ones. Also inspects processes that start during the search, because a
/// parent may exit before its inspection and leave a child behind.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn look_at_all<T, F>(timeout: Duration, look: F) -> Result<Sight<T>>
where
    T: Send + 'static,
    F: Fn(u32) -> io::Result<Option<T>> + Send + Sync + 'static,
{
    let (mut seen, mut unseen) = (Vec::new(), Unseen::default());
    let (look, mut known) = (Arc::new(look), HashSet::new());
    for _ in 0..MAX_LISTINGS {
        let new: Vec<u32> = procfs::pids()?.into_iter().filter(|pid| known.insert(*pid)).collect();
        if new.is_empty() {
            break;
        }
        let part = look_at_these(new, timeout, Arc::clone(&look));
        seen.extend(part.seen);
        unseen.silent.extend(part.unseen.silent);
        unseen.closed.extend(part.unseen.closed);
    }
    seen.sort_by_key(|(pid, _)| *pid);
    Ok(Sight { seen, unseen })
}

/// Same as [`look_at_all`] for a given list of processes.
pub fn look_at_these<T, F>(pids: Vec<u32>, timeout: Duration, look: Arc<F>) -> Sight<T>
where
    T: Send + 'static,
    F: Fn(u32) -> io::Result<Option<T>> + Send + Sync + 'static,
{
    let looks = look_at_each(pids, timeout, move |pid| match look(pid) {
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

/// Returns true for a process that cannot be inspected but certainly uses no template: a kernel thread, and process 1
/// of the initial PID namespace, which has more privileges than root if it manages a container or virtual machine.
/// `stencil doctor` reports such a process 1.
fn is_exempt(pid: u32) -> bool {
    tasks::is_kernel_thread(pid) || (pid == 1 && probe::in_initial_pid_namespace())
}

/// A process that uses a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Pid of the process.
    pub pid: u32,
    /// Name of the command, at most 15 bytes.
    pub name: String,
    /// Inodes that the process maps.
    pub mapped: BTreeSet<u64>,
    /// Inodes that a thread of the process has open, or uses as working directory or root; and its executable.
    pub open: BTreeSet<u64>,
}

/// The processes that use a file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users {
    /// The processes that are known to use it, by pid.
    pub found: Vec<User>,
    /// Processes that could not be inspected and are possible users.
    pub unseen: Unseen,
}

/// The files of some file systems that a process uses, as pairs of device (`st_dev`) and inode number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsedFiles {
    /// Files that the process maps.
    pub mapped: BTreeSet<(u64, u64)>,
    /// Files that a thread of the process has open, or uses as working directory or root; and its executable.
    pub open: BTreeSet<(u64, u64)>,
}

/// Finds every other process that has a file on one of `devices` open, or maps a file for which `is_wanted(dev, ino)`
/// is true. The file systems themselves are not accessed, because their servers may be unresponsive.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn users_where(
    devices: Vec<u64>,
    timeout: Duration,
    is_wanted: impl Fn(u64, u64) -> bool + Send + Sync + 'static,
) -> Result<Sight<UsedFiles>> {
    log::debug!("searching all processes for users of mounts");
    let me = std::process::id();
    look_at_all(timeout, move |pid| {
        if pid == me {
            return Ok(None);
        }
        let lines = procfs::maps(pid, &is_wanted).map_err(io::Error::other)?;
        let mapped: BTreeSet<_> = lines.into_iter().flatten().map(|line| (line.dev, line.ino)).collect();
        let open = open_inodes(pid, &devices)?;
        Ok((!mapped.is_empty() || !open.is_empty()).then_some(UsedFiles { mapped, open }))
    })
}

/// Finds every other process that uses files on `device` (`st_dev`). Same as [`users_where`] otherwise.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn users_of(device: u64, timeout: Duration) -> Result<Users> {
    let sight = users_where(vec![device], timeout, move |dev, _| dev == device)?;
    let inodes = |files: BTreeSet<(u64, u64)>| files.into_iter().map(|(_, ino)| ino).collect();
    let user = |(pid, used): (u32, UsedFiles)| User {
        pid,
        name: name_of(pid),
        mapped: inodes(used.mapped),
        open: inodes(used.open),
    };
    Ok(Users { found: sight.seen.into_iter().map(user).collect(), unseen: sight.unseen })
}

/// Returns the inodes on these devices that any thread of a process has open. Each thread may have its own file table.
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
            // The thread has exited. Its file table no longer exists, unless other threads share the table.
            let Some(entry) = unless_gone(entry)? else { break };
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => found.extend(inode_on(devices, &dir, Path::new(name))?),
            }
        }
    }
    Ok(found)
}

/// Returns the inode that a `/proc` link leads to, if the inode is on one of these devices.
///
/// # Errors
/// Returns an error without permission to follow the link. Any other failure comes from another file system: statx with
/// `AT_STATX_DONT_SYNC` sends no request to a template mount.
fn inode_on(devices: &[u64], dir: &dyn AsFd, name: &Path) -> io::Result<Option<(u64, u64)>> {
    let stat = |wanted| statx(dir, name, AtFlags::STATX_DONT_SYNC, wanted);
    // A FUSE mount of another user refuses everything but its device number.
    let denied = |error: &Errno| matches!(*error, Errno::ACCESS | Errno::PERM);
    match stat(StatxFlags::INO).or_else(|e| if denied(&e) { stat(StatxFlags::empty()) } else { Err(e) }) {
        Ok(stat) => {
            let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
            Ok(devices.contains(&device).then_some((device, stat.stx_ino)))
        }
        Err(error) if denied(&error) => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Returns `None` for the errors of a process, thread or descriptor that no longer exists.
fn unless_gone<T>(result: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the command name of a process, which is readable without permissions. Empty if the process has exited.
pub fn name_of(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// Maximum number of processes in a list for one line.
const MAX_LISTED: usize = 20;

/// Formats a list of processes for one line, such as `12 (qemu), 13 (sh)`: the first 20 and the number of the others.
pub fn list<'a>(processes: impl ExactSizeIterator<Item = (u32, &'a str)>) -> String {
    let beyond = processes.len().saturating_sub(MAX_LISTED);
    let mut words: Vec<String> =
        processes.take(MAX_LISTED).map(|(pid, name)| format!("{pid} ({name})")).collect();
    if beyond > 0 {
        words.push(format!("and {beyond} more"));
    }
    words.join(", ")
}

/// Same as [`list`] for pids whose command names are not known yet.
pub fn list_pids(pids: &[u32]) -> String {
    let named: Vec<(u32, String)> = pids.iter().map(|&pid| (pid, name_of(pid))).collect();
    list(named.iter().map(|(pid, name)| (*pid, name.as_str())))
}

#[cfg(test)]
mod tests {
    use crate::sys::process::holders::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    #[test]
    fn blocked_processes_cost_the_timeout_once() {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let inside = Arc::clone(&gate);
        let start = Instant::now();
        // Every third call never returns, as if it waited for a lock.
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
        let took = start.elapsed();
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        let free: Vec<(u32, u32)> =
            (1..=90).filter(|n| n % 3 != 0 && n % 2 == 0).map(|n| (n, n * 10)).collect();
        assert_eq!(looks.seen, free);
        assert_eq!(looks.unseen, (1..=90).filter(|n| n % 3 == 0).collect::<Vec<u32>>());
        assert!(took < Duration::from_secs(4), "{took:?}");
    }

    #[test]
    fn slow_inspections_start_no_more_threads_than_usual() {
        let threads = Arc::new(Mutex::new(HashSet::new()));
        let known = Arc::clone(&threads);
        let looks = look_slowly((1..=12).collect(), SCAN_TIMEOUT, 2 * SCAN_TIMEOUT, move |pid| {
            known.lock().unwrap().insert(std::thread::current().id());
            std::thread::sleep(3 * SLOW_INSPECTION);
            Some(pid)
        });
        assert_eq!((looks.seen.len(), looks.unseen.len()), (12, 0));
        assert!(threads.lock().unwrap().len() <= 4);
    }

    #[test]
    fn slow_process_within_the_timeout_is_seen() {
        let looks = look_at_each(vec![1, 2], Duration::from_secs(20), |pid| {
            std::thread::sleep(Duration::from_millis(u64::from(pid) * 60));
            Some(pid)
        });
        assert_eq!((looks.seen, looks.unseen), (vec![(1, 1), (2, 2)], vec![]));
        let none = look_at_each(vec![], SCAN_TIMEOUT, |_| Some(()));
        assert!(none.seen.is_empty() && none.unseen.is_empty());
    }

    #[test]
    fn finds_users_by_open_files_mappings_and_working_directory() {
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
        let directory = fs::metadata(dir.path()).unwrap();
        let program = fs::metadata(format!("/proc/{}/exe", child.id())).unwrap();
        let user = |device: u64| {
            let users = users_of(device, SCAN_TIMEOUT).unwrap();
            users.found.into_iter().find(|user| user.pid == child.id())
        };
        let found = user(file.dev()).expect("the process has a file open");
        assert!(found.open.contains(&file.ino()) && found.open.contains(&directory.ino()), "{found:?}");
        assert_eq!(found.name, "cat");
        assert!(user(program.dev()).unwrap().mapped.contains(&program.ino()));
        assert_eq!(user(procfs::makedev(0, 999_999)), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn long_lists_are_truncated() {
        assert_eq!(list([(1, "a"), (2, "b")].into_iter()), "1 (a), 2 (b)");
        let many: Vec<(u32, &str)> = (0..25).map(|pid| (pid, "x")).collect();
        assert!(list(many.into_iter()).ends_with("19 (x), and 5 more"));
    }
}
