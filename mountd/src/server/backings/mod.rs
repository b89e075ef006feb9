//! Serving by passthrough: which files have a backing, which get one, and which opens wait for it.
//!
//! The inode number determines how a file is served, so the decision is made in LOOKUP. An OPEN of a passthrough number
//! that finds no backing in time is answered with ESTALE: the kernel then repeats the lookup, gets the decode number
//! and opens that. The process that opens the file sees no error.

pub mod hydrate;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::control::{PARKED_SLOTS, ServeMode};
use stencilfs::error::{Code, Error};
use stencilfs::store::{Serving, Store, Template};

use crate::protocol::stats::{Counter, Stats};
use crate::protocol::{Cache, FileKey, MAX_KEYS, ServerRequest};
use crate::server::backings::hydrate::Hydrator;
use crate::server::pending::{Opened, PendingOpen};
use crate::server::refusal::Refusal;
use crate::server::tree::ServingPolicy;
use crate::server::tree::node::NameLifetime;

/// Files that are hydrated at the same time, so that a small file need not wait for a large one.
const WORKERS: usize = 2;

/// Time until a failed hydration is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Longest wait for a hydration of a condemned template to stop; it may be waiting for the store.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Most states; beyond that, files without a backing are forgotten.
const MAX_STATES: usize = 4096;

#[derive(Debug)]
enum State {
    /// The backing is being made; opens wait until the deadline, if there is one.
    Filling { deadline: Option<Instant>, late: bool, waiting: Vec<PendingOpen> },
    /// The backing is registered.
    Ready(Ready),
    /// There is no backing; the supervisor has the reason.
    Decode { since: Instant, retry: bool },
    /// The backing is being evicted, unless it is found to be in use; opens wait for the outcome.
    Leaving { ready: Ready, waiting: Vec<(Arc<Template>, usize, PendingOpen)> },
}

/// A registered backing.
#[derive(Debug)]
struct Ready {
    /// Its id on the connection.
    id: u32,
    /// The file. The kernel has a reference too; this descriptor is for a supervisor that takes over from a dead one.
    _file: OwnedFd,
}

/// A backing to make.
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
    /// Creates the state with the backings that are ready, and starts the workers.
    pub fn new(
        mode: ServeMode,
        timeout: Duration,
        hydrator: Hydrator,
        ready: Vec<(FileKey, u32, OwnedFd)>,
        stats: Stats,
    ) -> Arc<Backings> {
        let possible = !matches!(hydrator.cache(), Cache::Nowhere(_));
        let state = |(key, id, file)| (key, State::Ready(Ready { id, _file: file }));
        let states = ready.into_iter().map(state).collect();
        let (sender, receiver) = mpsc::channel::<Job>();
        let ours = Arc::new(Backings {
            mode,
            timeout,
            possible,
            hydrator,
            states: Mutex::new(states),
            jobs: Mutex::new(sender),
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
                    ours.run(&job);
                }
            });
        }
        let clock = Arc::clone(&ours);
        thread::spawn(move || clock.watch_deadlines());
        ours
    }

    /// Enters files that the previous server served by decode, since their backings were late or failed: an open that
    /// was answered with ESTALE must not get ESTALE again. Returns the backings to make now.
    pub fn restore_late(&self, late: Vec<(Option<Arc<Template>>, FileKey)>) -> Vec<Job> {
        let mut jobs = Vec::new();
        if self.mode != ServeMode::Auto || !self.possible {
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

    /// Answers an open of a file's passthrough number, now or when its backing is ready.
    pub fn open(&self, template: &Arc<Template>, file: usize, mut opening: PendingOpen) {
        let key = key(template, file);
        let mut states = self.states();
        match states.get_mut(&key) {
            Some(State::Ready(ready)) => {
                self.stats.count(Counter::OpensPassthrough);
                opening.reply(Ok(Opened::Backing(ready.id)));
            }
            Some(State::Filling { late: false, waiting, .. }) if opening.park() => waiting.push(opening),
            Some(State::Leaving { waiting, .. }) if opening.park() => {
                waiting.push((Arc::clone(template), file, opening));
            }
            Some(State::Filling { late: false, .. } | State::Leaving { .. }) => self.refuse_crowd(opening),
            Some(State::Filling { .. } | State::Decode { .. }) => opening.reply(Err(Refusal::Stale)),
            None if !self.possible => {
                let refusal = if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Failed };
                opening.reply(Err(refusal));
            }
            None if !opening.park() => self.refuse_crowd(opening),
            None => {
                let deadline = match self.mode {
                    ServeMode::Auto => Instant::now().checked_add(self.timeout),
                    ServeMode::Passthrough | ServeMode::Decode => None,
                };
                if states.len() >= MAX_STATES {
                    // The next open of such a file makes a new attempt.
                    states.retain(|_, state| !matches!(state, State::Decode { .. }));
                }
                let state = State::Filling { deadline, late: false, waiting: vec![opening] };
                states.insert(key.clone(), state);
                drop(states);
                self.deadlines.notify_all();
                let job = Job { template: Arc::clone(template), file, key };
                let _ = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).send(job);
            }
        }
    }

    /// Answers an open that cannot wait as if its deadline had passed.
    fn refuse_crowd(&self, opening: PendingOpen) {
        if !self.crowded.swap(true, Ordering::Relaxed) {
            log::warn!("{PARKED_SLOTS} opens are waiting for backings: further opens do not wait");
        }
        opening.reply(Err(if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Crowded }));
    }

    fn run(&self, job: &Job) {
        self.stats.count(Counter::HydrationsStarted);
        log::info!("hydrating template {} file {}", job.key.digest, job.key.file);
        let start = Instant::now();
        // Before the state is read: if the deadline passes later, its reason is reported later too.
        self.report_reason(&job.key, None);
        if matches!(self.states().get(&job.key), Some(State::Filling { late: true, .. })) {
            self.report_reason(&job.key, Some(self.lateness()));
        }
        let made = self.hydrator.hydrate(&job.template, job.file, &job.key, |keys| self.evict(keys));
        let (state, answer): (Option<State>, _) = match made {
            Ok((id, file)) => {
                self.stats.count(Counter::HydrationsDone);
                log::info!(
                    "template {} file {} is served by passthrough after {:.2} s",
                    job.key.digest,
                    job.key.file,
                    start.elapsed().as_secs_f64()
                );
                (Some(State::Ready(Ready { id, _file: file })), Ok(id))
            }
            Err(_) if self.hydrator.condemned().holds(&job.key.digest) => {
                let _ = self.hydrator.link().request(&ServerRequest::Abandon { key: job.key.clone() }, None);
                (None, Err(Refusal::NoEntry))
            }
            Err(error) => {
                self.stats.count(Counter::HydrationsFailed);
                log::warn!("template {} file {} has no backing: {error}", job.key.digest, job.key.file);
                self.report_reason(&job.key, Some(error.to_string()));
                let _ = self.hydrator.link().request(&ServerRequest::Abandon { key: job.key.clone() }, None);
                match self.mode {
                    ServeMode::Auto => {
                        let state = State::Decode { since: Instant::now(), retry: may_pass(&error) };
                        (Some(state), Err(Refusal::Stale))
                    }
                    // The next open makes a new attempt; there is no other way to serve it.
                    ServeMode::Passthrough | ServeMode::Decode => (None, Err(for_opener(&error))),
                }
            }
        };
        let _guard = self.hydrator.condemned().guard();
        // The backing of a template that was condemned meanwhile is ready, but must not be served.
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

    /// Stops serving these backings, and makes the supervisor close the unused ones.
    fn evict(&self, keys: Vec<FileKey>) -> stencilfs::error::Result<()> {
        let mut leaving = Vec::new();
        {
            let mut states = self.states();
            for key in keys {
                match states.remove(&key) {
                    Some(State::Ready(ready)) => {
                        states.insert(key.clone(), State::Leaving { ready, waiting: Vec::new() });
                        leaving.push(key);
                    }
                    Some(other) => drop(states.insert(key, other)),
                    None => {}
                }
            }
        }
        let closed = self.hydrator.evict(leaving.clone());
        let gone: &[FileKey] = closed.as_deref().unwrap_or(&[]);
        let mut opens = Vec::new();
        {
            let mut states = self.states();
            for key in leaving {
                let Some(State::Leaving { ready, waiting }) = states.remove(&key) else { continue };
                opens.extend(waiting);
                if gone.contains(&key) {
                    self.stats.count(Counter::Evictions);
                    log::info!("evicted the unused backing of template {} file {}", key.digest, key.file);
                } else {
                    states.insert(key, State::Ready(ready));
                }
            }
        }
        for (template, file, opening) in opens {
            let condemned = self.hydrator.condemned();
            let _guard = condemned.guard();
            if condemned.holds(template.digest()) {
                opening.reply(Err(Refusal::NoEntry));
            } else {
                condemned.opened(template.digest());
                self.open(&template, file, opening);
            }
        }
        closed.map(|_| ())
    }

    /// Stops all activity for condemned templates: refuses waiting opens, and waits until hydrations stop at their next
    /// piece. Forgets removed templates.
    pub fn end_condemned(&self) {
        let condemned = self.hydrator.condemned();
        let until = Instant::now() + STOP_TIMEOUT;
        loop {
            let mut refused = Vec::new();
            let mut filling = false;
            self.states().retain(|key, state| {
                if !condemned.holds(&key.digest) {
                    return true;
                }
                match state {
                    State::Filling { waiting, .. } => {
                        refused.append(waiting);
                        filling = true;
                        true
                    }
                    State::Leaving { waiting, .. } => {
                        refused.extend(waiting.drain(..).map(|(_, _, opening)| opening));
                        true
                    }
                    State::Ready(_) | State::Decode { .. } => !condemned.is_removed(&key.digest),
                }
            });
            refused.into_iter().for_each(|opening: PendingOpen| opening.reply(Err(Refusal::NoEntry)));
            if !filling || Instant::now() > until {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Evicts the unused backings of templates that the store no longer has: a removal that was killed did not release
    /// them.
    pub fn give_up_vanished(&self, store: &Store) {
        let ready = |(key, state): (&FileKey, &State)| matches!(state, State::Ready(_)).then(|| key.clone());
        let mut keys: Vec<FileKey> = self.states().iter().filter_map(ready).collect();
        let condemned = self.hydrator.condemned();
        keys.retain(|key| !condemned.holds(&key.digest) && matches!(store.find(&key.digest), Ok(false)));
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("the backings of removed templates are kept for now: {error}");
            }
        }
    }

    fn report_reason(&self, key: &FileKey, why: Option<String>) {
        let _ =
            self.hydrator.link().request(&ServerRequest::NoBacking { key: key.clone(), reason: why }, None);
    }

    fn lateness(&self) -> String {
        let waited = self.timeout.as_secs_f64();
        format!("its backing is still being filled after the timeout of {waited} s")
    }

    /// Refuses opens whose deadline has passed.
    fn watch_deadlines(&self) {
        let mut states = self.states();
        loop {
            let now = Instant::now();
            let mut next: Option<Instant> = None;
            let (mut late_ones, mut refused) = (Vec::new(), Vec::new());
            for (key, state) in states.iter_mut() {
                if let State::Filling { deadline: Some(deadline), late, waiting } = state
                    && !*late
                {
                    if *deadline <= now {
                        *late = true;
                        refused.append(waiting);
                        late_ones.push(key.clone());
                    } else {
                        next = Some(next.map_or(*deadline, |n| n.min(*deadline)));
                    }
                }
            }
            if !late_ones.is_empty() {
                drop(states);
                for key in late_ones {
                    let why = self.lateness();
                    log::warn!("template {} file {} is served by decode: {why}", key.digest, key.file);
                    self.report_reason(&key, Some(why));
                }
                // After the report: if this server dies, its successor knows of the delay and answers the next lookup
                // with the decode number.
                refused.into_iter().for_each(|opening: PendingOpen| opening.reply(Err(Refusal::Stale)));
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

/// Returns true for temporary errors: no space, or a directory (of the store or the cache) that is away.
fn may_pass(error: &Error) -> bool {
    const PASSING: [i32; 7] =
        [libc::ENOSPC, libc::EDQUOT, libc::ENOENT, libc::EACCES, libc::EROFS, libc::EIO, libc::ESTALE];
    matches!(error.code(), Code::TryAgain | Code::NotFound)
        || error.errno().is_some_and(|errno| PASSING.contains(&errno))
}

/// Returns the refusal of an open in passthrough mode, where decode is not allowed.
fn for_opener(error: &Error) -> Refusal {
    match (error.code(), error.errno()) {
        // With an errno: the store is away. Without: the backing does not fit.
        (Code::TryAgain, Some(_)) => Refusal::Away,
        (Code::TryAgain, None) | (_, Some(libc::ENOSPC | libc::EDQUOT)) => Refusal::NoSpace,
        (Code::Damage, _) => Refusal::Damaged,
        _ => Refusal::Failed,
    }
}

impl ServingPolicy for Backings {
    fn serving(&self, template: &Template, file: usize) -> Serving {
        let empty = template.files().get(file).is_none_or(|f| f.size.get() == 0);
        match self.mode {
            _ if empty => return Serving::Decode,
            ServeMode::Decode => return Serving::Decode,
            ServeMode::Passthrough => return Serving::Passthrough,
            ServeMode::Auto if !self.possible => return Serving::Decode,
            ServeMode::Auto => {}
        }
        let key = key(template, file);
        let mut states = self.states();
        match states.get(&key) {
            None | Some(State::Leaving { .. } | State::Filling { .. })
                if self.crowded.load(Ordering::Relaxed) =>
            {
                Serving::Decode
            }
            None | Some(State::Ready(_) | State::Leaving { .. } | State::Filling { late: false, .. }) => {
                Serving::Passthrough
            }
            Some(State::Decode { since, retry: true }) if since.elapsed() > RETRY_INTERVAL => {
                states.remove(&key);
                Serving::Passthrough
            }
            Some(State::Filling { .. } | State::Decode { .. }) => Serving::Decode,
        }
    }

    fn lifetime(&self, template: &Template, file: usize) -> NameLifetime {
        match (self.mode, self.possible) {
            // A later lookup may return the passthrough number.
            (ServeMode::Auto, true) if self.serving(template, file) == Serving::Decode => NameLifetime::Zero,
            _ => NameLifetime::Long,
        }
    }
}

#[cfg(test)]
mod tests;
