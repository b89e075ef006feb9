//! Counters: a list of names, and a shared page of numbers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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

    /// Returns all values by name.
    pub fn all(&self) -> BTreeMap<String, u64> {
        Counter::NAMES.iter().map(|&(counter, name)| (name.to_owned(), self.get(counter))).collect()
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
        let all = stats.all();
        assert_eq!(all.len(), Counter::NAMES.len());
        assert!(all.len() <= SharedCounters::COUNT);
        for (i, (_, name)) in Counter::NAMES.iter().enumerate() {
            assert_eq!(all[*name], i as u64 + 1, "{name}");
        }
    }
}
