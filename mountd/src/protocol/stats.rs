//! The counters: one list of names, one shared page of numbers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stencilfs::sys::memfd::SharedCounters;

macro_rules! counters {
    ($($name:ident $text:literal $about:literal,)*) => {
        /// What is counted. The numbers live as long as the supervisor.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Counter { $(#[doc = $about] $name,)* }

        impl Counter {
            const NAMES: &[(Counter, &str)] = &[$((Counter::$name, $text),)*];
        }
    };
}

counters! {
    Answers "answers" "Requests of the kernel that were answered.",
    Lookups "lookups" "Names looked up.",
    OpensPassthrough "opens_passthrough" "Files opened with a backing.",
    OpensDecode "opens_decode" "Files opened without one.",
    OpensRefused "opens_refused" "Writable opens, refused.",
    WritesRefused "writes_refused" "Other calls that would change something, refused.",
    Reads "reads" "READ requests.",
    ReadBytes "read_bytes" "Bytes given to the kernel.",
    BlocksDecoded "blocks_decoded" "Blocks read from the store and verified.",
    BlocksZero "blocks_zero" "Blocks that are all zero: nothing to read.",
    BlocksCached "blocks_cached" "Blocks found decoded.",
    Damaged "damaged" "Requests that met damage and got EIO.",
    Failed "failed" "Requests that failed for another reason of ours.",
    HydrationsStarted "hydrations_started" "Backings begun.",
    HydrationsDone "hydrations_done" "Backings filled, frozen, verified and registered.",
    HydrationsFailed "hydrations_failed" "Backings given up.",
    HydratedBytes "hydrated_bytes" "Bytes of data written to backings.",
    WatchdogReplaced "watchdog_replaced" "Servers that left a request alone too long and were replaced.",
    SlowSource "slow_source" "Times that the store was away for longer than the watchdog's limit.",
    Evictions "evictions" "Backings without clones that made room for others.",
    SourceOutages "source_outages" "Times that the store could not be reached.",
    SourceWaits "source_waits" "READs that waited for the store.",
}

/// Handle to the page of counters.
#[derive(Debug, Clone)]
pub struct Stats(Arc<SharedCounters>);

impl Stats {
    /// Counts in that page.
    pub fn new(page: SharedCounters) -> Stats {
        Stats(Arc::new(page))
    }

    /// The page, to hand it on.
    pub fn page(&self) -> &SharedCounters {
        &self.0
    }

    /// One more.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// So many more.
    pub fn add(&self, counter: Counter, n: u64) {
        self.0.all()[counter as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.all()[counter as usize].load(Ordering::Relaxed)
    }

    /// All of them by name.
    pub fn all(&self) -> BTreeMap<String, u64> {
        Counter::NAMES.iter().map(|&(counter, name)| (name.to_owned(), self.get(counter))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_own_place_and_name() {
        let stats = Stats::new(SharedCounters::create().unwrap());
        for (i, &(counter, _)) in Counter::NAMES.iter().enumerate() {
            stats.add(counter, i as u64 + 1);
        }
        let all = stats.all();
        assert_eq!(all.len(), Counter::NAMES.len());
        assert!(all.len() <= SharedCounters::COUNT);
        for (i, (_, name)) in Counter::NAMES.iter().enumerate() {
            assert_eq!(all[*name], i as u64 + 1, "{name}");
        }
    }
}
