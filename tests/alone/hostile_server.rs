//! A server that floods its supervisor with questions.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::hostile_server::{ANSWER, IMAGE, world};
use crate::support::passing::SetOnDrop;
use crate::support::{host, link};

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
            // Each question names another key, so that all of them could be noted.
            for number in 1_000_000u64.. {
                let many = link::absent_key(number as u32);
                let ask = match number % 4 {
                    0 => json!({ "no_backing": { "key": many, "reason": "x".repeat(10_000) } }),
                    1 => json!({ "abandon": { "key": many } }),
                    2 => json!({ "progress": { "key": many, "bytes": number } }),
                    _ => json!({ "register": { "key": many, "identity": [1, 2] } }),
                };
                if over.load(Ordering::Relaxed) {
                    break;
                }
                match hostile.link.send(&link::request(number, &ask), None) {
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
        let _ends = SetOnDrop(&over);
        let until = Instant::now() + Duration::from_secs(host::rounds(3, 60));
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
