//! The threads of a process, and through which of them `/proc` shows what all of them share.
//!
//! `/proc/PID` is the first thread. Once it has ended, its `maps`, `pagemap`, `fd` and `environ` are empty although the
//! other threads go on; `/proc/PID/task/TID` of a living thread has them. The memory is common to all threads. The
//! table of open files and the working directory are not: a thread may have its own (`unshare(2)`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::procfs;

/// Threads that start and end faster than they can be listed are given up after this time.
const LIMIT: Duration = Duration::from_secs(1);

const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// `PF_KTHREAD` of the kernel's `sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// The folder of a thread in `/proc`.
pub fn folder(pid: u32, tid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/task/{tid}"))
}

/// The threads of a process, the first one also after its end; nothing when the process is gone.
///
/// # Errors
/// When they cannot be listed.
pub fn threads(pid: u32) -> io::Result<Vec<u32>> {
    let list = || -> io::Result<Vec<u32>> {
        let names = fs::read_dir(format!("/proc/{pid}/task"))?.map(|entry| Ok(entry?.file_name()));
        let names: Vec<_> = names.collect::<io::Result<_>>()?;
        Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
    };
    list().or_else(|error| if is_gone(&error) { Ok(Vec::new()) } else { Err(error) })
}

/// The folders of those threads of a process that together have every file that it has open: usually all threads have
/// one table of files, and one of them is enough.
///
/// # Errors
/// When the threads cannot be listed.
pub fn file_tables(pid: u32) -> io::Result<Vec<PathBuf>> {
    let mut tables: Vec<u32> = Vec::new();
    for tid in threads(pid)? {
        if !tables.iter().any(|other| share_files(*other, tid)) {
            tables.push(tid);
        }
    }
    Ok(tables.into_iter().map(|tid| folder(pid, tid)).collect())
}

/// True for two threads that have one table of open files. False also where the kernel does not say so.
fn share_files(one: u32, other: u32) -> bool {
    /// `KCMP_FILES` of the kernel's `kcmp.h`.
    const FILES: libc::c_int = 2;
    // SAFETY: kcmp compares two threads and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, one as libc::pid_t, other as libc::pid_t, FILES, 0, 0) == 0 }
}

/// True for the error of a process or thread that is gone.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// True for a thread of the kernel: it has no memory and no files of its own.
pub fn is_kernel_thread(pid: u32) -> bool {
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat);
    // The name in parentheses may hold anything, parentheses too.
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// Asks for something of a process's memory. `ask` gets the folder of a thread, and answers nothing where that thread
/// has no memory any more. Nothing: no thread has, because the process is gone or is the kernel's.
///
/// # Errors
/// What `ask` says, except that a thread is gone; [`io::ErrorKind::TimedOut`] where threads come and go all the time.
pub fn through_memory<T>(pid: u32, ask: impl Fn(&Path) -> io::Result<Option<T>>) -> io::Result<Option<T>> {
    let ask = |folder: &Path| ask(folder).or_else(|e| if is_gone(&e) { Ok(None) } else { Err(e) });
    if let Some(answer) = ask(Path::new(&format!("/proc/{pid}")))? {
        return Ok(Some(answer));
    }
    let until = Instant::now() + LIMIT;
    loop {
        let threads = threads(pid)?;
        for tid in &threads {
            if let Some(answer) = ask(&folder(pid, *tid))? {
                return Ok(Some(answer));
            }
        }
        // Without memory a thread starts no other one. If the count is that of the list and all in the list are still
        // there afterwards, the list was complete at the time of the count.
        let count = procfs::stat(pid).ok().flatten().map_or(0, |stat| stat.threads);
        let listed = threads.len() as u64;
        if count == 0 || count == listed && threads.iter().all(|tid| folder(pid, *tid).exists()) {
            return Ok(None);
        }
        if Instant::now() > until {
            let why = format!("the threads of process {pid} start and end faster than they can be listed");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

/// The folder of a thread that has the process's memory; nothing when there is none.
///
/// # Errors
/// As [`through_memory`].
pub fn with_memory(pid: u32) -> io::Result<Option<PathBuf>> {
    through_memory(pid, |folder| Ok(has_memory(folder)?.then(|| folder.to_owned())))
}

/// The number of that thread.
///
/// # Errors
/// As [`through_memory`].
pub fn thread_with_memory(pid: u32) -> io::Result<Option<u32>> {
    let number = |folder: PathBuf| folder.file_name()?.to_str()?.parse().ok();
    Ok(with_memory(pid)?.and_then(number))
}

/// True for a thread that has memory.
///
/// # Errors
/// When it is gone.
pub fn has_memory(folder: &Path) -> io::Result<bool> {
    let pages = fs::read_to_string(folder.join("statm"))?;
    Ok(pages.split(' ').next().is_some_and(|size| size != "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_with_memory_is_found() {
        let me = std::process::id();
        assert_eq!(with_memory(me).unwrap(), Some(PathBuf::from(format!("/proc/{me}"))));
        assert!(threads(me).unwrap().contains(&me));
        assert!(!is_kernel_thread(me));
        // Nothing has this number.
        assert!(threads(u32::MAX).unwrap().is_empty() && with_memory(u32::MAX).unwrap().is_none());
    }

    #[test]
    fn a_kernel_thread_has_no_memory() {
        let Some(kernel) = procfs::pids().unwrap().into_iter().find(|pid| is_kernel_thread(*pid)) else {
            return;
        };
        assert_eq!(with_memory(kernel).unwrap(), None);
    }

    #[test]
    fn a_thread_that_has_ended_hands_the_question_on() {
        let me = std::process::id();
        let first = PathBuf::from(format!("/proc/{me}"));
        let answer = through_memory(me, |folder| Ok((folder != first).then(|| folder.to_owned()))).unwrap();
        assert!(answer.is_some_and(|folder| folder.starts_with(first.join("task"))));
        let nobody = through_memory(me, |_| Ok(None::<()>));
        assert!(matches!(nobody, Ok(None)) || nobody.is_err_and(|e| e.kind() == io::ErrorKind::TimedOut));
    }
}
