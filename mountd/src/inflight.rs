//! The server's side of the table of requests in flight: who takes a request holds a [`Flight`] until it is answered.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use stencilfs::control::{RequestInfo, InFlightTable, Phase, THREAD_SLOTS};
use stencilfs::error::{Error, Result};

use crate::stats::{Counter, Stats};

/// Threads that took a slot so far. Those of fuser live as long as the process.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SLOT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The table of this server.
#[derive(Debug)]
pub struct Flights {
    table: InFlightTable,
    /// Where the next open that waits begins to seek a slot.
    next: AtomicUsize,
    stats: Stats,
}

impl Flights {
    /// An empty table. It is never given back: requests may be in flight until the process ends.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn begin(stats: Stats) -> Result<&'static Flights> {
        let table = InFlightTable::create()
            .map_err(|e| Error::failed("cannot make the table of requests in flight").because(e))?;
        Ok(Box::leak(Box::new(Flights { table, next: AtomicUsize::new(0), stats })))
    }

    /// The table, to hand it on.
    pub fn table(&self) -> &InFlightTable {
        &self.table
    }

    /// This thread has taken that request.
    pub fn take(&'static self, asked: RequestInfo) -> Flight {
        let thread = SLOT.get().unwrap_or_else(|| {
            let thread = THREADS.fetch_add(1, Ordering::Relaxed);
            debug_assert!(thread < THREAD_SLOTS, "more threads than slots");
            SLOT.set(Some(thread));
            thread
        });
        self.table.enter(thread, &asked);
        Flight { flights: self, asked, place: Place::Thread(thread) }
    }
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Thread(usize),
    Parked(usize),
}

/// A request that is not answered yet. Dropped, it leaves the table and counts as answered: drop it after the reply.
#[derive(Debug)]
pub struct Flight {
    flights: &'static Flights,
    asked: RequestInfo,
    place: Place,
}

impl Flight {
    /// Enters how far it is. Writes two words, and allocates nothing.
    pub fn stamp(&self, phase: Phase) {
        match self.place {
            Place::Thread(thread) => self.flights.table.stamp(thread, phase),
            Place::Parked(number) => self.flights.table.unpark(number, Some(phase)),
        }
    }

    /// The answer is about to be given.
    pub fn replying(&self) {
        self.stamp(Phase::Replying);
    }

    /// What is asked.
    pub fn asked(&self) -> &RequestInfo {
        &self.asked
    }

    /// Leaves the thread's slot: it waits, and holds up no thread. False where so many wait that there is no slot.
    pub fn park(&mut self, phase: Phase) -> bool {
        let Place::Thread(thread) = self.place else {
            self.stamp(phase);
            return true;
        };
        let from = self.flights.next.fetch_add(1, Ordering::Relaxed);
        let Some(number) = self.flights.table.park(from, &self.asked, phase) else { return false };
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
        self.flights.stats.count(Counter::Answers);
    }
}
