//! Counters and latency histograms: lists of names, and a shared page of numbers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stencilfs::control::Latency;
use stencilfs::sys::memory::memfd::SharedCounters;

macro_rules! counters {
    ($($name:ident $text:literal $about:literal,)*) => {
        /// A counter. Its value persists until the end of the mount, across restarts of servers and supervisors.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Counter { $(#[doc = $about] $name,)* }

        impl Counter {
            const NAMES: &[(Counter, &str)] = &[$((Counter::$name, $text),)*];
        }
    };
}

counters! {
    Answers "answers" "Requests of the kernel that were answered.",
    Lookups "lookups" "Lookups.",
    OpensPassthrough "opens_passthrough" "Opens that were answered with a backing.",
    OpensDecode "opens_decode" "Opens that are served by decode.",
    OpensRefused "opens_refused" "Opens for writing, which are refused.",
    WritesRefused "writes_refused" "Other modifying requests, which are refused.",
    Reads "reads" "READ requests.",
    ReadBytes "read_bytes" "Bytes sent in replies to READs.",
    BlocksDecoded "blocks_decoded" "Blocks read from the store and verified.",
    BlocksZero "blocks_zero" "Blocks of zeros, which are not read from the store.",
    BlocksCached "blocks_cached" "Blocks found in the cache of decompressed blocks.",
    Damaged "damaged" "Requests that failed with EIO because of damage.",
    Failed "failed" "Requests that failed for other reasons in the server.",
    HydrationsStarted "hydrations_started" "Hydrations that were started.",
    HydrationsDone "hydrations_done" "Backings that were filled, frozen, verified and registered.",
    HydrationsFailed "hydrations_failed" "Hydrations that failed.",
    HydratedBytes "hydrated_bytes" "Bytes of data written to backings.",
    WatchdogReplaced "watchdog_replaced" "Servers that the watchdog replaced.",
    SlowSource "slow_source" "Store outages longer than the watchdog's limit.",
    Evictions "evictions" "Unused backings that were evicted.",
    SourceOutages "source_outages" "Store outages.",
    SourceWaits "source_waits" "READs that waited for the store.",
    ScrubsDone "scrubs_done" "Files whose blocks the scrub has verified again.",
    ScrubsDamaged "scrubs_damaged" "Files in which the scrub has found damage.",
    ScrubbedBytes "scrubbed_bytes" "Bytes that the scrub has verified again.",
}

/// An operation whose duration is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timed {
    /// READ requests. A page that a backing serves causes no READ.
    Read,
    /// OPEN requests, which may wait for a hydration.
    Open,
}

impl Timed {
    const NAMES: [(Timed, &str); 2] = [(Timed::Read, "read"), (Timed::Open, "open")];
}

/// Upper bounds of the buckets of a latency histogram, in microseconds.
const BOUNDS: [u64; 16] = [
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000,
    10_000_000, 30_000_000,
];

/// Word of the counters page at which the histograms begin. All servers and supervisors of a mount agree on it.
const HISTOGRAMS: usize = 256;

/// Words of a histogram: a bucket for each bound, one for longer durations, and the sum in nanoseconds.
const HISTOGRAM_WORDS: usize = BOUNDS.len() + 2;

const _: () = assert!(Counter::NAMES.len() <= HISTOGRAMS);
const _: () = assert!(HISTOGRAMS + Timed::NAMES.len() * HISTOGRAM_WORDS <= SharedCounters::COUNT);

/// The values of the page at one moment.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Counters, by name.
    pub counters: BTreeMap<String, u64>,
    /// Histograms, by operation.
    pub latencies: BTreeMap<String, Latency>,
}

/// A shared reference to the counters page.
#[derive(Debug, Clone)]
pub struct Stats(Arc<SharedCounters>);

impl Stats {
    /// Creates a reference to the counters in `page`.
    pub fn new(page: SharedCounters) -> Stats {
        Stats(Arc::new(page))
    }

    /// Returns the page, to pass it to another process.
    pub fn page(&self) -> &SharedCounters {
        &self.0
    }

    /// Adds 1 to a counter.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds `n` to a counter.
    pub fn add(&self, counter: Counter, n: u64) {
        self.0.all()[counter as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Returns the value of a counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.all()[counter as usize].load(Ordering::Relaxed)
    }

    /// Adds a request with this duration to a histogram: two additions to words of the page.
    pub fn time(&self, timed: Timed, duration: Duration) {
        let words = self.histogram(timed);
        let bucket = BOUNDS.partition_point(|bound| Duration::from_micros(*bound) < duration);
        words[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        words[HISTOGRAM_WORDS - 1].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    fn histogram(&self, timed: Timed) -> &[AtomicU64] {
        let start = HISTOGRAMS + timed as usize * HISTOGRAM_WORDS;
        &self.0.all()[start..start + HISTOGRAM_WORDS]
    }

    fn latency(&self, timed: Timed) -> Latency {
        let (counts, sum) = self.histogram(timed).split_at(HISTOGRAM_WORDS - 1);
        Latency {
            bounds_seconds: BOUNDS.iter().map(|bound| Duration::from_micros(*bound).as_secs_f64()).collect(),
            counts: counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum_seconds: Duration::from_nanos(sum[0].load(Ordering::Relaxed)).as_secs_f64(),
        }
    }

    /// Returns all values by name.
    pub fn figures(&self) -> Figures {
        let counters = Counter::NAMES.iter().map(|&(counter, name)| (name.to_owned(), self.get(counter)));
        let latencies = Timed::NAMES.iter().map(|&(timed, name)| (name.to_owned(), self.latency(timed)));
        Figures { counters: counters.collect(), latencies: latencies.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_its_own_slot_and_name() {
        let stats = Stats::new(SharedCounters::create().unwrap());
        for (i, &(counter, _)) in Counter::NAMES.iter().enumerate() {
            stats.add(counter, i as u64 + 1);
        }
        let all = stats.figures().counters;
        assert_eq!(all.len(), Counter::NAMES.len());
        for (i, (_, name)) in Counter::NAMES.iter().enumerate() {
            assert_eq!(all[*name], i as u64 + 1, "{name}");
        }
    }
    #[test]
    fn each_duration_is_in_the_bucket_of_the_next_bound() {
        let stats = Stats::new(SharedCounters::create().unwrap());
        let micros = Duration::from_micros;
        for duration in [Duration::ZERO, micros(50), micros(51), micros(30_000_000), micros(30_000_001)] {
            stats.time(Timed::Open, duration);
        }
        stats.time(Timed::Read, micros(3000));
        let Figures { latencies, counters } = stats.figures();
        let (open, read) = (&latencies["open"], &latencies["read"]);
        assert_eq!(open.bounds_seconds.len() + 1, open.counts.len());
        let mut expected = vec![0; open.counts.len()];
        (expected[0], expected[1], expected[15], expected[16]) = (2, 1, 1, 1);
        assert_eq!(open.counts, expected);
        assert!((open.sum_seconds - 60.000_102).abs() < 1e-9, "{open:?}");
        assert_eq!((read.counts.iter().sum::<u64>(), read.counts[6]), (1, 1), "{read:?}");
        assert!(counters.values().all(|count| *count == 0), "{counters:?}");
    }
}
