//! In-flight requests of a server: a table in shared memory that the server writes and other processes read.
//!
//! ```text
//!   word  0            1        2               3        4          5        6
//!   slot  stamp|state  unique   opcode|size     inode    offset     start    -        64 bytes, a cache line
//! ```
//! Each thread of the server has one slot, and is its only writer. The slots after these hold requests that wait
//! without a thread: opens that wait for a backing, READs that wait for the store. The first word publishes a slot: the
//! time of the last stamp, and the state. A reader accepts the other words only if the first word is the same before
//! and after the read; every change of a slot has a later stamp, so all words are of one request.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::sys::clock::monotonic as now;
use crate::sys::memory::memfd::SharedWords;

/// Name of the memory file, as `/proc/PID/fd` shows the link.
pub const INFLIGHT_NAME: &str = "stencil-inflight";

/// Slots for threads of the server.
pub const THREAD_SLOTS: usize = 63;

/// Slots for requests that wait without a thread (parked).
pub const PARKED_SLOTS: usize = 4096;

/// Words of a slot; the first slot is the header.
const WORDS: usize = 8;
const PAGES: usize = (1 + THREAD_SLOTS + PARKED_SLOTS) * WORDS * 8 / 4096;

/// First word of the table; another layout has another number.
const MAGIC: u64 = u64::from_le_bytes(*b"stencil\x01");

const STAMP: usize = 0;
const UNIQUE: usize = 1;
const OP_SIZE: usize = 2;
const INO: usize = 3;
const OFFSET: usize = 4;
const START: usize = 5;

const STATE_BITS: u32 = 3;
/// State of a slot that its owner is filling: readers skip the slot.
const CLAIMED: u64 = 7;

/// Attempts to read a slot that changes. A request that still changes is not stuck.
const READ_ATTEMPTS: usize = 8;

/// Progress of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Phase {
    /// A thread has read the request.
    Taken = 1,
    /// Blocks are read, decompressed and verified.
    Decoding = 2,
    /// The store cannot be reached; the read is retried.
    WaitingForStore = 3,
    /// The reply is written to the kernel.
    Replying = 4,
    /// The request waits for a backing or for the supervisor, and occupies no thread.
    Parked = 5,
}

impl Phase {
    fn of(word: u64) -> Option<Phase> {
        Some(match word & ((1 << STATE_BITS) - 1) {
            1 => Phase::Taken,
            2 => Phase::Decoding,
            3 => Phase::WaitingForStore,
            4 => Phase::Replying,
            5 => Phase::Parked,
            _ => return None,
        })
    }

    /// Returns the name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Taken => "taken",
            Phase::Decoding => "decoding",
            Phase::WaitingForStore => "waiting for the store",
            Phase::Replying => "replying",
            Phase::Parked => "parked",
        }
    }
}

macro_rules! ops {
    ($($op:ident $number:literal $name:literal,)*) => {
        /// Operation of a request, with the opcode of the FUSE protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Op { $(#[doc = $name] $op = $number,)* }

        /// Returns the FUSE protocol's name of an opcode.
        fn op_name(opcode: u32) -> &'static str {
            match opcode {
                $($number => $name,)*
                _ => "an unknown request",
            }
        }
    };
}

ops! {
    Lookup 1 "LOOKUP", GetAttr 3 "GETATTR", SetAttr 4 "SETATTR", ReadLink 5 "READLINK", Symlink 6 "SYMLINK",
    MkNod 8 "MKNOD", MkDir 9 "MKDIR", Unlink 10 "UNLINK", RmDir 11 "RMDIR", Rename 12 "RENAME", Link 13 "LINK",
    Open 14 "OPEN", Read 15 "READ", Write 16 "WRITE", StatFs 17 "STATFS", FSync 20 "FSYNC", SetXAttr 21 "SETXATTR",
    GetXAttr 22 "GETXATTR", ListXAttr 23 "LISTXATTR", RemoveXAttr 24 "REMOVEXATTR", Flush 25 "FLUSH",
    ReadDir 28 "READDIR", FSyncDir 30 "FSYNCDIR", Create 35 "CREATE", IoCtl 39 "IOCTL", FAllocate 43 "FALLOCATE",
    LSeek 46 "LSEEK", CopyFileRange 47 "COPY_FILE_RANGE",
}

/// A request, as a server enters it into the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestInfo {
    /// Number of the request on the connection (`unique` of the FUSE header).
    pub unique: u64,
    /// Operation.
    pub op: Op,
    /// Inode number.
    pub ino: u64,
    /// Start of a READ, in bytes.
    pub offset: u64,
    /// Length of a READ, in bytes.
    pub size: u32,
    /// The thread whose request this is; 0 if the kernel does not name a thread of this PID namespace. Not in the
    /// table.
    pub thread: u32,
}

/// A pending request, as read from the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// Number of the request on the connection (`unique` of the FUSE header).
    pub unique: u64,
    /// Opcode of the FUSE protocol.
    pub opcode: u32,
    /// Inode number.
    pub ino: u64,
    /// Start of a READ, in bytes.
    pub offset: u64,
    /// Length of a READ, in bytes.
    pub size: u32,
    /// Progress.
    pub phase: Phase,
    /// Time since the server read the request.
    pub age: Duration,
    /// Time since the last stamp. A server stamps a request again at each retry and at each block.
    pub still: Duration,
}

/// Formats as `READ of 131072 bytes at 4096 of inode 77, decoding, for 12.0 s`.
impl std::fmt::Display for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(op_name(self.opcode))?;
        if self.opcode == Op::Read as u32 {
            write!(f, " of {} bytes at {}", self.size, self.offset)?;
        }
        write!(f, " of inode {}, {}, for {:.1} s", self.ino, self.phase.name(), self.age.as_secs_f64())
    }
}

/// The table of pending requests.
#[derive(Debug)]
pub struct InFlightTable(SharedWords);

impl InFlightTable {
    /// Creates an empty table in a memory file, for the server.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create() -> io::Result<InFlightTable> {
        let words = SharedWords::create(INFLIGHT_NAME, PAGES)?;
        words.all()[0].store(MAGIC, Ordering::Release);
        Ok(InFlightTable(words))
    }

    /// Maps the table of another process for reading.
    ///
    /// # Errors
    /// Returns `InvalidInput` if the file is not such a table, and an error if a system call fails.
    pub fn map(fd: OwnedFd) -> io::Result<InFlightTable> {
        let words = SharedWords::watch(fd, PAGES)?;
        if words.all()[0].load(Ordering::Acquire) != MAGIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(InFlightTable(words))
    }

    /// Returns the descriptor of the memory file, to pass to another process.
    pub fn fd(&self) -> &OwnedFd {
        self.0.fd()
    }

    /// Iterates over all in-flight requests, and the parked ones. Does not allocate.
    pub fn requests(&self) -> impl Iterator<Item = InFlight> {
        let now = now();
        (0..THREAD_SLOTS + PARKED_SLOTS).filter_map(move |index| read(self.slot(index), now))
    }

    /// Returns the oldest request that is not parked: a parked request may wait.
    pub fn oldest(&self) -> Option<InFlight> {
        self.requests().filter(|r| r.phase != Phase::Parked).max_by_key(|r| r.age)
    }

    /// Returns the request with the oldest record of its phase that is not parked. During a store outage a live server
    /// records the phase of its waiting READs ten times a second: such a READ is old, but its record is recent.
    pub fn longest_in_phase(&self) -> Option<InFlight> {
        self.requests().filter(|r| r.phase != Phase::Parked).max_by_key(|r| r.still)
    }

    /// Returns the number of parked requests: opens that wait for a backing, READs that wait for the store.
    pub fn parked(&self) -> usize {
        let taken = |i: &usize| self.slot(*i)[STAMP].load(Ordering::Relaxed) != 0;
        (THREAD_SLOTS..THREAD_SLOTS + PARKED_SLOTS).filter(taken).count()
    }

    /// Returns slot `index`: the slots of threads come first, then the parking slots.
    fn slot(&self, index: usize) -> &[AtomicU64; WORDS] {
        let words = &self.0.all()[WORDS..];
        // The length of the table is fixed, and checked by `map`.
        words.as_chunks::<WORDS>().0.get(index).unwrap_or_else(|| unreachable!("slot {index} of the table"))
    }

    /// Enters a request into the slot of a thread, whose only writer is that thread.
    pub fn enter(&self, thread: usize, asked: &RequestInfo) {
        let now = now();
        write(self.slot(thread.min(THREAD_SLOTS - 1)), asked, now, word(now, Phase::Taken as u64));
    }

    /// Records the phase of a thread's request, and the time.
    pub fn stamp(&self, thread: usize, phase: Phase) {
        let word = word(now(), phase as u64);
        self.slot(thread.min(THREAD_SLOTS - 1))[STAMP].store(word, Ordering::Release);
    }

    /// Clears the slot of a thread after its request was answered or parked.
    pub fn clear(&self, thread: usize) {
        self.slot(thread.min(THREAD_SLOTS - 1))[STAMP].store(0, Ordering::Release);
    }

    /// Enters a request that waits without a thread into the first free parking slot from `from` on, cyclically.
    /// Returns the number of the slot; `None` if all are taken.
    pub fn park(&self, from: usize, asked: &RequestInfo, phase: Phase) -> Option<usize> {
        let now = now();
        let number = (0..PARKED_SLOTS).map(|i| (from + i) % PARKED_SLOTS).find(|&i| {
            let first = &self.slot(THREAD_SLOTS + i)[STAMP];
            first.load(Ordering::Relaxed) == 0
                && first.compare_exchange(0, word(now, CLAIMED), Ordering::Acquire, Ordering::Relaxed).is_ok()
        })?;
        write(self.slot(THREAD_SLOTS + number), asked, now, word(now, phase as u64));
        Some(number)
    }

    /// Stamps a parked request with `phase`, or frees its slot if `phase` is `None`.
    pub fn unpark(&self, number: usize, phase: Option<Phase>) {
        let word = phase.map_or(0, |phase| word(now(), phase as u64));
        self.slot(THREAD_SLOTS + number % PARKED_SLOTS)[STAMP].store(word, Ordering::Release);
    }
}

fn word(time: u64, state: u64) -> u64 {
    time << STATE_BITS | state
}

fn write(slot: &[AtomicU64; WORDS], asked: &RequestInfo, start: u64, publish: u64) {
    // The fence keeps the words of this request from becoming visible under the first word of the previous one.
    slot[STAMP].store(word(start, CLAIMED), Ordering::Relaxed);
    fence(Ordering::Release);
    slot[UNIQUE].store(asked.unique, Ordering::Relaxed);
    slot[OP_SIZE].store(u64::from(asked.op as u32) << 32 | u64::from(asked.size), Ordering::Relaxed);
    slot[INO].store(asked.ino, Ordering::Relaxed);
    slot[OFFSET].store(asked.offset, Ordering::Relaxed);
    slot[START].store(start, Ordering::Relaxed);
    slot[STAMP].store(publish, Ordering::Release);
}

fn read(slot: &[AtomicU64; WORDS], now: u64) -> Option<InFlight> {
    read_while(slot, now, || ())
}

/// Reads a slot; `meanwhile` runs after each read of the first word (a hook for tests).
fn read_while(slot: &[AtomicU64; WORDS], now: u64, mut meanwhile: impl FnMut()) -> Option<InFlight> {
    for _ in 0..READ_ATTEMPTS {
        let before = slot[STAMP].load(Ordering::Acquire);
        let phase = Phase::of(before)?;
        meanwhile();
        let [unique, op_size, ino, offset, start] =
            [UNIQUE, OP_SIZE, INO, OFFSET, START].map(|i| slot[i].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if slot[STAMP].load(Ordering::Relaxed) == before {
            let since = |then: u64| Duration::from_nanos(now.saturating_sub(then));
            return Some(InFlight {
                unique,
                opcode: (op_size >> 32) as u32,
                ino,
                offset,
                size: (op_size & 0xffff_ffff) as u32,
                phase,
                age: since(start),
                still: since(before >> STATE_BITS),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use crate::control::protocol::in_flight::*;

    fn asked(n: u64) -> RequestInfo {
        RequestInfo { unique: n, op: Op::Read, ino: n ^ 0xff, offset: n * 4096, size: n as u32, thread: 0 }
    }

    #[test]
    fn reads_a_table_through_another_mapping() {
        let table = InFlightTable::create().unwrap();
        let other = InFlightTable::map(table.fd().try_clone().unwrap()).unwrap();
        assert!(other.oldest().is_none() && other.requests().next().is_none());
        table.enter(3, &asked(7));
        std::thread::sleep(Duration::from_millis(20));
        table.enter(0, &asked(8));
        table.stamp(3, Phase::WaitingForStore);
        let oldest = other.oldest().unwrap();
        assert_eq!((oldest.unique, oldest.ino, oldest.offset, oldest.size), (7, 7 ^ 0xff, 28672, 7));
        assert_eq!((oldest.opcode, oldest.phase), (15, Phase::WaitingForStore));
        assert!(oldest.age >= Duration::from_millis(20) && oldest.still < oldest.age, "{oldest:?}");
        assert_eq!(other.longest_in_phase().unwrap().unique, 8, "request 7 was stamped later");
        assert!(
            oldest
                .to_string()
                .starts_with("READ of 7 bytes at 28672 of inode 248, waiting for the store, for 0.")
        );
        table.clear(3);
        assert_eq!(other.oldest().unwrap().unique, 8);
        table.clear(0);
        assert!(other.oldest().is_none());
    }

    #[test]
    fn parked_requests_are_counted_and_bounded() {
        let table = InFlightTable::create().unwrap();
        let slots: Vec<usize> =
            (0..PARKED_SLOTS).map(|n| table.park(n * 3, &asked(n as u64), Phase::Parked).unwrap()).collect();
        assert_eq!(table.parked(), PARKED_SLOTS);
        assert_eq!(table.park(0, &asked(1), Phase::Parked), None, "a full table returns None");
        assert!(table.oldest().is_none(), "parked requests occupy no thread");
        assert_eq!(table.requests().filter(|r| r.phase == Phase::Parked).count(), PARKED_SLOTS);
        table.unpark(slots[17], Some(Phase::Replying));
        table.unpark(slots[17], None);
        assert_eq!(table.parked(), PARKED_SLOTS - 1);
        assert_eq!(table.park(0, &asked(1), Phase::WaitingForStore), Some(slots[17]));
        assert_eq!(
            table.oldest().unwrap().phase,
            Phase::WaitingForStore,
            "a READ that waits for the store counts"
        );
    }

    #[test]
    fn rejects_a_file_that_is_not_a_table() {
        let blank = SharedWords::create("blank", PAGES).unwrap();
        assert!(InFlightTable::map(blank.fd().try_clone().unwrap()).is_err());
        let short = SharedWords::create("short", 1).unwrap();
        assert!(InFlightTable::map(short.fd().try_clone().unwrap()).is_err());
    }

    #[test]
    fn rereads_a_slot_that_changes_during_the_read() {
        let table = InFlightTable::create().unwrap();
        table.enter(5, &asked(1));
        table.stamp(5, Phase::Decoding);
        let mut changed = false;
        let found = read_while(table.slot(5), now(), || {
            if !std::mem::replace(&mut changed, true) {
                table.clear(5);
                table.enter(5, &asked(2));
            }
        });
        let found = found.unwrap();
        assert_eq!((found.unique, found.phase), (2, Phase::Taken), "only words of the second request");
        let mut n = 3;
        let changing = read_while(table.slot(5), now(), || {
            table.enter(5, &asked(n));
            n += 1;
        });
        assert!(changing.is_none() && n < 20, "a slot that keeps changing is skipped");
    }

    /// The numbers of each request belong together; a reader must never see a mixture of two requests.
    #[test]
    fn never_returns_a_torn_read() {
        let table = InFlightTable::create().unwrap();
        let other = InFlightTable::map(table.fd().try_clone().unwrap()).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 1;
                while !over.load(Ordering::Relaxed) {
                    table.enter(0, &asked(n));
                    table.stamp(0, Phase::Decoding);
                    if n % 3 == 0 {
                        table.clear(0);
                    }
                    n = n % 1_000_000 + 1;
                }
            });
            let (until, mut seen, mut torn) =
                (std::time::Instant::now() + Duration::from_millis(300), 0, None);
            while std::time::Instant::now() < until && torn.is_none() {
                if let Some(found) = read(other.slot(0), now()) {
                    let whole = asked(found.unique);
                    let same = (found.ino, found.offset, found.size) == (whole.ino, whole.offset, whole.size);
                    torn = (!same || found.age > Duration::from_secs(1)).then_some(found);
                    seen += 1;
                }
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(torn, None);
            assert!(seen > 100, "{seen} requests seen");
        });
    }
}
