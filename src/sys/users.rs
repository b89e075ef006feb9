//! Who uses a file system: found by device and inode number in every process, never by path or open count.
//!
//! A process that waits for an answer in the middle of an `execve` (it closes a file of a file system that does not
//! answer) holds a lock that readers of its `maps`, `stat`, `environ` and `fd` wait for, as long as it waits itself. So
//! each look happens on a thread that nobody has to wait for; who lets nobody in is named, and counts as a possible user.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, statx};

use super::procfs;
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

/// A process that uses a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub pid: u32,
    /// Its command's name, at most 15 bytes.
    pub name: String,
    /// Inodes that it has mapped.
    pub mapped: BTreeSet<u64>,
    /// Inodes that it has open, or as its working directory, root or program.
    pub open: BTreeSet<u64>,
}

/// Who uses a file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users {
    /// Those that were seen to, by pid.
    pub found: Vec<User>,
    /// Those that could not be looked into in time: each may be one more.
    pub unseen: Vec<u32>,
}

/// Every process but this one that uses files on `device` (as `st_dev`). The file system itself is never asked: its
/// server may be dead. A process that even root may not look into is passed over.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn users_of(device: u64, patience: Duration) -> Result<Users> {
    let me = std::process::id();
    let pids = procfs::pids()?.into_iter().filter(|&pid| pid != me).collect();
    let looks = look_at_each(pids, patience, move |pid| {
        let mapped: BTreeSet<u64> = procfs::maps(pid, |dev, _| dev == device)
            .inspect_err(|e| log::debug!("{e}"))
            .ok()
            .flatten()
            .into_iter()
            .flatten()
            .map(|line| line.ino)
            .collect();
        let open = open_inodes(pid, device);
        let uses = !mapped.is_empty() || !open.is_empty();
        uses.then(|| User { pid, name: name_of(pid), mapped, open })
    });
    Ok(Users { found: looks.seen.into_iter().map(|(_, user)| user).collect(), unseen: looks.unseen })
}

/// Inodes on `device` that a process has open.
fn open_inodes(pid: u32, device: u64) -> BTreeSet<u64> {
    let base = format!("/proc/{pid}");
    let mut found = BTreeSet::new();
    let mut note = |dir: &dyn AsFd, name: &Path| {
        if let Ok(stat) = statx(dir, name, AtFlags::STATX_DONT_SYNC, StatxFlags::INO)
            && rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor) == device
        {
            found.insert(stat.stx_ino);
        }
    };
    for name in ["cwd", "root", "exe"] {
        note(&CWD, &Path::new(&base).join(name));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(dir) = rustix::fs::open(format!("{base}/fd"), flags, Mode::empty()) else { return found };
    let Ok(entries) = Dir::read_from(&dir) else { return found };
    for entry in entries.flatten() {
        if let Ok(name) = entry.file_name().to_str() {
            note(&dir, Path::new(name));
        }
    }
    found
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
