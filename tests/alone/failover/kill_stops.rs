//! A server that is stopped and not killed: readers wait without an error until it resumes or the watchdog replaces it.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::daemon::drill::{Drill, stop};
use crate::support::daemon::readers::{Image, Readers};
use crate::support::host;
use crate::support::mount::TestMount;

const IMAGE: Image = Image { salt: 4, pages: 8 << 10 };

/// Three kinds of page faults, two of buffered reads, two of direct reads, and lookups.
const WAYS: [&str; 8] = ["map", "readahead", "populate", "pread", "stream", "direct", "direct1m", "names"];

#[test]
fn readers_wait_for_a_stopped_server_until_it_resumes() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut readers = Readers::new(world.dir(), Duration::from_micros(100));
    readers.apart(&WAYS, IMAGE, &world.file(&digest, "memory"));
    readers.wait_progress(100);
    let drill = Drill::new(&world);
    let server = drill.server();
    let start = Instant::now();
    stop(server);
    let pause = Duration::from_secs(host::rounds(2, 5));
    std::thread::sleep(pause);
    let waiting = drill.unanswered();
    server.signal(Signal::CONT).unwrap();
    let stopped = start.elapsed();
    readers.wait_progress(100);
    let finished = readers.finish();
    let longest =
        finished.iter().flat_map(|r| &r.stalls).map(|s| Duration::from_nanos(s.end - s.begin)).max();
    println!(
        "stopped for {stopped:.1?} with {waiting} requests unanswered; the longest read took {:.1?}",
        longest.unwrap()
    );
    assert_eq!((drill.server(), &world.status()["restarts"]), (server, &0.into()), "the server was replaced");
    assert!(
        waiting >= 5 && longest >= Some(pause.mul_f64(0.8)),
        "{waiting} requests waited, the longest for {longest:?}"
    );
}

#[test]
fn the_watchdog_kills_and_replaces_a_stopped_server() {
    let rounds = host::rounds(2, 10);
    host::measured(|| {
        replaced_after(Duration::from_secs(2), Duration::from_secs(1), &["--watchdog", "2"], rounds)
    });
}

/// One round without `--watchdog`: the default limit is 10 s.
#[test]
fn soak_the_watchdog_replaces_a_server_by_its_default_limit() {
    if !host::soaking() {
        return println!("skipped: only `make soak` waits for the default limit");
    }
    host::measured(|| replaced_after(Duration::from_secs(10), Duration::from_secs(10), &[], 1));
}

fn replaced_after(limit: Duration, slack: Duration, options: &[&str], rounds: u64) -> Result<(), String> {
    let _host = host::alone();
    let world = TestMount::with(&[&["--serve", "decode"], options].concat());
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    fs::metadata(&path).unwrap();
    let mut readers = Readers::new(world.dir(), Duration::from_micros(100));
    let drill = Drill::new(&world);
    let (mut shortest, mut worst) = (Duration::MAX, Duration::ZERO);
    for round in 0..rounds {
        let server = drill.server();
        let start = if round == 0 {
            // The stopped server has not received any of the requests.
            stop(server);
            let start = Instant::now();
            readers.apart(&WAYS, IMAGE, &path);
            start
        } else {
            readers.wait_progress(100);
            stop(server);
            Instant::now()
        };
        readers.wait_progress(20);
        let waited = start.elapsed();
        (shortest, worst) = (shortest.min(waited), worst.max(waited));
        assert_ne!(drill.server(), server);
        assert!(server.wait_for_exit(Duration::from_secs(1)).unwrap(), "the stopped server was not killed");
    }
    readers.finish();
    println!(
        "{rounds} servers stopped: all readers continued after {shortest:.2?} to {worst:.2?}; limit {limit:?}"
    );
    assert!(shortest >= limit / 2, "replaced after {shortest:?}, before the limit of the watchdog");
    assert_eq!(world.counter("watchdog_replaced"), rounds);
    assert!(world.log().contains("watchdog: "), "{}", world.log());
    if worst <= limit + slack { Ok(()) } else { Err(format!("replaced after {worst:?}, limit {limit:?}")) }
}
