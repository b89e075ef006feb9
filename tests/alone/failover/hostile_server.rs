//! A server that floods its supervisor with requests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::failover::hostile_server::{ANSWER, IMAGE, world};
use crate::support::daemon::passing::SetOnDrop;
use crate::support::{daemon::link, host};

/// The server sends cheap requests without pause, and reads the replies.
#[test]
fn soak_a_request_flood_is_bounded_and_delays_no_command() {
    let _host = host::alone();
    let mut hostile = world();
    let before = hostile.resident_kib();
    let log = hostile.world.log().len();
    let (done, sent, replies) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (longest, statuses) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Each request has a new key: the supervisor would need memory for each key that it recorded.
            for number in 1_000_000u64.. {
                let key = link::absent_key(number as u32);
                let body = match number % 4 {
                    0 => json!({ "no_backing": { "key": key, "reason": "x".repeat(10_000) } }),
                    1 => json!({ "abandon": { "key": key } }),
                    2 => json!({ "progress": { "key": key, "bytes": number } }),
                    _ => json!({ "register": { "key": key, "identity": [1, 2] } }),
                };
                if done.load(Ordering::Relaxed) {
                    break;
                }
                match hostile.link.send(&link::request(number, &body), None) {
                    Ok(()) => sent.fetch_add(1, Ordering::Relaxed),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(e) => panic!("the supervisor closed the connection: {e}"),
                };
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                replies.fetch_add(u64::from(hostile.link.receive::<Value>().is_ok()), Ordering::Relaxed);
            }
        });
        let _stop_threads = SetOnDrop(&done);
        let deadline = Instant::now() + Duration::from_secs(host::rounds(3, 20));
        let (mut longest, mut statuses) = (Duration::ZERO, 0);
        while Instant::now() < deadline {
            let start = Instant::now();
            hostile.world.status();
            longest = longest.max(start.elapsed());
            statuses += 1;
        }
        (longest, statuses)
    });
    let growth_kib = hostile.resident_kib().saturating_sub(before);
    println!(
        "{} requests, {} replies; {statuses} calls of `stencil status` meanwhile, the longest {longest:.1?}; the supervisor \
         grew by {growth_kib} KiB",
        sent.load(Ordering::Relaxed),
        replies.load(Ordering::Relaxed)
    );
    assert!(sent.load(Ordering::Relaxed) > 500, "only {} requests were sent", sent.load(Ordering::Relaxed));
    assert!(longest <= ANSWER && statuses > 0, "{statuses} calls, the longest {longest:?}");
    assert!(growth_kib <= 64 << 10, "the supervisor grew by {growth_kib} KiB");
    let log_bytes = hostile.world.log().len() - log;
    assert!(log_bytes <= 64 << 10, "{log_bytes} bytes of log");
    assert_eq!(
        hostile.world.server(),
        hostile.server.pid,
        "the server was replaced although it reads its replies"
    );
    assert_eq!(hostile.clone.tell("hash 0 77"), IMAGE.hash(77));
    // An invalid request makes the supervisor replace the server.
    hostile.link.send(&"not a request", None).unwrap();
    hostile.gives_way("ended after");
}
