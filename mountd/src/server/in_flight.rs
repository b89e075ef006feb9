//! The server's side of the in-flight table: a thread that has read a request holds a [`Flight`] until the reply.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use stencilfs::control::{InFlightTable, Op, Phase, RequestInfo, THREAD_SLOTS};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::times;

use crate::protocol::stats::{Counter, Stats, Timed};

/// Number of threads that have a slot. Threads of fuser live as long as the process.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SLOT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The in-flight table of this server.
#[derive(Debug)]
pub struct Flights {
    table: InFlightTable,
    /// Parking slot at which the search for the next free slot starts.
    next: AtomicUsize,
    stats: Stats,
}

impl Flights {
    /// Creates an empty table. The table is leaked, as requests may be pending until the process exits.
    ///
    /// # Errors
    /// Returns an error if the memory file cannot be created.
    pub fn create(stats: Stats) -> Result<&'static Flights> {
        let table = InFlightTable::create()
            .map_err(|e| Error::failed("cannot create the in-flight table").because(e))?;
        Ok(Box::leak(Box::new(Flights { table, next: AtomicUsize::new(0), stats })))
    }

    /// Returns the table, to pass it to another process.
    pub fn table(&self) -> &InFlightTable {
        &self.table
    }

    /// Enters a request that this thread has read.
    pub fn enter(&'static self, request: RequestInfo) -> Flight {
        let thread = SLOT.get().unwrap_or_else(|| {
            let thread = THREADS.fetch_add(1, Ordering::Relaxed);
            debug_assert!(thread < THREAD_SLOTS, "more threads than slots");
            SLOT.set(Some(thread));
            thread
        });
        self.table.enter(thread, &request);
        Flight { flights: self, request, place: Place::Thread(thread), arrived: times::since_boot() }
    }
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Thread(usize),
    Parked(usize),
}

/// A pending request. Dropping the value removes the request from the table and counts it as answered, so it must be
/// dropped after the reply.
#[derive(Debug)]
pub struct Flight {
    flights: &'static Flights,
    request: RequestInfo,
    place: Place,
    /// Time since boot.
    arrived: Duration,
}

impl Flight {
    /// Records the phase of the request, with a time stamp. Writes one word, and allocates nothing.
    pub fn stamp(&self, phase: Phase) {
        match self.place {
            Place::Thread(thread) => self.flights.table.stamp(thread, phase),
            Place::Parked(number) => self.flights.table.unpark(number, Some(phase)),
        }
    }

    /// Records that the reply is about to be sent.
    pub fn replying(&self) {
        self.stamp(Phase::Replying);
    }

    /// Returns the request.
    pub fn request(&self) -> &RequestInfo {
        &self.request
    }

    /// Returns when this server read the request, in time since boot.
    pub fn arrived(&self) -> Duration {
        self.arrived
    }

    /// Moves the request from the thread's slot to a parking slot. Returns false if no parking slot is free.
    pub fn park(&mut self, phase: Phase) -> bool {
        let Place::Thread(thread) = self.place else {
            self.stamp(phase);
            return true;
        };
        let from = self.flights.next.fetch_add(1, Ordering::Relaxed);
        let Some(number) = self.flights.table.park(from, &self.request, phase) else { return false };
        self.flights.table.clear(thread);
        self.place = Place::Parked(number);
        true
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        match self.place {
            Place::Thread(thread) => self.flights.table.clear(thread),
            Place::Parked(number) => self.flights.table.unpark(number, None),
        }
        let stats = &self.flights.stats;
        stats.count(Counter::Answers);
        let timed = match self.request.op {
            Op::Read => Timed::Read,
            Op::Open => Timed::Open,
            _ => return,
        };
        stats.time(timed, times::since_boot().saturating_sub(self.arrived));
    }
}
