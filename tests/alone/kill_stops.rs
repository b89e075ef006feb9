//! A server that is stopped and not killed: whoever waits goes on waiting, and nobody hears of an error.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::drill::{Drill, stop};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::readers::{Image, Readers};

const IMAGE: Image = Image { salt: 4, pages: 8 << 10 };

/// Three ways to fault, two to read, two past the page cache, and names.
const EIGHT: [&str; 8] = ["map", "readahead", "populate", "pread", "stream", "direct", "direct1m", "names"];

#[test]
fn readers_outlast_a_server_that_is_stopped_and_not_killed() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut readers = Readers::new(world.dir(), Duration::from_micros(100));
    readers.apart(&EIGHT, IMAGE, &world.file(&digest, "memory"));
    readers.wait_progress(100);
    let drill = Drill::new(&world);
    let server = drill.server();
    let begun = Instant::now();
    stop(server);
    let pause = Duration::from_secs(host::rounds(2, 5));
    std::thread::sleep(pause);
    let waiting = drill.unanswered();
    server.signal(Signal::CONT).unwrap();
    let stopped = begun.elapsed();
    readers.wait_progress(100);
    let finished = readers.finish();
    let longest =
        finished.iter().flat_map(|r| &r.stalls).map(|s| Duration::from_nanos(s.end - s.begin)).max();
    println!(
        "stopped for {stopped:.1?} with {waiting} requests unanswered; the longest read took {:.1?}",
        longest.unwrap()
    );
    assert_eq!((drill.server(), &world.status()["restarts"]), (server, &0.into()), "the same server");
    assert!(waiting >= 5 && longest >= Some(pause.mul_f64(0.8)), "nobody waited");
}

#[test]
fn a_server_that_is_stopped_for_good_is_replaced_and_killed() {
    let rounds = host::rounds(2, 20);
    host::measured(|| {
        replaced_after(Duration::from_secs(2), Duration::from_secs(1), &["--watchdog", "2"], rounds)
    });
}

/// One round with the limit that a mount has which names none.
#[test]
fn soak_a_server_that_is_stopped_for_good_is_replaced_after_the_default_limit() {
    if !host::soaking() {
        return println!("the default limit is waited for in `make soak` only");
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
        let begun = if round == 0 {
            // It has read nothing of what is asked.
            stop(server);
            let begun = Instant::now();
            readers.apart(&EIGHT, IMAGE, &path);
            begun
        } else {
            readers.wait_progress(100);
            stop(server);
            Instant::now()
        };
        readers.wait_progress(20);
        let waited = begun.elapsed();
        (shortest, worst) = (shortest.min(waited), worst.max(waited));
        assert_ne!(drill.server(), server);
        assert!(server.wait_gone(Duration::from_secs(1)).unwrap(), "the old one is killed");
    }
    readers.finish();
    println!(
        "stopped for good {rounds} times: all read on after {shortest:.2?} to {worst:.2?}, the limit is {limit:?}"
    );
    assert!(shortest >= limit / 2, "{shortest:?}: somebody else replaced it");
    assert_eq!(world.counter("watchdog_replaced"), rounds);
    assert!(world.log().contains("watchdog: "), "{}", world.log());
    if worst <= limit + slack { Ok(()) } else { Err(format!("{worst:?} with a limit of {limit:?}")) }
}
