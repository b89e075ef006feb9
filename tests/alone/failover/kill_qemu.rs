//! QEMU guests while servers are killed: their heartbeats continue, and QMP reports that they run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stencilfs::clones::qmp::Qmp;
use stencilfs::control::Phase;

use crate::support::daemon::drill::{Drill, is_read};
use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::{self, heartbeats, patiently};

/// Returns the time of each heartbeat of a guest until `done` is true.
fn watch(serial: &Path, done: &AtomicBool) -> Vec<Instant> {
    let mut times = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let beats = heartbeats(serial).len();
        while times.len() < beats {
            times.push(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    times
}

/// Returns the longest time between two heartbeats. The first two intervals do not count: they belong to the start of
/// the guest.
fn longest_gap(times: &[Instant]) -> Duration {
    times.windows(2).skip(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// Number of kills; on a busy host more are needed until one hits a READ.
const MIN_KILLS: usize = 5;
const MAX_KILLS: usize = 40;
/// Number of heartbeats before the first kill.
const QUIET_BEATS: usize = 12;
/// Phases of a READ between its receipt and its reply.
const IN_PROGRESS: [Phase; 3] = [Phase::Taken, Phase::Decoding, Phase::Replying];

fn kill_under_guests(serve: &str) {
    let _host = host::alone();
    host::measured(|| measure_heartbeats(serve));
}

fn measure_heartbeats(serve: &str) -> Result<(), String> {
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&["--serve", serve]).ok();
    let digest = world.json(&["inspect", "guest:v1"])["digest"].as_str().unwrap().to_owned();
    world.wait_until_verified(&digest);
    let launched = world.json(&["clone", "guest:v1", "-n", "2"]);
    let dirs: Vec<PathBuf> = launched["clones"]
        .as_array()
        .unwrap()
        .iter()
        .map(|clone| PathBuf::from(clone["dir"].as_str().unwrap()))
        .collect();
    let serials: Vec<PathBuf> = dirs.iter().map(|dir| dir.join("serial.log")).collect();
    let mut drill = Drill::new(&world);
    let done = AtomicBool::new(false);
    let (times, first_kill): (Vec<Vec<Instant>>, Instant) = std::thread::scope(|scope| {
        let watchers: Vec<_> = serials.iter().map(|serial| scope.spawn(|| watch(serial, &done))).collect();
        let stop_threads = SetOnDrop(&done);
        let wait_heartbeats = |count: usize| {
            for serial in &serials {
                patiently("heartbeats", Duration::from_secs(30), || {
                    (heartbeats(serial).len() >= count).then_some(())
                });
            }
        };
        wait_heartbeats(QUIET_BEATS);
        let first_kill = Instant::now();
        for kill in 0..MAX_KILLS {
            // With `--serve decode`, kill the server while a guest waits for a page that is not resident, if that
            // happens within 3 s.
            if serve != "decode" || drill.kill_when(Duration::from_secs(3), is_read).is_none() {
                drill.kill();
            }
            wait_heartbeats(QUIET_BEATS + 4 + 4 * kill);
            if kill + 1 >= MIN_KILLS && (serve != "decode" || drill.met_reads(&IN_PROGRESS) > 0) {
                break;
            }
        }
        drop(stop_threads);
        (watchers.into_iter().map(|watcher| watcher.join().unwrap()).collect(), first_kill)
    });
    for dir in &dirs {
        assert_eq!(Qmp::connect(&dir.join("qmp.sock")).unwrap().status().unwrap(), "running");
    }
    drill.report(&format!("QEMU guests, {serve}"), &[]);
    assert!(
        serve != "decode" || drill.met_reads(&IN_PROGRESS) > 0,
        "no kill hit a guest that waited for a page"
    );
    let gaps: Vec<Duration> = times.iter().map(|times| longest_gap(times)).collect();
    let before =
        |times: &Vec<Instant>| times.iter().copied().filter(|time| *time < first_kill).collect::<Vec<_>>();
    let quiet = times.iter().map(|times| longest_gap(&before(times))).max().unwrap_or_default();
    println!(
        "{serve}: {} and {} heartbeats, longest gaps {gaps:.0?}, {quiet:.0?} without kills",
        times[0].len(),
        times[1].len()
    );
    assert!(
        gaps.iter().all(|gap| *gap <= Duration::from_secs(3)),
        "a guest had no heartbeat for more than 3 s: {gaps:?}"
    );
    // A kill delays a heartbeat by at most 100 ms. A busy host delays heartbeats without a kill, too.
    let limit = (quiet + Duration::from_millis(100)).max(Duration::from_millis(300));
    let in_limit = gaps.iter().all(|gap| *gap <= limit);
    if in_limit { Ok(()) } else { Err(format!("longest gaps between heartbeats: {gaps:?}, limit {limit:?}")) }
}

#[test]
fn qemu_guests_survive_server_kills_by_decode() {
    kill_under_guests("decode");
}

#[test]
fn qemu_guests_survive_server_kills_by_passthrough() {
    kill_under_guests("passthrough");
}

#[test]
fn qemu_guests_survive_server_kills_by_kernel_decode() {
    kill_under_guests("kernel");
}
