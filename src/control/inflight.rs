//! Requests that a server has taken and not answered: a table in shared memory which the server stamps and others read.
//!
//! ```text
//!   word  0            1        2               3        4          5        6
//!   slot  moved|state  unique   opcode|size     inode    offset     begun    -        64 bytes, a cache line
//! ```
//! One slot for each thread of the server, written by that thread alone, then slots for requests that wait without
//! one: opens for a backing, READs for the store.
//! A slot is published by its first word: the time of the last stamp and the state. A reader takes the other words only
//! when the first one is the same before and after; every change of a slot is a later stamp, so what it has is of one
//! request.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::sys::clock::monotonic as now;
use crate::sys::memfd::SharedWords;

/// Name of the memory file, as `/proc/PID/fd` shows it.
pub const INFLIGHT_NAME: &str = "stencil-inflight";

/// Slots for threads of the server.
pub const THREAD_SLOTS: usize = 63;

/// Slots for requests that wait without a thread.
pub const PARKED_SLOTS: usize = 4096;

/// Eight words a slot; the first slot is the head.
const WORDS: usize = 8;
const PAGES: usize = (1 + THREAD_SLOTS + PARKED_SLOTS) * WORDS * 8 / 4096;

/// First word of the table: another layout is another number.
const MAGIC: u64 = u64::from_le_bytes(*b"stencil\x01");

const MOVED: usize = 0;
const UNIQUE: usize = 1;
const WHAT: usize = 2;
const INO: usize = 3;
const OFFSET: usize = 4;
const BEGUN: usize = 5;

const STATE_BITS: u32 = 3;
/// A slot that is being filled by the thread that took it: nobody reads it yet.
const CLAIMED: u64 = 7;

/// So often a slot that moves is looked at again. One that still moves is not stuck.
const LOOKS: usize = 8;

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Phase {
    /// A thread has it.
    Taken = 1,
    /// Blocks are read, decoded and verified.
    Decoding = 2,
    /// The store cannot be reached; it is tried again.
    WaitingForSource = 3,
    /// The answer is given to the kernel.
    Replying = 4,
    /// It waits for a backing, and holds up no thread.
    Parked = 5,
}

impl Phase {
    fn of(word: u64) -> Option<Phase> {
        Some(match word & ((1 << STATE_BITS) - 1) {
            1 => Phase::Taken,
            2 => Phase::Decoding,
            3 => Phase::WaitingForSource,
            4 => Phase::Replying,
            5 => Phase::Parked,
            _ => return None,
        })
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Taken => "taken",
            Phase::Decoding => "decoding",
            Phase::WaitingForSource => "waiting for source",
            Phase::Replying => "replying",
            Phase::Parked => "parked",
        }
    }
}

macro_rules! ops {
    ($($op:ident $number:literal $name:literal,)*) => {
        /// What the kernel asks. The numbers are the FUSE protocol's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Op { $(#[doc = $name] $op = $number,)* }

        /// The protocol's word for an opcode.
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

/// What is asked, as it is entered into the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The kernel's number of the request.
    pub unique: u64,
    /// What is asked.
    pub op: Op,
    /// Of which inode.
    pub ino: u64,
    /// Of a READ: where it begins.
    pub offset: u64,
    /// Of a READ: how many bytes.
    pub size: u32,
}

/// A request that is not answered, as it was found in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// The kernel's number of the request.
    pub unique: u64,
    /// What is asked: an opcode of the protocol.
    pub opcode: u32,
    /// Of which inode.
    pub ino: u64,
    /// Of a READ: where it begins.
    pub offset: u64,
    /// Of a READ: how many bytes.
    pub size: u32,
    /// How far it is.
    pub phase: Phase,
    /// Since it was taken.
    pub age: Duration,
    /// Since its last stamp: a server that tries again, or goes on to the next block, stamps anew.
    pub still: Duration,
}

/// `READ of 131072 bytes at 4096 of inode 77, decoding, for 12.0 s`
impl std::fmt::Display for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(op_name(self.opcode))?;
        if self.opcode == Op::Read as u32 {
            write!(f, " of {} bytes at {}", self.size, self.offset)?;
        }
        write!(f, " of inode {}, {}, for {:.1} s", self.ino, self.phase.name(), self.age.as_secs_f64())
    }
}

/// The table.
#[derive(Debug)]
pub struct InFlightTable(SharedWords);

impl InFlightTable {
    /// A new, empty one: the server's.
    ///
    /// # Errors
    /// The system's.
    pub fn create() -> io::Result<InFlightTable> {
        let words = SharedWords::create(INFLIGHT_NAME, PAGES)?;
        words.all()[0].store(MAGIC, Ordering::Release);
        Ok(InFlightTable(words))
    }

    /// That of another process, to read.
    ///
    /// # Errors
    /// The system's, or `InvalidInput` for what is no such table.
    pub fn map(fd: OwnedFd) -> io::Result<InFlightTable> {
        let words = SharedWords::watch(fd, PAGES)?;
        if words.all()[0].load(Ordering::Acquire) != MAGIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(InFlightTable(words))
    }

    /// To hand to another process.
    pub fn fd(&self) -> &OwnedFd {
        self.0.fd()
    }

    /// Everything in flight, parked opens too. Allocates nothing.
    pub fn requests(&self) -> impl Iterator<Item = InFlight> {
        let now = now();
        (0..THREAD_SLOTS + PARKED_SLOTS).filter_map(move |index| read(self.slot(index), now))
    }

    /// The request that was taken first, parked ones left out: those wait by right.
    pub fn oldest(&self) -> Option<InFlight> {
        self.requests().filter(|r| r.phase != Phase::Parked).max_by_key(|r| r.age)
    }

    /// The one of which nothing was heard for the longest time, parked ones left out. While the store is away a server
    /// that lives stamps its waiting READs ten times a second: such a one is old, and not still.
    pub fn stillest(&self) -> Option<InFlight> {
        self.requests().filter(|r| r.phase != Phase::Parked).max_by_key(|r| r.still)
    }

    /// How many requests wait without a thread: opens for a backing, READs for the store.
    pub fn parked(&self) -> usize {
        let taken = |i: &usize| self.slot(*i)[MOVED].load(Ordering::Relaxed) != 0;
        (THREAD_SLOTS..THREAD_SLOTS + PARKED_SLOTS).filter(taken).count()
    }

    /// Slot `index`: threads first, then parked opens.
    fn slot(&self, index: usize) -> &[AtomicU64; WORDS] {
        let words = &self.0.all()[WORDS..];
        // The table's length is fixed, and checked when it is mapped.
        words.as_chunks::<WORDS>().0.get(index).unwrap_or_else(|| unreachable!("slot {index} of the table"))
    }

    /// Enters a request into a thread's slot; the thread is the only one that writes there.
    pub fn enter(&self, thread: usize, asked: &Asked) {
        let now = now();
        write(self.slot(thread.min(THREAD_SLOTS - 1)), asked, now, word(now, Phase::Taken as u64));
    }

    /// Stamps a thread's request.
    pub fn stamp(&self, thread: usize, phase: Phase) {
        let word = word(now(), phase as u64);
        self.slot(thread.min(THREAD_SLOTS - 1))[MOVED].store(word, Ordering::Release);
    }

    /// A thread's request is answered, or parked.
    pub fn clear(&self, thread: usize) {
        self.slot(thread.min(THREAD_SLOTS - 1))[MOVED].store(0, Ordering::Release);
    }

    /// Enters a request that waits and holds up no thread, seeking a free slot from number `from` on; gives its number,
    /// none when all are taken.
    pub fn park(&self, from: usize, asked: &Asked, phase: Phase) -> Option<usize> {
        let now = now();
        let number = (0..PARKED_SLOTS).map(|i| (from + i) % PARKED_SLOTS).find(|&i| {
            let first = &self.slot(THREAD_SLOTS + i)[MOVED];
            first.load(Ordering::Relaxed) == 0
                && first.compare_exchange(0, word(now, CLAIMED), Ordering::Acquire, Ordering::Relaxed).is_ok()
        })?;
        write(self.slot(THREAD_SLOTS + number), asked, now, word(now, phase as u64));
        Some(number)
    }

    /// A parked open is being answered, or was.
    pub fn unpark(&self, number: usize, phase: Option<Phase>) {
        let word = phase.map_or(0, |phase| word(now(), phase as u64));
        self.slot(THREAD_SLOTS + number % PARKED_SLOTS)[MOVED].store(word, Ordering::Release);
    }
}

fn word(time: u64, state: u64) -> u64 {
    time << STATE_BITS | state
}

fn write(slot: &[AtomicU64; WORDS], asked: &Asked, begun: u64, publish: u64) {
    // Nobody may see a word of this request under the last one's first word.
    slot[MOVED].store(word(begun, CLAIMED), Ordering::Relaxed);
    fence(Ordering::Release);
    slot[UNIQUE].store(asked.unique, Ordering::Relaxed);
    slot[WHAT].store(u64::from(asked.op as u32) << 32 | u64::from(asked.size), Ordering::Relaxed);
    slot[INO].store(asked.ino, Ordering::Relaxed);
    slot[OFFSET].store(asked.offset, Ordering::Relaxed);
    slot[BEGUN].store(begun, Ordering::Relaxed);
    slot[MOVED].store(publish, Ordering::Release);
}

fn read(slot: &[AtomicU64; WORDS], now: u64) -> Option<InFlight> {
    read_while(slot, now, || ())
}

/// Reads a slot; `meanwhile` happens after each look at its first word.
fn read_while(slot: &[AtomicU64; WORDS], now: u64, mut meanwhile: impl FnMut()) -> Option<InFlight> {
    for _ in 0..LOOKS {
        let before = slot[MOVED].load(Ordering::Acquire);
        let phase = Phase::of(before)?;
        meanwhile();
        let [unique, what, ino, offset, begun] =
            [UNIQUE, WHAT, INO, OFFSET, BEGUN].map(|i| slot[i].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if slot[MOVED].load(Ordering::Relaxed) == before {
            let since = |then: u64| Duration::from_nanos(now.saturating_sub(then));
            return Some(InFlight {
                unique,
                opcode: (what >> 32) as u32,
                ino,
                offset,
                size: what as u32,
                phase,
                age: since(begun),
                still: since(before >> STATE_BITS),
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(n: u64) -> Asked {
        Asked { unique: n, op: Op::Read, ino: n ^ 0xff, offset: n * 4096, size: n as u32 }
    }

    #[test]
    fn a_table_is_read_by_another_mapping() {
        let table = InFlightTable::create().unwrap();
        let other = InFlightTable::map(table.fd().try_clone().unwrap()).unwrap();
        assert!(other.oldest().is_none() && other.requests().next().is_none());
        table.enter(3, &asked(7));
        std::thread::sleep(Duration::from_millis(20));
        table.enter(0, &asked(8));
        table.stamp(3, Phase::WaitingForSource);
        let oldest = other.oldest().unwrap();
        assert_eq!((oldest.unique, oldest.ino, oldest.offset, oldest.size), (7, 7 ^ 0xff, 28672, 7));
        assert_eq!((oldest.opcode, oldest.phase), (15, Phase::WaitingForSource));
        assert!(oldest.age >= Duration::from_millis(20) && oldest.still < oldest.age, "{oldest:?}");
        assert_eq!(other.stillest().unwrap().unique, 8, "the other one was stamped since");
        assert!(
            oldest
                .to_string()
                .starts_with("READ of 7 bytes at 28672 of inode 248, waiting for source, for 0.")
        );
        table.clear(3);
        assert_eq!(other.oldest().unwrap().unique, 8);
        table.clear(0);
        assert!(other.oldest().is_none());
    }

    #[test]
    fn parked_opens_are_counted_and_bounded() {
        let table = InFlightTable::create().unwrap();
        let slots: Vec<usize> =
            (0..PARKED_SLOTS).map(|n| table.park(n * 3, &asked(n as u64), Phase::Parked).unwrap()).collect();
        assert_eq!(table.parked(), PARKED_SLOTS);
        assert_eq!(table.park(0, &asked(1), Phase::Parked), None, "no room is no panic");
        assert!(table.oldest().is_none(), "they hold up no thread");
        assert_eq!(table.requests().filter(|r| r.phase == Phase::Parked).count(), PARKED_SLOTS);
        table.unpark(slots[17], Some(Phase::Replying));
        table.unpark(slots[17], None);
        assert_eq!(table.parked(), PARKED_SLOTS - 1);
        assert_eq!(table.park(0, &asked(1), Phase::WaitingForSource), Some(slots[17]));
        assert_eq!(
            table.oldest().unwrap().phase,
            Phase::WaitingForSource,
            "it has no thread, and somebody waits"
        );
    }

    #[test]
    fn what_is_no_table_is_not_mapped() {
        let blank = SharedWords::create("blank", PAGES).unwrap();
        assert!(InFlightTable::map(blank.fd().try_clone().unwrap()).is_err());
        let short = SharedWords::create("short", 1).unwrap();
        assert!(InFlightTable::map(short.fd().try_clone().unwrap()).is_err());
    }

    #[test]
    fn a_slot_that_moves_under_a_look_is_looked_at_again() {
        let table = InFlightTable::create().unwrap();
        table.enter(5, &asked(1));
        table.stamp(5, Phase::Decoding);
        let mut moved = false;
        let found = read_while(table.slot(5), now(), || {
            if !std::mem::replace(&mut moved, true) {
                table.clear(5);
                table.enter(5, &asked(2));
            }
        });
        let found = found.unwrap();
        assert_eq!((found.unique, found.phase), (2, Phase::Taken), "all of the second, nothing of the first");
        let mut n = 3;
        let restless = read_while(table.slot(5), now(), || {
            table.enter(5, &asked(n));
            n += 1;
        });
        assert!(restless.is_none() && n < 20, "it moves: it is not stuck");
    }

    /// Every request carries numbers that belong together; a reader never sees those of two.
    #[test]
    fn a_torn_read_yields_nothing() {
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
            assert!(seen > 100, "{seen} were seen");
        });
    }
}
