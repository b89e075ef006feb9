//! Servers that are killed under readers: readers get no error, no wrong byte and only a short delay, because the
//! successor answers the requests that the killed server had received, in whatever phase they were.

use std::time::Duration;

use stencilfs::control::{InFlight, Phase};

use crate::support::daemon::drill::{Drill, drop_caches, is_read};
use crate::support::daemon::readers::{Image, PAGE, Readers};
use crate::support::host;
use crate::support::mount::TestMount;

const IMAGE: Image = Image { salt: 1, pages: 16 << 10 };

/// Maximum size of a READ, in bytes.
const MAX_READ: u32 = 1 << 20;

/// Pause of readers between reads: they must wait for the server, not for a CPU.
const PAUSE: Duration = Duration::from_micros(300);

/// Phases of a READ between its receipt and its reply.
const IN_PROGRESS: [Phase; 3] = [Phase::Taken, Phase::Decoding, Phase::Replying];

fn kill_under_readers(serve: &str) {
    let _host = host::alone();
    host::measured(|| measure_delays(serve));
}

fn measure_delays(serve: &str) -> Result<(), String> {
    let world = TestMount::new(serve);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    world.wait_until_verified(&digest);
    let path = world.file(&digest, "memory");
    let mut readers = Readers::new(world.dir(), PAUSE);
    let ways = ["map", "map", "map", "readahead", "pread", "stream", "direct", "direct1m"];
    // The kernel refuses direct reads of a file that it decodes.
    let ways = if serve == "kernel" { &ways[..6] } else { &ways };
    readers.apart(ways, IMAGE, &path);
    readers.add("names", IMAGE, &path, 0, IMAGE.pages);
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(20, 100) {
        if round % 10 == 0 {
            drill.cut();
            drop_caches();
        }
        readers.wait_progress(20);
        drill.mark();
        readers.wait_progress(20);
        // The kills come at various moments of the reads.
        std::thread::sleep(Duration::from_micros(round * 7919 % 10_000));
        drill.kill();
    }
    readers.wait_progress(20);
    let delays = drill.report(&format!("8 readers, {serve}"), &readers.finish());
    if serve == "decode" {
        let (hits, all) = (drill.met_reads(&IN_PROGRESS), drill.kills().len());
        assert!(hits * 2 >= all, "only {hits} of {all} kills hit a READ in progress");
    }
    delays.check_delays()
}

#[test]
fn reads_of_untouched_pages_survive_kills_by_decode() {
    kill_under_readers("decode");
}

#[test]
fn reads_of_untouched_pages_survive_kills_by_passthrough() {
    kill_under_readers("passthrough");
}

#[test]
fn reads_of_untouched_pages_survive_kills_by_kernel_decode() {
    kill_under_readers("kernel");
}

/// Kills servers when their table of requests has a wanted READ, until enough kills have hit a READ in one of `phases`.
fn kill_at(what: &str, ways: &[&str], wanted: impl Fn(&InFlight) -> bool, phases: &[Phase]) {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut readers = Readers::new(world.dir(), PAUSE);
    readers.apart(ways, IMAGE, &world.file(&digest, "memory"));
    let mut drill = Drill::new(&world);
    let goal = host::rounds(10, 100);
    while drill.met_reads(phases) < goal && drill.kills().len() < goal * 10 {
        readers.wait_progress(4);
        let killed = drill.kill_when(Duration::from_secs(10), |r| is_read(r) && wanted(r));
        assert!(killed.is_some(), "{what}: no such moment in 10 s");
    }
    readers.wait_progress(4);
    drill.report(what, &readers.finish());
    let (hits, all) = (drill.met_reads(phases), drill.kills().len());
    assert!(hits >= goal, "{what}: only {hits} of {all} kills hit that moment");
}

#[test]
fn reads_survive_kills_between_request_and_reply() {
    let ways = ["map", "map", "readahead", "pread", "direct", "direct1m"];
    let phases = [Phase::Taken, Phase::Decoding];
    kill_at("before the reply", &ways, |r| phases.contains(&r.phase), &phases);
}

#[test]
fn reads_survive_kills_while_the_reply_is_copied() {
    let wanted = |r: &InFlight| r.phase == Phase::Replying && r.size == MAX_READ;
    kill_at("during the copy of the reply", &["direct1m", "direct1m"], wanted, &[Phase::Replying]);
}

#[test]
fn reads_survive_kills_while_another_process_populates() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut readers = Readers::new(world.dir(), PAUSE);
    // All readers use the same range; each drops its pages, except those that another reader has mapped.
    for way in ["populate", "willneed", "map", "pread", "direct"] {
        readers.add(way, IMAGE, &path, 0, IMAGE.pages);
    }
    let mut drill = Drill::new(&world);
    for _ in 0..host::rounds(10, 100) {
        readers.wait_progress(20);
        // READs of 16 pages or more come from populating and readahead.
        let killed = drill.kill_when(Duration::from_secs(10), |r| is_read(r) && r.size >= 16 * PAGE as u32);
        assert!(killed.is_some(), "no READ of 16 pages or more in 10 s");
    }
    readers.wait_progress(20);
    drill.report("populating", &readers.finish());
    let (hits, all) = (drill.met_reads(&IN_PROGRESS), drill.kills().len());
    assert!(hits * 2 >= all, "only {hits} of {all} kills hit a READ");
}
