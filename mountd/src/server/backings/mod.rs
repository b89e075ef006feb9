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

/// Number of files that are hydrated at the same time, so that a small file need not wait for a large one.
const WORKERS: usize = 2;

/// Delay before a failed hydration is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Longest wait for a hydration of a condemned template to stop; it may be waiting for the store.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

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

/// A registered backing.
#[derive(Debug)]
struct Ready {
    /// The id on the FUSE connection.
    id: u32,
    /// The file. The kernel has a reference too; the descriptor is for a supervisor that takes over.
    _file: OwnedFd,
}

/// A request to the workers to make a backing.
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
    /// Creates the state with the registered backings `ready`, and starts the workers.
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

    /// Restores the states of files that the previous server served by decode because their backings were late or had
    /// failed: an open that was answered with ESTALE must not get ESTALE again. Returns the backings to make now.
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

    /// Answers an open of the passthrough inode number of a file, now or when the backing is registered.
    pub fn open(&self, template: &Arc<Template>, file: usize, mut opening: PendingOpen) {
        let key = key(template, file);
        let mut states = self.states();
        match states.get_mut(&key) {
            Some(State::Ready(ready)) => {
                self.stats.count(Counter::OpensPassthrough);
                opening.reply(Ok(Opened::Backing(ready.id)));
            }
            Some(State::Filling { late: false, waiting, .. }) if opening.park() => waiting.push(opening),
            Some(State::Evicting { waiting, .. }) if opening.park() => {
                waiting.push((Arc::clone(template), file, opening));
            }
            Some(State::Filling { late: false, .. } | State::Evicting { .. }) => self.refuse_crowded(opening),
            Some(State::Filling { .. } | State::Decode { .. }) => opening.reply(Err(Refusal::Stale)),
            None if !self.possible => {
                let refusal = if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Failed };
                opening.reply(Err(refusal));
            }
            None if !opening.park() => self.refuse_crowded(opening),
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

    /// Answers an open that cannot wait because all parking slots are taken, as if its deadline had passed.
    fn refuse_crowded(&self, opening: PendingOpen) {
        if !self.crowded.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{PARKED_SLOTS} opens are waiting for backings: further opens are served by decode or fail with EAGAIN"
            );
        }
        opening.reply(Err(if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Crowded }));
    }

    fn run(&self, job: &Job) {
        self.stats.count(Counter::HydrationsStarted);
        log::info!("hydrating template {} file {}", job.key.digest, job.key.file);
        let start = Instant::now();
        // Before the state is read: a deadline that passes later then reports its reason later too.
        self.report_reason(&job.key, None);
        if matches!(self.states().get(&job.key), Some(State::Filling { late: true, .. })) {
            self.report_reason(&job.key, Some(self.late_reason()));
        }
        let made = self.hydrator.hydrate(&job.template, job.file, &job.key, |keys| self.evict(keys));
        let (state, answer): (Option<State>, _) = match made {
            Ok((id, file)) => {
                self.stats.count(Counter::HydrationsDone);
                log::info!(
                    "the backing of template {} file {} is ready after {:.2} s",
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
                        let state = State::Decode { since: Instant::now(), retry: is_temporary(&error) };
                        (Some(state), Err(Refusal::Stale))
                    }
                    // The next open makes a new attempt, as the file cannot be served by decode.
                    ServeMode::Passthrough | ServeMode::Decode => (None, Err(open_refusal(&error))),
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

    /// Stops serving the given backings, and makes the supervisor close those that no process uses.
    fn evict(&self, keys: Vec<FileKey>) -> stencilfs::error::Result<()> {
        let mut evicting = Vec::new();
        {
            let mut states = self.states();
            for key in keys {
                match states.remove(&key) {
                    Some(State::Ready(ready)) => {
                        states.insert(key.clone(), State::Evicting { ready, waiting: Vec::new() });
                        evicting.push(key);
                    }
                    Some(other) => drop(states.insert(key, other)),
                    None => {}
                }
            }
        }
        let closed = self.hydrator.evict(evicting.clone());
        let evicted: &[FileKey] = closed.as_deref().unwrap_or(&[]);
        let mut opens = Vec::new();
        {
            let mut states = self.states();
            for key in evicting {
                let Some(State::Evicting { ready, waiting }) = states.remove(&key) else { continue };
                opens.extend(waiting);
                if evicted.contains(&key) {
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
    /// piece. Drops the states of removed templates.
    pub fn stop_condemned(&self) {
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
                    State::Evicting { waiting, .. } => {
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

    /// Evicts the unused backings of templates that the store no longer has. Such backings are left over if a removal
    /// was killed before it released the templates.
    pub fn evict_vanished(&self, store: &Store) {
        let ready = |(key, state): (&FileKey, &State)| matches!(state, State::Ready(_)).then(|| key.clone());
        let mut keys: Vec<FileKey> = self.states().iter().filter_map(ready).collect();
        let condemned = self.hydrator.condemned();
        keys.retain(|key| !condemned.holds(&key.digest) && matches!(store.find(&key.digest), Ok(false)));
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("cannot evict backings of removed templates: {error}");
            }
        }
    }

    fn report_reason(&self, key: &FileKey, why: Option<String>) {
        let _ =
            self.hydrator.link().request(&ServerRequest::NoBacking { key: key.clone(), reason: why }, None);
    }

    fn late_reason(&self) -> String {
        let waited = self.timeout.as_secs_f64();
        format!("the backing is still being filled after the timeout of {waited} s")
    }

    /// Refuses opens whose deadline has passed.
    fn watch_deadlines(&self) {
        let mut states = self.states();
        loop {
            let now = Instant::now();
            let mut next: Option<Instant> = None;
            let (mut late_keys, mut refused) = (Vec::new(), Vec::new());
            for (key, state) in states.iter_mut() {
                if let State::Filling { deadline: Some(deadline), late, waiting } = state
                    && !*late
                {
                    if *deadline <= now {
                        *late = true;
                        refused.append(waiting);
                        late_keys.push(key.clone());
                    } else {
                        next = Some(next.map_or(*deadline, |n| n.min(*deadline)));
                    }
                }
            }
            if !late_keys.is_empty() {
                drop(states);
                for key in late_keys {
                    let why = self.late_reason();
                    log::warn!("template {} file {} is served by decode: {why}", key.digest, key.file);
                    self.report_reason(&key, Some(why));
                }
                // After the report: if this server dies, its successor reads the reason from the ledger and answers the
                // next lookup with the decode number.
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
            None | Some(State::Evicting { .. } | State::Filling { .. })
                if self.crowded.load(Ordering::Relaxed) =>
            {
                Serving::Decode
            }
            None | Some(State::Ready(_) | State::Evicting { .. } | State::Filling { late: false, .. }) => {
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
