//! A server that is killed costs nobody a byte or an error: its successor answers what it had read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;

const PAGE: u64 = 4096;
const PAGES: u64 = 16 << 10;
/// More of them in `make soak`.
fn kills() -> u64 {
    host::rounds(25, 200)
}

/// Every page knows its number.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    for (number, page) in bytes.chunks_mut(PAGE as usize).enumerate() {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut page[..64]);
        page[64..72].copy_from_slice(&number.to_le_bytes());
        page[2048] = number as u8;
    }
    bytes
}

/// All pages once, in an order that no readahead guesses.
fn scattered(round: u64) -> impl Iterator<Item = u64> {
    (0..PAGES).map(move |i| (i * 6151 + round * 977) % PAGES)
}

#[derive(Default)]
struct Tally {
    pages: AtomicU64,
    rounds: AtomicU64,
    worst: AtomicU64,
    over: AtomicBool,
}

/// Reads pages that nobody has read, again and again, until it is told to end.
fn read_untouched(path: &Path, expected: &[u8], tally: &Tally) {
    let mut page = vec![0; PAGE as usize];
    while !tally.over.load(Ordering::Relaxed) {
        let file = File::open(path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        for number in scattered(tally.rounds.fetch_add(1, Ordering::Relaxed)) {
            let begun = Instant::now();
            file.read_exact_at(&mut page, number * PAGE).unwrap_or_else(|e| panic!("page {number}: {e}"));
            tally.worst.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
            let offset = (number * PAGE) as usize;
            assert!(page == expected[offset..offset + PAGE as usize], "page {number} has wrong bytes");
            tally.pages.fetch_add(1, Ordering::Relaxed);
            if tally.over.load(Ordering::Relaxed) {
                return;
            }
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

fn kills_under_readers(serve: &str) {
    let _host = host::shared();
    let world = TestMount::new(serve);
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let tally = Tally::default();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| read_untouched(&path, &bytes, &tally))).collect();
        // A mapping of a process that is no test: a page it cannot get is its death.
        let mapper = scope.spawn(|| {
            let mut actor = Actor::start();
            actor.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
            for number in scattered(7) {
                if tally.over.load(Ordering::Relaxed) {
                    break;
                }
                assert_eq!(actor.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        for _ in 0..kills() {
            world.kill_server();
            let before = tally.pages.load(Ordering::Relaxed);
            let until = Instant::now() + Duration::from_secs(20);
            while tally.pages.load(Ordering::Relaxed) < before + 50 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if readers.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                break;
            }
            if tally.pages.load(Ordering::Relaxed) < before + 50 {
                // Readers that wait for ever would keep this test from telling.
                world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]);
                panic!("the readers stand still");
            }
        }
        tally.over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("no error and no wrong byte");
        }
        mapper.join().expect("no SIGBUS and no wrong byte");
    });
    let status = world.status();
    assert_eq!(status["restarts"], kills());
    let number = |t: &AtomicU64| t.load(Ordering::Relaxed);
    println!(
        "{serve}: {} kills, {} pages read, worst wait {} ms",
        kills(),
        number(&tally.pages),
        number(&tally.worst) / 1000
    );
    assert!(number(&tally.worst) < 5_000_000, "a successor takes {} µs", number(&tally.worst));
}

#[test]
fn a_killed_server_costs_no_byte_by_decode() {
    kills_under_readers("decode");
}

#[test]
fn a_killed_server_costs_no_byte_by_passthrough() {
    kills_under_readers("passthrough");
}

#[test]
fn opens_that_wait_for_a_backing_survive_the_server() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let bytes = image();
    for round in 0..4 {
        let mut other = bytes.clone();
        other[0] ^= round + 1;
        let digest = world.import_bytes(&other, &format!("web:{round}"));
        let path = world.file(&digest, "memory");
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| std::fs::read(&path))).collect();
            std::thread::sleep(Duration::from_millis(u64::from(round) * 15));
            world.kill_server();
            for reader in readers {
                assert!(reader.join().unwrap().expect("the open is answered in the end") == other);
            }
        });
    }
}

#[test]
fn a_supervisor_that_dies_takes_nobody_with_it() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = stencilfs::sys::process::ProcessId::of(supervisor).unwrap().unwrap();
    process.signal(rustix::process::Signal::KILL).unwrap();
    crate::support::mount::wait_for("its end", || (!process.is_alive()).then_some(()));
    assert!(std::fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    // The server is left alone; umount still knows what to do.
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    crate::support::mount::wait_for("the server's end", || world.processes().is_empty().then_some(()));
}
