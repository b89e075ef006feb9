//! The threads of a process, and through which thread `/proc` shows the shared state.
//!
//! `/proc/PID` shows the first thread. After the first thread has exited, its `maps`, `pagemap`, `fd` and `environ` are
//! empty although other threads live; `/proc/PID/task/TID` of a live thread shows them. All threads share the memory.
//! The table of open files and the working directory may be private to a thread (`unshare(2)`).

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Time limit for processes whose threads start and exit faster than they can be listed.
const LIMIT: Duration = Duration::from_secs(1);

const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Index of the flags in `/proc/PID/stat`, counted after the command name.
const FLAGS: usize = 6;

/// Index of the number of threads that have not exited.
const THREADS: usize = 17;

/// `PF_KTHREAD` of the kernel's `sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// `PF_FORKNOEXEC` of the kernel's `sched.h`. fork(2) sets the flag, and execve(2) clears it.
const FORKED_WITHOUT_EXEC: u64 = 0x40;

/// Returns the `/proc` directory of a thread.
pub fn folder(pid: u32, tid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/task/{tid}"))
}

/// Returns the threads of a process, including a first thread that has exited. Empty if the process has exited.
///
/// # Errors
/// Returns an error if the threads cannot be listed.
pub fn threads(pid: u32) -> io::Result<Vec<u32>> {
    let list = || -> io::Result<Vec<u32>> {
        let names = fs::read_dir(format!("/proc/{pid}/task"))?.map(|entry| Ok(entry?.file_name()));
        let names: Vec<_> = names.collect::<io::Result<_>>()?;
        Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
    };
    list().or_else(|error| if is_gone(&error) { Ok(Vec::new()) } else { Err(error) })
}

/// Returns the `/proc` directories of a set of threads that together have all open files of the process. All threads
/// usually share one table of open files; the set then has one element.
///
/// # Errors
/// Returns an error if the threads cannot be listed.
pub fn file_tables(pid: u32) -> io::Result<Vec<PathBuf>> {
    let mut tables: Vec<u32> = Vec::new();
    for tid in threads(pid)? {
        if !tables.iter().any(|other| share_files(*other, tid)) {
            tables.push(tid);
        }
    }
    Ok(tables.into_iter().map(|tid| folder(pid, tid)).collect())
}

/// Returns true if two threads share one table of open files. False if kcmp(2) fails.
fn share_files(one: u32, other: u32) -> bool {
    /// `KCMP_FILES` of `linux/kcmp.h`.
    const FILES: libc::c_int = 2;
    // SAFETY: kcmp compares two threads and accesses no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, one.cast_signed(), other.cast_signed(), FILES, 0, 0) == 0 }
}

/// Returns true for the errors of a process or thread that has exited (ENOENT, ESRCH).
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Returns true for a kernel thread, which has no memory and no open files of its own.
pub fn is_kernel_thread(pid: u32) -> bool {
    stat_field(pid, FLAGS).is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// Returns true if the process has called execve(2) since its fork: its memory began empty, so the process shares no
/// anonymous page with its parent. False if the process has exited.
pub fn has_executed(pid: u32) -> bool {
    stat_field(pid, FLAGS).is_some_and(|flags| flags & FORKED_WITHOUT_EXEC == 0)
}

/// Returns one number of `/proc/PID/stat`, or `None` if the process has exited.
fn stat_field(pid: u32, index: usize) -> Option<u64> {
    let mut stat = Vec::with_capacity(1024);
    // Without a limit, `read_to_end` first asks for the size of the file, which is 0.
    fs::File::open(format!("/proc/{pid}/stat")).ok()?.take(u64::MAX).read_to_end(&mut stat).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // The command name in parentheses may contain any character, including parentheses.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_ascii_whitespace().nth(index)?.parse().ok()
}

/// Reads a property of the memory of a process. `read` receives the `/proc` directory of a thread and returns `None` if
/// that thread has no memory any more. The result is `None` if no thread has memory: the process has exited or is a
/// kernel thread.
///
/// # Errors
/// Returns the error of `read`, except for a thread that has exited. Returns [`io::ErrorKind::TimedOut`] if threads
/// start and exit faster than they can be listed.
pub fn through_memory<T>(pid: u32, read: impl Fn(&Path) -> io::Result<Option<T>>) -> io::Result<Option<T>> {
    let read = |path: &Path| read(path).or_else(|e| if is_gone(&e) { Ok(None) } else { Err(e) });
    if let Some(value) = read(Path::new(&format!("/proc/{pid}")))? {
        return Ok(Some(value));
    }
    // Most processes without memory are kernel threads.
    if is_kernel_thread(pid) {
        return Ok(None);
    }
    let deadline = Instant::now() + LIMIT;
    loop {
        let threads = threads(pid)?;
        for tid in &threads {
            if let Some(value) = read(&folder(pid, *tid))? {
                return Ok(Some(value));
            }
        }
        // A thread without memory starts no threads. If the count equals the length of the list and all listed threads
        // still exist afterwards, the list was complete at the time of the count.
        let count = stat_field(pid, THREADS).unwrap_or(0);
        let listed = threads.len() as u64;
        if count == 0 || count == listed && threads.iter().all(|tid| folder(pid, *tid).exists()) {
            return Ok(None);
        }
        if Instant::now() > deadline {
            let why = format!("threads of process {pid} start and exit faster than they can be listed");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

/// Returns the `/proc` directory of a thread that has the memory of the process, or `None` if there is none.
///
/// # Errors
/// Same as [`through_memory`].
pub fn with_memory(pid: u32) -> io::Result<Option<PathBuf>> {
    through_memory(pid, |path| Ok(has_memory(path)?.then(|| path.to_owned())))
}

/// Returns the id of a thread that has the memory of the process, or `None` if there is none.
///
/// # Errors
/// Same as [`through_memory`].
pub fn thread_with_memory(pid: u32) -> io::Result<Option<u32>> {
    Ok(with_memory(pid)?.and_then(|folder| thread_of(&folder)))
}

/// Returns the id of the thread with this `/proc` directory.
pub fn thread_of(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.parse().ok()
}

/// Returns true if the thread with this `/proc` directory has memory.
///
/// # Errors
/// Returns an error if `statm` cannot be read, for example because the thread has exited.
pub fn has_memory(folder: &Path) -> io::Result<bool> {
    // The text is read at once; its first field is the size of the address space.
    let mut text = [0; 128];
    let length = fs::File::open(folder.join("statm"))?.read(&mut text)?;
    Ok(text[..length].split(|byte| *byte == b' ').next().is_some_and(|size| size != b"0"))
}

#[cfg(test)]
mod tests {
    use crate::sys::process::procfs;
    use crate::sys::process::tasks::*;

    #[test]
    fn finds_a_thread_with_memory() {
        let me = std::process::id();
        assert_eq!(with_memory(me).unwrap(), Some(PathBuf::from(format!("/proc/{me}"))));
        assert!(threads(me).unwrap().contains(&me));
        assert!(!is_kernel_thread(me));
        // No process has this pid.
        assert!(threads(u32::MAX).unwrap().is_empty() && with_memory(u32::MAX).unwrap().is_none());
    }

    #[test]
    fn kernel_thread_has_no_memory() {
        let Some(kernel) = procfs::pids().unwrap().into_iter().find(|pid| is_kernel_thread(*pid)) else {
            return;
        };
        assert_eq!(with_memory(kernel).unwrap(), None);
    }

    #[test]
    fn falls_back_to_another_thread() {
        let me = std::process::id();
        let first = PathBuf::from(format!("/proc/{me}"));
        let found = through_memory(me, |path| Ok((path != first).then(|| path.to_owned()))).unwrap();
        assert!(found.is_some_and(|path| path.starts_with(first.join("task"))));
        let none = through_memory(me, |_| Ok(None::<()>));
        assert!(matches!(none, Ok(None)) || none.is_err_and(|e| e.kind() == io::ErrorKind::TimedOut));
    }
}
