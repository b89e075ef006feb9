//! The kernel decodes every byte right while the caches are dropped and memory is short.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::sys::memory::mapping::Advice;
use stencilfs::sys::process::{cgroup, procfs};
use stencilfs::units::MemoryOffset;

use crate::mount::kernel_decode::bytes::mixed;
use crate::mount::serving::private_mapping;
use crate::support::daemon::drill::drop_caches;
use crate::support::host;
use crate::support::mount::TestMount;

const PAGE: usize = 4096;
/// Blocks of each template.
const BLOCKS: usize = 700;
/// Available memory that the pressure leaves.
const LEFT: u64 = 512 << 20;
/// Readers of each template.
const WAYS: [Way; 4] = [
    Way::Mapping(None),
    Way::Mapping(Some(Advice::Random)),
    Way::Mapping(Some(Advice::HugePage)),
    Way::Unaligned,
];

/// How a reader reads.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Page by page, by a mapping with this advice.
    Mapping(Option<Advice>),
    /// Some bytes at any offset, by pread(2).
    Unaligned,
}

/// A template and the bytes that it was made of.
struct Known {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// Sets the flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Random numbers that differ for each reader (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Length of the run: `STENCIL_STRESS_SECONDS`, or a default.
fn length() -> Duration {
    let wanted = std::env::var("STENCIL_STRESS_SECONDS").map(|text| text.parse().unwrap());
    Duration::from_secs(wanted.unwrap_or_else(|_| host::rounds(5, 60)))
}

#[test]
fn soak_reads_are_right_while_caches_are_dropped_and_memory_is_short() {
    let _host = host::alone();
    let world = TestMount::new("kernel");
    let mut all = Vec::new();
    for (seed, codec) in (1..).zip(["lz4", "zstd", "none"]) {
        // The second half is in all templates, so its records are shared. The last block ends within a page's block.
        let mut bytes = mixed(seed, BLOCKS / 2);
        bytes.extend(mixed(9, BLOCKS / 2));
        bytes.truncate(bytes.len() - 5 * PAGE);
        let source = world.dir().join("memory");
        fs::write(&source, &bytes).unwrap();
        let answer = world.json(&["import", source.to_str().unwrap(), codec, "--compression", codec]);
        let digest = answer["digest"].as_str().unwrap().to_owned();
        world.wait_until_verified(&digest);
        all.push(Known { path: world.file(&digest, "memory"), bytes });
    }
    let before = world.counter("reads");
    let (end, over, pages) = (Instant::now() + length(), AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        // Also if an assertion fails: the scope waits for its threads.
        let ended = SetOnDrop(&over);
        let readers: Vec<_> = all
            .iter()
            .flat_map(|known| WAYS.map(|way| (known, way)))
            .zip(1..)
            .map(|((known, way), seed)| {
                let (over, pages) = (&over, &pages);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    while !over.load(Ordering::Relaxed) {
                        pages.fetch_add(pass(known, way, &mut random), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let pressure = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                press(&over);
            }
        });
        while Instant::now() < end && readers.iter().all(|reader| !reader.is_finished()) {
            drop_caches();
            thread::sleep(Duration::from_millis(700));
        }
        drop(ended);
        pressure.join().unwrap();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    let pages = pages.into_inner();
    println!("{pages} pages compared in {:?}", length());
    assert!(pages >= 12 * 2000, "only {pages} pages were compared");
    assert_eq!(world.counter("reads"), before, "no READ reaches the server");
}

/// Compares up to 2000 pages of one open of the file. Returns their number.
fn pass(known: &Known, way: Way, random: &mut Random) -> u64 {
    let file = File::open(&known.path).unwrap();
    let pages = known.bytes.len() / PAGE;
    let mut read = [0; PAGE];
    match way {
        Way::Mapping(advice) => {
            let mapping = private_mapping(&file, known.bytes.len() as u64);
            advice.map_or(Ok(()), |advice| mapping.advise_all(advice)).unwrap();
            let first = random.below(pages);
            for step in 0..2000 {
                // Half of the pages in order, half at random places.
                let page = if step % 2 == 0 { (first + step / 2) % pages } else { random.below(pages) };
                let at = page * PAGE;
                mapping.read(MemoryOffset::new(at as u64), &mut read).unwrap();
                assert!(read == known.bytes[at..at + PAGE], "{}: {way:?}: page {page}", known.path.display());
            }
        }
        Way::Unaligned => {
            for _ in 0..2000 {
                let at = random.below(known.bytes.len());
                let part = &mut read[..random.below(PAGE).min(known.bytes.len() - at)];
                file.read_exact_at(part, at as u64).unwrap();
                let expected = &known.bytes[at..at + part.len()];
                assert!(part == expected, "{}: {way:?}: offset {at}", known.path.display());
            }
        }
    }
    2000
}

/// Fills the available memory up to a rest and frees it again.
fn press(over: &AtomicBool) {
    let wanted = available().saturating_sub(LEFT);
    let mut held: Vec<Vec<u8>> = Vec::new();
    // Pages that readers bring into memory meanwhile are available memory too.
    for _ in 0..wanted / (64 << 20) {
        if over.load(Ordering::Relaxed) || available() < LEFT {
            break;
        }
        held.push(vec![1; 64 << 20]);
    }
}

/// Bytes that this process can still allocate.
fn available() -> u64 {
    let host = procfs::meminfo("MemAvailable").unwrap().unwrap();
    cgroup::memory_left(std::process::id()).map_or(host, |left| left.min(host)).get()
}
