//! Starting threads with an error instead of a panic if a limit on processes (`ulimit -u`, `pids.max`) or memory
//! refuses them. The functions of the standard library without a [`thread::Builder`] panic in that case.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle, Scope, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Starts a thread.
///
/// # Errors
/// Returns an error if the system refuses the thread.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    thread::Builder::new().spawn(work).map_err(refused)
}

/// Starts a scoped thread.
///
/// # Errors
/// Same as [`start`].
pub fn start_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    thread::Builder::new().spawn_scoped(scope, work).map_err(refused)
}

fn refused(error: std::io::Error) -> Error {
    Error::failed("cannot start a thread")
        .because(error)
        .hint("raise the process and memory limits: ulimit -u, ulimit -v, pids.max of the cgroup")
}

/// Runs `work`. A panic becomes an error.
///
/// # Errors
/// Returns the error of `work`, or an error if it panicked.
pub fn catch_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Error::failed("a worker thread panicked")))
}

/// Runs `work` on this thread and on up to `threads - 1` others until all have returned. Fewer threads take part if the
/// system refuses some, so each call of `work` must take work from a shared queue until the queue is empty.
///
/// # Errors
/// Returns the first error of `work`, or an error if a thread panicked.
pub fn share(threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let guarded = || catch_panic(&work);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map_while(|_| start_scoped(scope, guarded).ok()).collect();
        let mine = guarded();
        // Waits for all threads before the first error is returned.
        let results: Vec<Result<()>> = others
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(Error::failed("a worker thread panicked"))))
            .collect();
        std::iter::once(mine).chain(results).collect()
    })
}

#[cfg(test)]
mod tests {
    use crate::sys::process::threads::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn share_does_all_work_and_reports_errors_and_panics() {
        let left = AtomicUsize::new(1000);
        let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        share(3, || {
            while take() {}
            Ok(())
        })
        .unwrap();
        assert_eq!(left.into_inner(), 0);
        assert_eq!(share(1, || Err(Error::failed("no"))).unwrap_err().message(), "no");
        assert!(share(2, || panic!("test")).unwrap_err().message().contains("worker thread panicked"));
    }
}
