//! Serving by passthrough: which files have a backing, which get one, and which open waits for it.
//!
//! The inode number says how a file is served, so the answer is given by LOOKUP. An OPEN that finds no backing under
//! the passthrough number, in time, is answered with ESTALE: the kernel then looks the name up again, hears the decode
//! number, and opens that; the caller notices nothing.

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
use crate::server::hydrate::Hydrator;
use crate::server::node::Lasting;
pub use crate::server::opening::Opening;
use crate::server::refusal::Refusal;
use crate::server::tree::Offer;

/// Files that are hydrated at the same time: a small one need not wait for a big one.
const AT_ONCE: usize = 2;

/// What did not fit is tried again after so long.
const RETRY: Duration = Duration::from_secs(10);

/// The making of a backing has ended within this time; it may wait for the store.
const LONGEST_END: Duration = Duration::from_secs(5);

/// So many files may be known before those without a backing are forgotten.
const MOST_STATES: usize = 4096;

#[derive(Debug)]
enum State {
    /// A backing is being made; opens wait until the deadline, if there is one.
    Filling { deadline: Option<Instant>, late: bool, waiting: Vec<Opening> },
    /// A backing is registered.
    Ready(Ready),
    /// There is none; the reason was given to the supervisor.
    Decode { since: Instant, retry: bool },
    /// It is being given up for others, unless it turns out to be in use; opens wait until that is known.
    Leaving { ready: Ready, waiting: Vec<(Arc<Template>, usize, Opening)> },
}

/// A registered backing.
#[derive(Debug)]
struct Ready {
    /// Its id on the connection.
    id: u32,
    /// The file. The kernel has it too; here it is for a supervisor that takes the place of a dead one.
    _file: OwnedFd,
}

/// A backing that is to be made.
pub struct Job {
    template: Arc<Template>,
    file: usize,
    key: FileKey,
}

/// The backings of one server.
#[derive(Debug)]
pub struct Passthrough {
    mode: ServeMode,
    timeout: Duration,
    possible: bool,
    hydrator: Hydrator,
    states: Mutex<HashMap<FileKey, State>>,
    jobs: Mutex<mpsc::Sender<Job>>,
    deadlines: Condvar,
    /// As many opens wait as can; true until a backing is finished.
    crowded: AtomicBool,
    stats: Stats,
}

fn key(template: &Template, file: usize) -> FileKey {
    let name = template.files().get(file).map_or("", |f| f.name.as_str());
    FileKey { digest: *template.digest(), file: name.to_owned() }
}

impl Passthrough {
    /// Serves so, with the backings that are ready already.
    pub fn new(
        mode: ServeMode,
        timeout: Duration,
        hydrator: Hydrator,
        ready: Vec<(FileKey, u32, OwnedFd)>,
        stats: Stats,
    ) -> Arc<Passthrough> {
        let possible = !matches!(hydrator.cache(), Cache::Nowhere(_));
        let state = |(key, id, file)| (key, State::Ready(Ready { id, _file: file }));
        let states = ready.into_iter().map(state).collect();
        let (sender, receiver) = mpsc::channel::<Job>();
        let ours = Arc::new(Passthrough {
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
        for _ in 0..AT_ONCE {
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

    /// Files that the server before served by decode, for their backing was late or failed: whoever was told to look up
    /// the name again must not be told so once more. Gives what is to be made now.
    pub fn know_late(&self, late: Vec<(Option<Arc<Template>>, FileKey)>) -> Vec<Job> {
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

    /// Makes these backings.
    pub fn begin(&self, jobs: Vec<Job>) {
        let sender = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.into_iter().for_each(|job| drop(sender.send(job)));
    }

    fn states(&self) -> MutexGuard<'_, HashMap<FileKey, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an open of the passthrough number of a file, now or when its backing is there.
    pub fn open(&self, template: &Arc<Template>, file: usize, mut opening: Opening) {
        let key = key(template, file);
        let mut states = self.states();
        match states.get_mut(&key) {
            Some(State::Ready(ready)) => {
                self.stats.count(Counter::OpensPassthrough);
                opening.passthrough(ready.id);
            }
            Some(State::Filling { late: false, waiting, .. }) if opening.park() => waiting.push(opening),
            Some(State::Leaving { waiting, .. }) if opening.park() => {
                waiting.push((Arc::clone(template), file, opening));
            }
            Some(State::Filling { late: false, .. } | State::Leaving { .. }) => self.refuse_crowd(opening),
            Some(State::Filling { .. } | State::Decode { .. }) => opening.refuse(Refusal::Stale),
            None if !self.possible => {
                let refusal = if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Failed };
                opening.refuse(refusal);
            }
            None if !opening.park() => self.refuse_crowd(opening),
            None => {
                let deadline = match self.mode {
                    ServeMode::Auto => Instant::now().checked_add(self.timeout),
                    ServeMode::Passthrough | ServeMode::Decode => None,
                };
                if states.len() >= MOST_STATES {
                    // Those without a backing are tried anew at their next open.
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

    /// Answers an open that cannot wait: as if its time were up.
    fn refuse_crowd(&self, opening: Opening) {
        if !self.crowded.swap(true, Ordering::Relaxed) {
            log::warn!("{PARKED_SLOTS} opens wait for backings: further ones do not wait");
        }
        opening.refuse(if self.mode == ServeMode::Auto { Refusal::Stale } else { Refusal::Crowded });
    }

    fn run(&self, job: &Job) {
        self.stats.count(Counter::HydrationsStarted);
        log::info!("hydrating template {} file {}", job.key.digest, job.key.file);
        let begun = Instant::now();
        // Told before the look: a deadline that passes later tells the reason later.
        self.note_reason(&job.key, None);
        if matches!(self.states().get(&job.key), Some(State::Filling { late: true, .. })) {
            self.note_reason(&job.key, Some(self.lateness()));
        }
        let made = self.hydrator.hydrate(&job.template, job.file, &job.key, |keys| self.evict(keys));
        let (state, answer): (Option<State>, _) = match made {
            Ok((id, file)) => {
                self.stats.count(Counter::HydrationsDone);
                log::info!(
                    "template {} file {} is served by passthrough after {:.2} s",
                    job.key.digest,
                    job.key.file,
                    begun.elapsed().as_secs_f64()
                );
                (Some(State::Ready(Ready { id, _file: file })), Ok(id))
            }
            Err(_) if self.hydrator.condemned().holds(&job.key.digest) => {
                let _ = self.hydrator.link().call(&ServerRequest::Abandon { key: job.key.clone() }, None);
                (None, Err(Refusal::NoEntry))
            }
            Err(error) => {
                self.stats.count(Counter::HydrationsFailed);
                log::warn!("template {} file {} gets no backing: {error}", job.key.digest, job.key.file);
                self.note_reason(&job.key, Some(error.to_string()));
                let _ = self.hydrator.link().call(&ServerRequest::Abandon { key: job.key.clone() }, None);
                match self.mode {
                    ServeMode::Auto => {
                        let state = State::Decode { since: Instant::now(), retry: may_pass(&error) };
                        (Some(state), Err(Refusal::Stale))
                    }
                    // The next open tries again; nobody is served otherwise.
                    ServeMode::Passthrough | ServeMode::Decode => (None, Err(for_opener(&error))),
                }
            }
        };
        let _looking = self.hydrator.condemned().look();
        // What was condemned meanwhile has a backing, and nobody gets it.
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
                    opening.passthrough(id);
                }
                Err(refusal) => opening.refuse(refusal),
            }
        }
    }

    /// Stops handing out those backings, and has the supervisor close the unused ones.
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
                    log::info!("template {} file {} lost its backing: nobody used it", key.digest, key.file);
                } else {
                    states.insert(key, State::Ready(ready));
                }
            }
        }
        for (template, file, opening) in opens {
            let condemned = self.hydrator.condemned();
            let _looking = condemned.look();
            if condemned.holds(template.digest()) {
                opening.refuse(Refusal::NoEntry);
            } else {
                condemned.opened(template.digest());
                self.open(&template, file, opening);
            }
        }
        closed.map(|_| ())
    }

    /// Ends what is under way for condemned templates, and forgets what is removed: opens that wait are refused, and the
    /// makers of backings give up at their next piece.
    pub fn end_condemned(&self) {
        let condemned = self.hydrator.condemned();
        let until = Instant::now() + LONGEST_END;
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
            refused.into_iter().for_each(|opening: Opening| opening.refuse(Refusal::NoEntry));
            if !filling || Instant::now() > until {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives up the backings of templates that the store has no more, where nobody uses them: a removal that was killed
    /// has not told of them.
    pub fn give_up_vanished(&self, store: &Store) {
        let ready = |(key, state): (&FileKey, &State)| matches!(state, State::Ready(_)).then(|| key.clone());
        let mut keys: Vec<FileKey> = self.states().iter().filter_map(ready).collect();
        let condemned = self.hydrator.condemned();
        keys.retain(|key| !condemned.holds(&key.digest) && matches!(store.find(&key.digest), Ok(false)));
        for keys in keys.chunks(MAX_KEYS) {
            if let Err(error) = self.evict(keys.to_vec()) {
                log::warn!("the backings of templates that are gone stay for now: {error}");
            }
        }
    }

    fn note_reason(&self, key: &FileKey, why: Option<String>) {
        let _ = self.hydrator.link().call(&ServerRequest::NoBacking { key: key.clone(), reason: why }, None);
    }

    fn lateness(&self) -> String {
        let waited = self.timeout.as_secs_f64();
        format!("its backing is still being filled; the first open waited {waited} s for it")
    }

    /// Answers opens whose time is up.
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
                    self.note_reason(&key, Some(why));
                }
                // Only now: should this server die, its successor knows it, and answers the next look-up so.
                refused.into_iter().for_each(|opening: Opening| opening.refuse(Refusal::Stale));
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

/// True for what may be over when it is tried again: no room, or a folder that is away, the store's or the cache's.
fn may_pass(error: &Error) -> bool {
    const PASSING: [i32; 7] =
        [libc::ENOSPC, libc::EDQUOT, libc::ENOENT, libc::EACCES, libc::EROFS, libc::EIO, libc::ESTALE];
    matches!(error.code(), Code::TryAgain | Code::NotFound)
        || error.errno().is_some_and(|errno| PASSING.contains(&errno))
}

/// What an opener is told where nothing but passthrough is allowed.
fn for_opener(error: &Error) -> Refusal {
    match (error.code(), error.errno()) {
        // The store is away: there is a system's error beneath, other than where room is missing.
        (Code::TryAgain, Some(_)) => Refusal::Away,
        (Code::TryAgain, None) | (_, Some(libc::ENOSPC | libc::EDQUOT)) => Refusal::NoSpace,
        (Code::Damage, _) => Refusal::Damaged,
        _ => Refusal::Failed,
    }
}

impl Offer for Passthrough {
    fn offer(&self, template: &Template, file: usize) -> Serving {
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
            Some(State::Decode { since, retry: true }) if since.elapsed() > RETRY => {
                states.remove(&key);
                Serving::Passthrough
            }
            Some(State::Filling { .. } | State::Decode { .. }) => Serving::Decode,
        }
    }

    fn lasting(&self, template: &Template, file: usize) -> Lasting {
        match (self.mode, self.possible) {
            // A later open may be promoted.
            (ServeMode::Auto, true) if self.offer(template, file) == Serving::Decode => Lasting::Not,
            _ => Lasting::Long,
        }
    }
}
