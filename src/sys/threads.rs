//! Threads that may not be had: a limit on processes (`ulimit -u`, `pids.max`) or on memory refuses them. The functions of
//! the standard library without a [`thread::Builder`] panic then.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle, Scope, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Starts a thread.
///
/// # Errors
/// When the system refuses another one.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    thread::Builder::new().spawn(work).map_err(refused)
}

/// Starts a thread that ends within the scope.
///
/// # Errors
/// As [`start`].
pub fn start_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    thread::Builder::new().spawn_scoped(scope, work).map_err(refused)
}

fn refused(error: std::io::Error) -> Error {
    Error::failed("cannot start a thread").because(error).remedy(
        "raise the limits on processes and memory: ulimit -u, ulimit -v, and pids.max of the control group",
    )
}

/// Runs `work` on this thread and on up to `threads - 1` others until all have returned. Threads that cannot be started
/// are left out: `work` takes its share from what is left, however many take part.
///
/// # Errors
/// The first error of `work`, or that it has panicked.
pub fn share(threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let guarded = || {
        catch_unwind(AssertUnwindSafe(&work)).unwrap_or_else(|_| Err(Error::failed("a thread has panicked")))
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map_while(|_| start_scoped(scope, guarded).ok()).collect();
        let mine = guarded();
        // All are waited for, the first error counts.
        let results: Vec<Result<()>> = others
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(Error::failed("a thread has panicked"))))
            .collect();
        std::iter::once(mine).chain(results).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn all_of_the_work_is_done_and_an_error_or_a_panic_is_told() {
        let left = AtomicUsize::new(1000);
        let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        share(3, || {
            while take() {}
            Ok(())
        })
        .unwrap();
        assert_eq!(left.into_inner(), 0);
        assert_eq!(share(1, || Err(Error::failed("no"))).unwrap_err().message(), "no");
        assert!(share(2, || panic!("of a test")).unwrap_err().message().contains("panicked"));
    }
}
