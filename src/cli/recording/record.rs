//! `stencil record`: appends samples of the memory of all clones to a file.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::output::{Done, Report, print_error, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::cli::{Global, interrupt, value_parsers};
use crate::clones::counted;
use crate::clones::recording::{Measuring, Recorder, Sample};
use crate::control;
use crate::error::{Code, Error, Result};
use crate::sanitize::{self, path_text, sanitize};
use crate::sys::process::threads;
use crate::units::Bytes;

/// Longest time until a signal ends a wait.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Record the memory of all clones over time, for 'stencil report'
///
/// Each sample is a measurement like that of 'stencil density'. SIGINT and SIGTERM end the recording. A recording can be
/// continued: samples are appended to an existing file.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil record web.rec
  stencil record web.rec --interval 1s --count 60
  stencil record web.rec --for 3600 --max-size 16MiB")]
pub struct RecordArgs {
    /// The recording. Samples are appended to an existing one
    file: PathBuf,
    /// Seconds from one sample to the next
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = value_parsers::seconds)]
    interval: Duration,
    /// End after this number of measurements
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time
    #[arg(long = "for", value_name = "SECONDS", value_parser = value_parsers::seconds)]
    duration: Option<Duration>,
    /// Maximum size of the file. A full file is thinned out and keeps its first sample
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = value_parsers::size)]
    max_size: Bytes,
    /// Record why clones take more memory than they need, with each sample. Reads the copied pages of all clones
    #[arg(long)]
    why: bool,
}

#[derive(Debug, Serialize)]
struct Recorded {
    #[serde(serialize_with = "sanitize::path")]
    file: PathBuf,
    /// Samples of this run.
    samples: u64,
    /// Measurements of this run that failed.
    failed: u64,
    /// Clones in the last sample.
    clones: u64,
    file_samples: usize,
    file_bytes: Bytes,
}

/// Records until the limit or a signal.
///
/// # Errors
/// Returns an error if the first sample cannot be measured or written. A later sample that cannot is reported on standard
/// error, and the next one follows, unless the file was moved or no longer has room for a sample.
pub fn run(args: &RecordArgs, global: &Global) -> Result<Done> {
    if args.interval.is_zero() {
        return Err(Error::usage("--interval must be longer than 0")
            .hint("set a number of seconds, for example --interval 0.5"));
    }
    let filter = StoreFilter::of(global)?;
    let stop = interrupt::flag()?;
    let (mut measuring, with_reasons) = (Measuring::new()?, args.why);
    let sample = move || -> Result<Sample> {
        let mut mounts = control::mounts_and_dead()?;
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
        measuring.sample(&mounts, with_reasons)
    };
    let measure = on_a_thread(sample, &stop)?;
    // A recording without any sample is of no use, so the file is created after the first measurement.
    let Some(first) = measure() else {
        return Err(Error::failed("interrupted before the first sample").hint("run the command again"));
    };
    let first = first?;
    let mut recorder = Recorder::open(&args.file, args.max_size)?;
    recorder.append(&first)?;
    let (mut samples, mut failed, mut clones) = (1, 0, first.totals.clones);
    let began = Instant::now();
    let mut next = began;
    while args.count.is_none_or(|count| samples + failed < count) {
        next = following(next, args.interval, Instant::now());
        if args.duration.is_some_and(|limit| next.duration_since(began) > limit) || !wait_until(next, &stop) {
            break;
        }
        let Some(sample) = measure() else { break };
        match sample.and_then(|sample| recorder.append(&sample).map(|()| sample)) {
            Ok(sample) => {
                samples += 1;
                clones = sample.totals.clones;
            }
            Err(error) if error.code() == Code::Usage || !recorder.is_in_place() => return Err(error),
            Err(error) => {
                failed += 1;
                print_error("no sample: ", &error);
            }
        }
    }
    Ok(Done::report(Recorded {
        file: args.file.clone(),
        samples,
        failed,
        clones,
        file_samples: recorder.samples(),
        file_bytes: recorder.length(),
    }))
}

/// Starts a thread that takes samples. Returns a function that waits for the next one, or returns `None` after a signal: a
/// server may not answer.
fn on_a_thread(
    mut sample: impl FnMut() -> Result<Sample> + Send + 'static,
    stop: &AtomicBool,
) -> Result<impl Fn() -> Option<Result<Sample>>> {
    let ((requests, inbox), (sender, results)) = (mpsc::channel::<()>(), mpsc::channel());
    threads::start(move || while inbox.recv().is_ok() && sender.send(sample()).is_ok() {})?;
    Ok(move || {
        let _ = requests.send(());
        loop {
            match results.recv_timeout(POLL_INTERVAL) {
                Ok(sample) => return Some(sample),
                Err(RecvTimeoutError::Disconnected) => {
                    return Some(Err(Error::failed("the thread of the measurement has ended")));
                }
                Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    })
}

/// Returns the time of the next measurement: whole intervals after `last`. Times that have passed are left out.
fn following(last: Instant, interval: Duration, now: Instant) -> Instant {
    let passed = now.saturating_duration_since(last).as_nanos() / interval.as_nanos().max(1);
    let intervals = u32::try_from(passed).unwrap_or(u32::MAX - 1) + 1;
    last.checked_add(interval.saturating_mul(intervals))
        .unwrap_or(now + interval.min(Duration::from_secs(1 << 32)))
}

/// Waits until this time. Returns false after a signal.
fn wait_until(time: Instant, stop: &AtomicBool) -> bool {
    loop {
        let left = time.saturating_duration_since(Instant::now());
        if stop.load(Ordering::Relaxed) || left.is_zero() {
            return !stop.load(Ordering::Relaxed);
        }
        thread::sleep(left.min(POLL_INTERVAL));
    }
}

impl Report for Recorded {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let (samples, clones) =
            (counted(self.samples, "sample", "samples"), counted(self.clones, "clone", "clones"));
        let file = path_text(&self.file);
        writeln!(out, "recorded {samples}, the last of {clones}, in {}", sanitize(&file))?;
        let all = counted(self.file_samples as u64, "sample", "samples");
        writeln!(out, "the file has {all} and {}", self.file_bytes)?;
        if self.failed > 0 {
            writeln!(out, "{} failed", counted(self.failed, "measurement", "measurements"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_that_took_too_long_are_left_out() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(following(start, second, start), start + second);
        assert_eq!(following(start, second, start + Duration::from_millis(999)), start + second);
        assert_eq!(following(start, second, start + Duration::from_millis(2500)), start + 3 * second);
        assert!(following(start, Duration::MAX, start) > start);
        assert!(following(start, Duration::from_nanos(1), start + 100 * second) > start + 4 * second);
    }

    #[test]
    fn a_signal_ends_a_measurement_that_does_not_return() {
        let (stop, (release, gate)) = (AtomicBool::new(false), mpsc::channel::<()>());
        let sample = move || gate.recv().map(|()| Sample::default()).map_err(|_| Error::failed("released"));
        let measure = on_a_thread(sample, &stop).unwrap();
        release.send(()).unwrap();
        assert!(measure().unwrap().is_ok());
        stop.store(true, Ordering::Relaxed);
        assert!(measure().is_none());
    }

    #[test]
    fn a_signal_ends_a_wait() {
        let stop = AtomicBool::new(true);
        assert!(!wait_until(Instant::now() + Duration::from_secs(3600), &stop));
        stop.store(false, Ordering::Relaxed);
        assert!(wait_until(Instant::now(), &stop));
    }
}
