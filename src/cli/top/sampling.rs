//! Runs measurements on a separate thread, and replaces a thread that does not return.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::keys::Key;
use crate::clones::accounting::sampler::{Sample, Sampler};
use crate::clones::find::Inspections;
use crate::control::Mount;
use crate::error::Result;
use crate::sys::process::{ProcessId, threads};

/// Least time after which a sample is stuck. A process can block the measurement after it was found.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Maximum number of threads, with those that are stuck.
const MAX_THREADS: usize = 8;

/// Share of one processor that samples may take on average. A longer sample delays the next one.
const MAX_PERCENT: u32 = 30;

/// What the command waits for.
pub enum Event {
    /// A key was pressed.
    Key(Key),
    /// The size of the terminal has changed.
    Resized,
    /// A signal ends the command.
    Ended,
    /// A sample of the thread with this number.
    Sampled(u32, Box<Result<Sample>>),
}

/// The clones whose pages are shown.
pub type Shown = HashSet<ProcessId>;

type Mounts = Arc<dyn Fn() -> Result<Vec<Mount>> + Send + Sync>;

/// Takes samples on request, at most one at a time.
pub struct Sampling {
    mounts: Mounts,
    events: Sender<Event>,
    inspections: Inspections,
    interval: Duration,
    /// Held by each thread that has not ended.
    running: Arc<()>,
    /// Number of the present thread. Samples of earlier ones are ignored.
    number: u32,
    requests: Sender<Shown>,
    /// A sample that takes longer is stuck. Grows with the time that samples take.
    stuck_after: Duration,
    /// Number of threads that were replaced since the last sample.
    replaced: u32,
    /// Time of the request that has no sample yet, and CPU time of this process until then.
    requested: Option<(Instant, Duration)>,
    due: Instant,
}

impl Sampling {
    /// Starts the thread. Samples are sent to `events`.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be started.
    pub fn start(
        mounts: impl Fn() -> Result<Vec<Mount>> + Send + Sync + 'static,
        interval: Duration,
        events: Sender<Event>,
    ) -> Result<Sampling> {
        let mut sampling = Sampling {
            mounts: Arc::new(mounts),
            events,
            inspections: Inspections::default(),
            interval,
            running: Arc::default(),
            number: 0,
            requests: mpsc::channel().0,
            stuck_after: STUCK_AFTER,
            replaced: 0,
            requested: None,
            due: Instant::now(),
        };
        sampling.start_thread()?;
        Ok(sampling)
    }

    fn start_thread(&mut self) -> Result<()> {
        self.number += 1;
        let (requests, inbox) = mpsc::channel::<Shown>();
        let (mounts, events, number) = (Arc::clone(&self.mounts), self.events.clone(), self.number);
        let (mut sampler, running) = (Sampler::new(self.inspections.clone()), Arc::clone(&self.running));
        threads::start(move || {
            while let Ok(shown) = inbox.recv() {
                let sample = mounts().and_then(|mounts| sampler.sample(&mounts, &shown));
                if events.send(Event::Sampled(number, Box::new(sample))).is_err() {
                    break;
                }
            }
            drop(running);
        })?;
        self.requests = requests;
        Ok(())
    }

    /// Requests a sample if one is due, and replaces a thread that is stuck. Returns the time until the next call.
    ///
    /// # Errors
    /// Returns an error if another thread cannot be started.
    pub fn poll(&mut self, shown: impl FnOnce() -> Shown) -> Result<Duration> {
        if let Some((at, _)) = self.requested {
            let left = self.stuck_after.saturating_sub(at.elapsed());
            if !left.is_zero() || Arc::strong_count(&self.running) > MAX_THREADS {
                return Ok(left.max(Duration::from_millis(100)));
            }
            self.start_thread()?;
            // The sample may be slow instead.
            self.stuck_after *= 2;
            self.replaced += 1;
            self.requested = None;
            self.due = Instant::now();
        }
        let left = self.due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Ok(left);
        }
        // The thread has ended only after a panic: the command ends, or replaces the thread as one that is stuck.
        let _ = self.requests.send(shown());
        self.requested = Some((Instant::now(), cpu_time()));
        Ok(self.stuck_after)
    }

    /// Returns a sample, unless a thread that was replaced has sent it.
    pub fn accept(&mut self, number: u32, sample: Result<Sample>) -> Option<Result<Sample>> {
        if number != self.number {
            return None;
        }
        let (at, before) = self.requested.take()?;
        self.stuck_after = STUCK_AFTER.max(4 * at.elapsed());
        self.replaced = 0;
        self.due = at + pause(self.interval, cpu_time().saturating_sub(before));
        Some(sample)
    }

    /// Returns the number of threads that were replaced since the last sample.
    pub fn replaced(&self) -> u32 {
        self.replaced
    }

    /// Returns the time since a request that has no sample yet.
    pub fn waits(&self) -> Option<Duration> {
        self.requested.map(|(at, _)| at.elapsed())
    }
}

/// Returns the time from the beginning of a sample that took this CPU time until the next one.
fn pause(interval: Duration, cpu_time: Duration) -> Duration {
    interval.max(cpu_time * 100 / MAX_PERCENT)
}

/// Returns the CPU time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn samples_take_a_limited_share_of_a_processor() {
        assert_eq!(pause(SECOND, SECOND / 4), SECOND);
        assert_eq!(pause(SECOND, 3 * SECOND), 10 * SECOND);
        assert_eq!(pause(Duration::ZERO, 3 * SECOND / 10), SECOND);
    }

    #[test]
    fn a_stuck_thread_is_replaced_and_its_sample_ignored() {
        let (events, inbox) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        let gate = std::sync::Mutex::new(gate);
        let calls = std::sync::atomic::AtomicU32::new(0);
        let mounts = move || {
            if calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 {
                let _ = gate.lock().unwrap().recv();
            }
            Err(Error::failed("no mounts"))
        };
        let mut sampling = Sampling::start(mounts, SECOND, events).unwrap();
        sampling.poll(Shown::default).unwrap();
        assert!(sampling.waits().is_some());
        // As if the request were old.
        sampling.requested = sampling.requested.map(|(at, cpu)| (at - 2 * STUCK_AFTER, cpu));
        sampling.poll(Shown::default).unwrap();
        assert_eq!((sampling.replaced(), sampling.stuck_after), (1, 2 * STUCK_AFTER));
        // The next sample takes longer than STUCK_AFTER, and is waited for.
        sampling.requested = sampling.requested.map(|(at, cpu)| (at - 3 * STUCK_AFTER / 2, cpu));
        sampling.poll(Shown::default).unwrap();
        assert_eq!(sampling.replaced(), 1);
        let Event::Sampled(number, sample) = inbox.recv().unwrap() else { panic!() };
        let sample = sampling.accept(number, *sample).expect("the sample of the second thread");
        assert_eq!(sample.unwrap_err().message(), "no mounts");
        assert!(sampling.waits().is_none());
        assert!(sampling.replaced() == 0 && sampling.stuck_after >= 6 * STUCK_AFTER);
        drop(release);
        let Event::Sampled(number, sample) = inbox.recv().unwrap() else { panic!() };
        assert!(sampling.accept(number, *sample).is_none());
    }
}
