//! Serving by passthrough: which files have a backing, which get one, and which opens wait for it.
//!
//! The inode number determines how a file is served, so the decision is made in LOOKUP. An OPEN of a passthrough number
//! that finds no backing in time is answered with ESTALE: the kernel then repeats the lookup, gets the decode number
//! and opens that. The process that opens the file sees no error.
//!
//! With kernel decode, an open waits until the server knows whether the file was verified before. A file that was not
//! verified before is served by decode until its blocks are verified.

mod background;
mod eviction;
pub mod hydrate;
mod scrub;
mod serving_policy;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use log::Level;
use stencilfs::control::{PARKED_SLOTS, ServeMode};
use stencilfs::error::{Code, Error};
use stencilfs::store::Template;

use crate::protocol::stats::{Counter, Stats};
use crate::protocol::{Cache, FileKey, ServerRequest};
use crate::server::backings::hydrate::{Hydrator, Prepared, Ready};
use crate::server::pending::{Opened, PendingOpen};
use crate::server::refusal::Refusal;

/// Number of files that are hydrated at the same time, so that a small file need not wait for a large one.
const WORKERS: usize = 2;

/// Delay before a failed hydration is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Largest number of states. Beyond that, the states of files without a backing are dropped.
const MAX_STATES: usize = 4096;

#[derive(Debug)]
enum State {
    /// The backing is being filled; opens wait until the deadline, if there is one.
    Filling { deadline: Option<Instant>, late: bool, waiting: Vec<PendingOpen> },
    /// The backing is registered.
    Ready(Ready),
    /// There is no backing. The supervisor has recorded the reason.
    Decode { since: Instant, retry: bool },
    /// The supervisor is checking whether the backing is unused and can be evicted; opens wait for the outcome.
    Evicting { ready: Ready, waiting: Vec<(Arc<Template>, usize, PendingOpen)> },
}

impl State {
    /// The backing is being filled, and no open waits for it yet.
    fn filling() -> State {
        State::Filling { deadline: None, late: false, waiting: Vec::new() }
    }

    /// Returns true if the last attempt has failed for a temporary reason, some time ago.
    fn may_retry(&self) -> bool {
        matches!(self, State::Decode { since, retry: true } if since.elapsed() > RETRY_INTERVAL)
    }
}

/// A backing that an earlier server has registered.
#[derive(Debug)]
pub struct EarlierBacking {
    /// The file of a template.
    pub key: FileKey,
    /// The backing; `None` if it was found damaged, so that the file is served by decode.
    pub ready: Option<Ready>,
}

/// A request to the workers to make a backing.
#[derive(Debug)]
pub struct Job {
    template: Arc<Template>,
    file: usize,
    key: FileKey,
}

/// The backings of a server.
#[derive(Debug)]
pub struct Backings {
    mode: ServeMode,
    timeout: Duration,
    possible: bool,
    hydrator: Hydrator,
    states: Mutex<HashMap<FileKey, State>>,
    jobs: Mutex<mpsc::Sender<Job>>,
    /// Backings for kernel decode that wait for their verification, with the time when their hydration began.
    verifications: Mutex<Vec<(Job, Prepared, Instant)>>,
    /// Signals a new element of `verifications`.
    to_verify: Condvar,
    /// Held by the thread that makes backings in the background.
    background: Mutex<()>,
    /// True if the thread that makes backings in the background has to look for templates again.
    again: AtomicBool,
    deadlines: Condvar,
    /// True after an open found all parking slots taken, until the next hydration ends.
    crowded: AtomicBool,
    stats: Stats,
}

fn key(template: &Template, file: usize) -> FileKey {
    let name = template.files().get(file).map_or("", |f| f.name.as_str());
    FileKey { digest: *template.digest(), file: name.to_owned() }
}

impl Backings {
    /// Creates the state with the backings of earlier servers, and starts the workers.
    pub fn new(
        mode: ServeMode,
        timeout: Duration,
        hydrator: Hydrator,
        earlier: Vec<EarlierBacking>,
        stats: Stats,
    ) -> Arc<Backings> {
        let possible = !matches!(hydrator.cache(), Cache::Nowhere(_));
        let state = |EarlierBacking { key, ready }| {
            (key, ready.map_or_else(|| State::Decode { since: Instant::now(), retry: false }, State::Ready))
        };
        let states = earlier.into_iter().map(state).collect();
        let (sender, receiver) = mpsc::channel::<Job>();
        let ours = Arc::new(Backings {
            mode,
            timeout,
            possible,
            hydrator,
            states: Mutex::new(states),
            jobs: Mutex::new(sender),
            verifications: Mutex::default(),
            to_verify: Condvar::new(),
            background: Mutex::default(),
            again: AtomicBool::new(false),
            deadlines: Condvar::new(),
            crowded: AtomicBool::new(false),
            stats,
        });
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..WORKERS {
            let (ours, receiver) = (Arc::clone(&ours), Arc::clone(&receiver));
            thread::spawn(move || {
                loop {
                    let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    ours.run(job);
                }
            });
        }
        let verifier = Arc::clone(&ours);
        thread::spawn(move || verifier.verify_all());
        let clock = Arc::clone(&ours);
        thread::spawn(move || clock.watch_deadlines());
        ours
    }

    /// Restores the states of files that the previous server served by decode because their backings were late or had
    /// failed: an open that was answered with ESTALE must not get ESTALE again. Returns the backings to make now.
    pub fn restore_late(&self, late: Vec<(Option<Arc<Template>>, FileKey)>) -> Vec<Job> {
        let mut jobs = Vec::new();
        if !self.mode.allows_decode() || !self.possible {
            return jobs;
        }
        let mut states = self.states();
        for (template, key) in late {
            let file = template.as_ref().and_then(|t| t.files().iter().position(|f| f.name == key.file));
            let state = match template.zip(file) {
                Some((template, file)) => {
                    jobs.push(Job { template, file, key: key.clone() });
                    State::Filling { deadline: None, late: true, waiting: Vec::new() }
                }
                None => State::Decode { since: Instant::now(), retry: true },
            };
            states.insert(key, state);
        }
        jobs
    }

    /// Queues backings to make.
    pub fn start(&self, jobs: Vec<Job>) {
        let sender = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.into_iter().for_each(|job| drop(sender.send(job)));
    }

    fn states(&self) -> MutexGuard<'_, HashMap<FileKey, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an open of the passthrough inode number of a file, now or when the backing is registered.
    pub fn open(&self, template: &Arc<Template>, file: usize, mut opening: PendingOpen) {
        let key = key(template, file);
        let mut states = self.states();
        match states.get_mut(&key) {
            Some(State::Ready(ready)) => {
                self.stats.count(Counter::OpensPassthrough);
                opening.reply(Ok(Opened::Backing(ready.id)));
            }
            Some(State::Filling { late: false, waiting, deadline }) if opening.park() => {
                waiting.push(opening);
                if deadline.is_none() && self.mode.allows_decode() {
                    *deadline = Instant::now().checked_add(self.timeout);
                    drop(states);
                    self.deadlines.notify_all();
                }
            }
            Some(State::Evicting { waiting, .. }) if opening.park() => {
                waiting.push((Arc::clone(template), file, opening));
            }
            Some(State::Filling { late: false, .. } | State::Evicting { .. }) => self.refuse_crowded(opening),
            Some(State::Filling { .. } | State::Decode { .. }) => opening.reply(Err(Refusal::Stale)),
            None if !self.possible => {
                let refusal = if self.mode.allows_decode() { Refusal::Stale } else { Refusal::Failed };
                opening.reply(Err(refusal));
            }
            None if !opening.park() => self.refuse_crowded(opening),
            None => {
                let deadline = match self.mode {
                    ServeMode::Auto | ServeMode::Kernel => Instant::now().checked_add(self.timeout),
                    ServeMode::Passthrough | ServeMode::Decode => None,
                };
                let state = State::Filling { deadline, late: false, waiting: vec![opening] };
                self.begin(states, template, file, state);
                self.deadlines.notify_all();
            }
        }
    }

    /// Enters the state of a file whose backing is to be made, and queues the backing.
    fn begin(
        &self,
        mut states: MutexGuard<'_, HashMap<FileKey, State>>,
        template: &Arc<Template>,
        file: usize,
        state: State,
    ) {
        if states.len() >= MAX_STATES {
            // The next open of such a file makes a new attempt.
            states.retain(|_, state| !matches!(state, State::Decode { .. }));
        }
        let job = Job { template: Arc::clone(template), file, key: key(template, file) };
        states.insert(job.key.clone(), state);
        drop(states);
        self.start(vec![job]);
    }

    /// Answers an open that cannot wait because all parking slots are taken, as if its deadline had passed.
    fn refuse_crowded(&self, opening: PendingOpen) {
        if !self.crowded.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{PARKED_SLOTS} opens are waiting for backings: further opens are served by decode or fail with EAGAIN"
            );
        }
        opening.reply(Err(if self.mode.allows_decode() { Refusal::Stale } else { Refusal::Crowded }));
    }

    fn run(&self, job: Job) {
        self.stats.count(Counter::HydrationsStarted);
        let FileKey { digest, file } = &job.key;
        log::info!(template:% = digest, file; "hydrating template {digest} file {file}");
        let start = Instant::now();
        // The old reason is cleared before the state is read. A deadline that passes in between reports its reason
        // later, so that reason stays.
        self.report_reason(&job.key, None);
        if matches!(self.states().get(&job.key), Some(State::Filling { late: true, .. })) {
            self.report_reason(&job.key, Some(self.late_reason()));
        }
        let prepared = self.hydrator.prepare(&job.template, job.file, &job.key, |keys| self.evict(keys));
        match prepared {
            Ok(prepared @ Prepared::Frozen { verified_at: None, .. }) if self.mode == ServeMode::Kernel => {
                self.serve_by_decode(&job.key);
                // The verification runs in another thread: opens of files that were verified before must not wait for
                // it.
                self.verifications().push((job, prepared, start));
                self.to_verify.notify_one();
            }
            Ok(prepared) => self.register(&job, prepared, start),
            Err(error) => self.finish(&job, Err(error), start),
        }
    }

    fn verifications(&self) -> MutexGuard<'_, Vec<(Job, Prepared, Instant)>> {
        self.verifications.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Verifies and registers the backings of the queue, one after the other. Never returns.
    fn verify_all(&self) {
        loop {
            let next = self.to_verify.wait_while(self.verifications(), |all| all.is_empty());
            let (job, prepared, start) = next.unwrap_or_else(PoisonError::into_inner).remove(0);
            self.register(&job, prepared, start);
        }
    }

    /// Verifies and registers a prepared backing.
    fn register(&self, job: &Job, prepared: Prepared, start: Instant) {
        let made = self.hydrator.register(&job.template, job.file, &job.key, prepared);
        self.finish(job, made, start);
    }

    /// Enters the result of a hydration, and answers the opens that wait for it.
    fn finish(&self, job: &Job, made: stencilfs::error::Result<Ready>, start: Instant) {
        let (state, answer): (Option<State>, _) = match made {
            Ok(ready) => {
                self.stats.count(Counter::HydrationsDone);
                log::info!(
                    template:% = job.key.digest, file = job.key.file;
                    "the backing of template {} file {} is ready after {:.2} s",
                    job.key.digest,
                    job.key.file,
                    start.elapsed().as_secs_f64()
                );
                let id = ready.id;
                (Some(State::Ready(ready)), Ok(id))
            }
            Err(_) if self.hydrator.condemned().holds(&job.key.digest) => {
                let _ = self.hydrator.link().request(&ServerRequest::Abandon { key: job.key.clone() }, None);
                (None, Err(Refusal::NoEntry))
            }
            Err(error) => {
                self.stats.count(Counter::HydrationsFailed);
                log::warn!(template:% = job.key.digest, file = job.key.file; "template {} file {} has no backing: {error}", job.key.digest, job.key.file);
                self.report_reason(&job.key, Some(error.to_string()));
                let _ = self.hydrator.link().request(&ServerRequest::Abandon { key: job.key.clone() }, None);
                match self.mode.allows_decode() {
                    true => {
                        let state = State::Decode { since: Instant::now(), retry: is_temporary(&error) };
                        (Some(state), Err(Refusal::Stale))
                    }
                    // The next open makes a new attempt, as the file cannot be served by decode.
                    false => (None, Err(open_refusal(&error))),
                }
            }
        };
        let _guard = self.hydrator.condemned().guard();
        // The template may have been condemned meanwhile: then its backing is registered, but must not be served.
        let answer = match self.hydrator.condemned().holds(&job.key.digest) {
            true => Err(Refusal::NoEntry),
            false => answer,
        };
        if answer.is_ok() {
            self.hydrator.condemned().opened(&job.key.digest);
        }
        let mut states = self.states();
        let before = match state {
            Some(state) => states.insert(job.key.clone(), state),
            None => states.remove(&job.key),
        };
        drop(states);
        self.crowded.store(false, Ordering::Relaxed);
        let Some(State::Filling { waiting, .. }) = before else { return };
        for opening in waiting {
            match answer {
                Ok(id) => {
                    self.stats.count(Counter::OpensPassthrough);
                    opening.reply(Ok(Opened::Backing(id)));
                }
                Err(refusal) => opening.reply(Err(refusal)),
            }
        }
    }

    fn report_reason(&self, key: &FileKey, why: Option<String>) {
        let _ =
            self.hydrator.link().request(&ServerRequest::NoBacking { key: key.clone(), reason: why }, None);
    }

    fn late_reason(&self) -> String {
        if self.mode == ServeMode::Kernel {
            return "the blocks are being verified for kernel decode".to_owned();
        }
        let waited = self.timeout.as_secs_f64();
        format!("the backing is still being filled after the timeout of {waited} s")
    }

    /// Refuses the opens that wait for a backing: the file is served by decode until the backing is registered.
    fn serve_by_decode(&self, key: &FileKey) {
        let mut states = self.states();
        let Some(State::Filling { late: late @ false, waiting, .. }) = states.get_mut(key) else { return };
        *late = true;
        let refused = std::mem::take(waiting);
        drop(states);
        let why = self.late_reason();
        let level = if self.mode == ServeMode::Kernel { Level::Info } else { Level::Warn };
        log::log!(level, template:% = key.digest, file = key.file; "template {} file {} is served by decode: {why}", key.digest, key.file);
        self.report_reason(key, Some(why));
        // The opens are answered after the report: if this server dies, its successor reads the reason from the ledger
        // and answers the next lookup with the decode number.
        refused.into_iter().for_each(|opening| opening.reply(Err(Refusal::Stale)));
    }

    /// Refuses opens whose deadline has passed.
    fn watch_deadlines(&self) {
        let mut states = self.states();
        loop {
            let now = Instant::now();
            let mut next: Option<Instant> = None;
            let mut late_keys = Vec::new();
            for (key, state) in states.iter() {
                if let State::Filling { deadline: Some(deadline), late: false, .. } = state {
                    match *deadline <= now {
                        true => late_keys.push(key.clone()),
                        false => next = Some(next.map_or(*deadline, |n| n.min(*deadline))),
                    }
                }
            }
            if !late_keys.is_empty() {
                drop(states);
                late_keys.iter().for_each(|key| self.serve_by_decode(key));
                states = self.states();
                continue;
            }
            states = match next {
                Some(next) => {
                    let wait = next.saturating_duration_since(now);
                    self.deadlines.wait_timeout(states, wait).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.deadlines.wait(states).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Returns true for temporary errors: too little space, or a directory of the store or the cache that is away.
fn is_temporary(error: &Error) -> bool {
    const TEMPORARY: [i32; 7] =
        [libc::ENOSPC, libc::EDQUOT, libc::ENOENT, libc::EACCES, libc::EROFS, libc::EIO, libc::ESTALE];
    matches!(error.code(), Code::TryAgain | Code::NotFound)
        || error.errno().is_some_and(|errno| TEMPORARY.contains(&errno))
}

/// Returns the refusal of an open in passthrough mode, where decode is not allowed.
fn open_refusal(error: &Error) -> Refusal {
    match (error.code(), error.errno()) {
        // An error with an errno means that the store is away, an error without one that the backing does not fit.
        (Code::TryAgain, Some(_)) => Refusal::Away,
        (Code::TryAgain, None) | (_, Some(libc::ENOSPC | libc::EDQUOT)) => Refusal::NoSpace,
        (Code::Damage, _) => Refusal::Damaged,
        _ => Refusal::Failed,
    }
}

#[cfg(test)]
mod tests;
