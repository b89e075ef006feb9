//! Collects figures in a child process, and keeps the last ones.
//!
//! A process that is stuck in a page fault or in an `execve` can block a reader of its files in `/proc`, and a dead file
//! system a reader of a store. Such waits end if the reader is killed, so a collection is a child process with a time
//! limit. At most one child exists.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde::de::DeserializeOwned;

use super::figures::Outcome;
use crate::error::{Error, Result};
use crate::sys::poll::poll_for;

/// A collection that runs for longer counts as blocked.
const BLOCKED_AFTER: Duration = Duration::from_secs(5);

/// Largest output of a collection, in bytes.
const MAX_OUTPUT: usize = 64 << 20;

/// Longest wait for the exit of a child after its output, or after it was killed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Figures, and the state of their collection.
#[derive(Debug)]
pub struct View<T> {
    /// The last figures, and the time at which their collection began.
    pub last: Option<(Arc<T>, Instant)>,
    /// Duration of the last collection that succeeded.
    pub duration: Duration,
    /// Number of collections that have ended.
    pub collections: u64,
    /// Number of collections that failed.
    pub failures: u64,
    /// True if the last collection failed, or the present one takes longer than [`BLOCKED_AFTER`].
    pub blocked: bool,
}

struct State<T> {
    last: Option<(Arc<T>, Instant)>,
    duration: Duration,
    collections: u64,
    failures: u64,
    has_failed: bool,
    requested: bool,
    running: Option<Instant>,
    /// Beginning of the last collection, also of one that failed.
    attempted: Option<Instant>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    max_age: Duration,
}

/// Collects figures of one kind.
pub struct Collector<T>(Arc<Shared<T>>);

impl<T: DeserializeOwned + Send + Sync + 'static> Collector<T> {
    /// Starts a thread that collects figures on request. `command` returns the command of a child process, which prints
    /// an [`Outcome`] on one line. A child without output after `timeout` is killed.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be started.
    pub fn start(
        max_age: Duration,
        timeout: Duration,
        command: impl Fn() -> Command + Send + 'static,
    ) -> Result<Collector<T>> {
        let state = State {
            last: None,
            duration: Duration::ZERO,
            collections: 0,
            failures: 0,
            has_failed: false,
            requested: false,
            running: None,
            attempted: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), max_age });
        let ours = Arc::clone(&shared);
        let work = move || {
            let (mut leftover, mut logged) = (None, None);
            loop {
                let began = ours.begin();
                let collected = collect(command(), began + timeout, &mut leftover);
                let error = collected.as_ref().err().map(ToString::to_string);
                ours.end(began, collected.ok());
                if error.is_some() && error != logged {
                    log::warn!("cannot collect figures: {}", error.as_deref().unwrap_or_default());
                }
                logged = error;
            }
        };
        let thread = thread::Builder::new().name("collector".into()).spawn(work);
        thread.map_err(|e| Error::failed("cannot start a thread").because(e))?;
        Ok(Collector(shared))
    }

    /// Requests a collection, unless one is running or the last one is recent.
    pub fn request(&self) {
        let mut state = self.0.state();
        if state.running.is_none() && !self.0.is_recent(&state) {
            state.requested = true;
            self.0.changed.notify_all();
        }
    }

    /// Waits until no collection is requested or running, at most until `until`.
    pub fn wait(&self, until: Instant) -> View<T> {
        let mut state = self.0.state();
        while state.requested || state.running.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let is_late = state.running.is_some_and(|began| began.elapsed() > BLOCKED_AFTER);
        View {
            last: state.last.clone(),
            duration: state.duration,
            collections: state.collections,
            failures: state.failures,
            blocked: state.has_failed || is_late,
        }
    }
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_recent(&self, state: &State<T>) -> bool {
        state.attempted.is_some_and(|began| began.elapsed() < self.max_age)
    }

    /// Waits for a request. Returns when the collection begins.
    fn begin(&self) -> Instant {
        let mut state = self.state();
        while !state.requested {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let now = Instant::now();
        (state.requested, state.running, state.attempted) = (false, Some(now), Some(now));
        now
    }

    fn end(&self, began: Instant, figures: Option<T>) {
        let mut state = self.state();
        state.running = None;
        state.collections += 1;
        state.has_failed = figures.is_none();
        match figures {
            Some(figures) => {
                state.duration = began.elapsed();
                state.last = Some((Arc::new(figures), began));
            }
            None => state.failures += 1,
        }
        self.changed.notify_all();
    }
}

/// Runs one child. A child that does not exit stays in `leftover`, and no other child is started until it has exited.
fn collect<T: DeserializeOwned>(
    mut command: Command,
    until: Instant,
    leftover: &mut Option<Child>,
) -> Result<T> {
    if let Some(child) = leftover
        && !has_exited(child, Duration::ZERO)
    {
        return Err(Error::try_again(format!(
            "the previous collection (process {}) has not exited",
            child.id()
        )));
    }
    let spawned = command.stdout(Stdio::piped()).spawn();
    let child = leftover.insert(spawned.map_err(|e| Error::failed("cannot start a collection").because(e))?);
    let line = match child.stdout.take() {
        Some(output) => read_line(output, until),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    if line.is_err() {
        let _ = child.kill();
    }
    if has_exited(child, EXIT_TIMEOUT) {
        *leftover = None;
    }
    let line = line.map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => Error::try_again("the collection did not finish within its time limit"),
        _ => Error::failed("cannot read the output of a collection").because(e),
    })?;
    let outcome = serde_json::from_slice(&line)
        .map_err(|e| Error::failed("cannot parse the output of a collection").because(e.into()))?;
    match outcome {
        Outcome::Figures(figures) => Ok(figures),
        Outcome::Error(error) => Err(Error::failed(error)),
    }
}

fn has_exited(child: &mut Child, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Reads a line. A child that has printed the line may still wait in exit(2) for a thread that is stuck, so the end of
/// the file is not awaited.
fn read_line(mut output: impl Read + std::os::fd::AsFd, until: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll_for(&mut [PollFd::new(&output, PollFlags::IN)], Some(left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        let length = output.read(&mut piece)?;
        line.extend_from_slice(&piece[..length]);
        if line.last() == Some(&b'\n') {
            return Ok(line);
        }
        if length == 0 || line.len() > MAX_OUTPUT {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &'static str) -> impl Fn() -> Command + Send + 'static {
        move || {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn figures_are_collected_again_when_they_are_old() {
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let script = format!("echo >>{0}; printf '{{\"figures\":%d}}\\n' $(wc -l <{0})", count.display());
        let command = move || {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            command
        };
        let max_age = Duration::from_millis(300);
        let collector: Collector<u64> = Collector::start(max_age, Duration::from_secs(60), command).unwrap();
        let get = || {
            collector.request();
            collector.wait(soon())
        };
        let first = get();
        let (value, began) = first.last.unwrap();
        assert_eq!((*value, first.collections, first.failures, first.blocked), (1, 1, 0, false));
        // A slow host may need longer than the maximum age for two calls.
        let second = get();
        assert!(second.collections == 1 || began.elapsed() >= max_age);
        thread::sleep(max_age);
        assert!(*get().last.unwrap().0 > 1);
    }

    #[test]
    fn a_collection_that_fails_leaves_the_last_figures() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("there");
        let script = format!(
            "[ -e {0} ] && echo '{{\"error\":\"cannot inspect\"}}' || echo '{{\"figures\":7}}'; touch {0}",
            path.display()
        );
        let command = move || {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            command
        };
        let collector: Collector<u64> =
            Collector::start(Duration::ZERO, Duration::from_secs(60), command).unwrap();
        let get = || {
            collector.request();
            collector.wait(soon())
        };
        assert!(!get().blocked);
        let view = get();
        assert_eq!((*view.last.unwrap().0, view.failures, view.blocked), (7, 1, true));
    }

    #[test]
    fn a_child_that_does_not_answer_is_killed_and_a_reader_does_not_wait_for_it() {
        let command = shell("exec sleep 1000");
        let collector: Collector<u64> =
            Collector::start(Duration::ZERO, Duration::from_millis(200), command).unwrap();
        collector.request();
        let start = Instant::now();
        let view = collector.wait(start + Duration::from_millis(20));
        assert!(view.last.is_none() && view.failures == 0, "{view:?}");
        let view = collector.wait(soon());
        assert!(view.last.is_none() && view.failures == 1 && view.blocked, "{view:?}");
    }

    #[test]
    fn failures_are_repeated_no_more_often_than_figures_are_collected() {
        let command = shell("echo '{\"error\":\"cannot inspect\"}'");
        let max_age = Duration::from_secs(3600);
        let collector: Collector<u64> = Collector::start(max_age, Duration::from_secs(60), command).unwrap();
        for _ in 0..3 {
            collector.request();
            let view = collector.wait(soon());
            assert!(view.failures == 1 && view.blocked, "{view:?}");
        }
    }

    #[test]
    fn broken_output_is_a_failure() {
        for script in ["true", "printf 1", "echo '{}'", "echo nonsense"] {
            let mut leftover = None;
            let found: Result<u64> = collect(shell(script)(), soon(), &mut leftover);
            assert!(found.is_err() && leftover.is_none(), "{script}: {found:?}");
        }
    }
}
