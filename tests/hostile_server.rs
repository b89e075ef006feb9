//! A server that was taken over and does nothing but talk: the supervisor stays what it is, answers everybody else, and
//! grows no more than its bounds.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::control::Channel;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::mount::{TestMount, wait_for};
use crate::support::passing::Ends;
use crate::support::readers::{Image, PAGE};
use crate::support::{host, link};

const IMAGE: Image = Image { salt: 13, pages: 2 << 10 };

/// Whoever asks the supervisor something is answered within this time, also on a loaded machine.
const ANSWER: Duration = Duration::from_secs(5);

struct World {
    world: TestMount,
    clone: Actor,
    supervisor: ProcessId,
    server: ProcessId,
    link: Channel,
}

fn world() -> World {
    let world = TestMount::with(&["--serve", "auto", "--cache-size", "64M"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = Actor::start();
    let path = world.file(&digest, "memory");
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
    let process = |pid: u32| ProcessId::of(pid).unwrap().unwrap();
    let supervisor = process(world.status()["supervisor_pid"].as_u64().unwrap() as u32);
    let server = process(world.server());
    let link = link::link_of(server.pid);
    link.set_patience(Duration::from_millis(500)).unwrap();
    World { world, clone, supervisor, server, link }
}

impl World {
    fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.supervisor.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// The server is replaced, and nobody else has noticed anything.
    fn gives_way(mut self, words: &str) {
        let log = || self.world.log();
        wait_for("another server", || (self.world.server() != self.server.pid).then_some(()));
        assert!(log().contains(words), "'{words}' is not in: {}", log());
        assert!(self.server.wait_gone(Duration::from_secs(10)).unwrap(), "it is ended");
        assert_eq!(self.world.status()["supervisor_pid"], self.supervisor.pid);
        for page in 0..IMAGE.pages {
            assert_eq!(self.clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page), "page {page}");
        }
        let next = Image { salt: 14, ..IMAGE };
        let digest = self.world.import_bytes(&next.bytes(), "web:2");
        assert!(
            fs::read(self.world.file(&digest, "memory")).unwrap() == next.bytes(),
            "new opens are served"
        );
    }
}

/// Questions without an end, each cheap by itself, whose answers are taken.
#[test]
fn soak_a_flood_of_questions_holds_up_nobody_and_is_bounded() {
    let _host = host::alone();
    let mut hostile = world();
    let before = hostile.resident_kib();
    let log = hostile.world.log().len();
    let (over, asked, answered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (longest, statuses) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Of three keys there are names, and of many only one question each.
            for number in 1_000_000u64.. {
                let many = link::nobodys(number as u32);
                let ask = match number % 4 {
                    0 => json!({ "decode": { "key": many, "why": "x".repeat(10_000) } }),
                    1 => json!({ "give_back": { "key": many } }),
                    2 => json!({ "progress": { "key": many, "bytes": number } }),
                    _ => json!({ "register": { "key": many, "identity": [1, 2] } }),
                };
                if over.load(Ordering::Relaxed) {
                    break;
                }
                match hostile.link.send(&link::question(number, &ask), None) {
                    Ok(()) => asked.fetch_add(1, Ordering::Relaxed),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(e) => panic!("the supervisor hangs up: {e}"),
                };
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                answered.fetch_add(u64::from(hostile.link.receive::<Value>().is_ok()), Ordering::Relaxed);
            }
        });
        let _ends = Ends(&over);
        let until = Instant::now() + Duration::from_secs(host::rounds(6, 60));
        let (mut longest, mut statuses) = (Duration::ZERO, 0);
        while Instant::now() < until {
            let begun = Instant::now();
            hostile.world.status();
            longest = longest.max(begun.elapsed());
            statuses += 1;
        }
        (longest, statuses)
    });
    let grown = hostile.resident_kib().saturating_sub(before);
    println!(
        "{} questions, {} answers; {statuses} calls of `status` meanwhile, the longest {longest:.1?}; it grew by {grown} KiB",
        asked.load(Ordering::Relaxed),
        answered.load(Ordering::Relaxed)
    );
    assert!(asked.load(Ordering::Relaxed) > 500, "that is no flood");
    assert!(longest <= ANSWER && statuses > 0, "{longest:?}");
    assert!(grown <= 64 << 10, "{grown} KiB");
    let written = hostile.world.log().len() - log;
    assert!(written <= 64 << 10, "{written} bytes of log");
    assert_eq!(hostile.world.server(), hostile.server.pid, "who takes its answers is served");
    assert_eq!(hostile.clone.tell("hash 0 77"), IMAGE.hash(77));
    // Nonsense ends it.
    hostile.link.send(&"no question", None).unwrap();
    hostile.gives_way("has died");
}

#[test]
fn a_server_that_takes_no_answer_is_replaced() {
    let _host = host::shared();
    let hostile = world();
    hostile.server.signal(rustix::process::Signal::STOP).unwrap();
    for number in 1_000_000u64..1_100_000 {
        let ask = json!({ "progress": { "key": link::nobodys(1), "bytes": number } });
        match hostile.link.send(&link::question(number, &ask), None) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            // The other end is closed.
            Err(_) => break,
        }
    }
    hostile.gives_way("the server takes no answer");
}

#[test]
fn a_server_that_does_not_wait_for_an_answer_is_replaced() {
    let _host = host::shared();
    let hostile = world();
    hostile.server.signal(rustix::process::Signal::STOP).unwrap();
    // The search for users takes its time; nobody may ask meanwhile.
    let evict = json!({ "evict": { "keys": [link::nobodys(1)] } });
    for number in 1_000_000u64..1_000_002 {
        hostile.link.send(&link::question(number, &evict), None).unwrap();
    }
    hostile.gives_way("the server does not wait for its answers");
}
