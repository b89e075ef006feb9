//! A server that is killed under readers costs nobody a byte, an error, or much time: its successor answers what it
//! had read, whatever it was about to do with it.

use std::time::Duration;

use stencilfs::control::{InFlight, Phase};

use crate::support::drill::{Drill, drop_caches, is_read};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::readers::{Image, PAGE, Readers};

const IMAGE: Image = Image { salt: 1, pages: 16 << 10 };

/// Most bytes of one READ.
const LARGEST: u32 = 1 << 20;

/// Readers leave the processors room: what they wait for shall be the server.
const PAUSE: Duration = Duration::from_micros(300);

const EVERY: [Phase; 3] = [Phase::Taken, Phase::Decoding, Phase::Replying];

fn kills_under_readers(serve: &str) {
    let _host = host::alone();
    host::measured(|| felt_at_kills(serve));
}

fn felt_at_kills(serve: &str) -> Result<(), String> {
    let world = TestMount::new(serve);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut readers = Readers::new(world.dir(), PAUSE);
    let ways = ["map", "map", "map", "readahead", "pread", "stream", "direct", "direct1m"];
    readers.apart(&ways, IMAGE, &path);
    readers.add("names", IMAGE, &path, 0, IMAGE.pages);
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(20, 200) {
        if round % 10 == 0 {
            drill.cut();
            drop_caches();
        }
        readers.wait_progress(20);
        drill.mark();
        readers.wait_progress(20);
        // At any moment of what the readers do.
        std::thread::sleep(Duration::from_micros(round * 7919 % 10_000));
        drill.kill();
    }
    readers.wait_progress(20);
    let felt = drill.report(&format!("8 readers, {serve}"), &readers.finish());
    if serve == "decode" {
        let (met, all) = (drill.met_reads(&EVERY), drill.kills().len());
        assert!(met * 2 >= all, "only {met} of {all} kills met a READ in flight");
    }
    felt.check_delays()
}

#[test]
fn readers_of_untouched_pages_by_decode() {
    kills_under_readers("decode");
}

#[test]
fn readers_of_untouched_pages_by_passthrough() {
    kills_under_readers("passthrough");
}

/// Kills at a moment that the server's own table shows, until so many have met a READ in one of `phases`.
fn kills_at(what: &str, ways: &[&str], wanted: impl Fn(&InFlight) -> bool, phases: &[Phase]) {
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
    let (met, all) = (drill.met_reads(phases), drill.kills().len());
    assert!(met >= goal, "{what}: only {met} of {all} kills met that moment");
}

#[test]
fn between_taking_a_request_and_answering() {
    let ways = ["map", "map", "readahead", "pread", "direct", "direct1m"];
    let phases = [Phase::Taken, Phase::Decoding];
    kills_at("before the answer", &ways, |r| phases.contains(&r.phase), &phases);
}

#[test]
fn inside_the_copy_of_the_reply() {
    let wanted = |r: &InFlight| r.phase == Phase::Replying && r.size == LARGEST;
    kills_at("inside the copy", &["direct1m", "direct1m"], wanted, &[Phase::Replying]);
}

#[test]
fn while_another_process_populates_the_range() {
    let _host = host::alone();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mut readers = Readers::new(world.dir(), PAUSE);
    // All of them the same range, of which each drops what no other one has mapped.
    for way in ["populate", "willneed", "map", "pread", "direct"] {
        readers.add(way, IMAGE, &path, 0, IMAGE.pages);
    }
    let mut drill = Drill::new(&world);
    for _ in 0..host::rounds(10, 100) {
        readers.wait_progress(20);
        // READs of many pages are those of populating and readahead.
        let killed = drill.kill_when(Duration::from_secs(10), |r| is_read(r) && r.size >= 16 * PAGE as u32);
        assert!(killed.is_some(), "nobody populates");
    }
    readers.wait_progress(20);
    drill.report("populating", &readers.finish());
    let (met, all) = (drill.met_reads(&EVERY), drill.kills().len());
    assert!(met * 2 >= all, "only {met} of {all} kills met a READ");
}
