//! Real guests in QEMU go through the death of servers: their hearts beat on, and QEMU says that they run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stencilfs::clones::qmp::Qmp;
use stencilfs::control::Phase;

use crate::support::drill::{Drill, is_read};
use crate::support::guest::{self, heartbeats, patiently};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::passing::Ends;

/// When each heartbeat of a guest came, for as long as `over` is false.
fn watch(serial: &Path, over: &AtomicBool) -> Vec<Instant> {
    let mut came = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let beats = heartbeats(serial).len();
        while came.len() < beats {
            came.push(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    came
}

/// The longest time between two heartbeats, from the third on: the first come with the guest's start.
fn longest_gap(came: &[Instant]) -> Duration {
    came.windows(2).skip(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// Minimum number of kills of a server.
const MIN_KILLS: usize = 5;
/// Maximum number of kills, if no earlier kill happened while a READ request was pending.
const MAX_KILLS: usize = 40;
/// Phases of a READ request that the server has read and not answered.
const PENDING: [Phase; 3] = [Phase::Taken, Phase::Decoding, Phase::Replying];

fn kills_under_guests(serve: &str) {
    let _host = host::alone();
    host::measured(|| beats_go_on(serve));
}

fn beats_go_on(serve: &str) -> Result<(), String> {
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&["--serve", serve]).ok();
    let launched = world.json(&["clone", "guest:v1", "-n", "2"]);
    let dirs: Vec<PathBuf> = launched["clones"]
        .as_array()
        .unwrap()
        .iter()
        .map(|clone| PathBuf::from(clone["dir"].as_str().unwrap()))
        .collect();
    let serials: Vec<PathBuf> = dirs.iter().map(|dir| dir.join("serial.log")).collect();
    let mut drill = Drill::new(&world);
    let over = AtomicBool::new(false);
    let came: Vec<Vec<Instant>> = std::thread::scope(|scope| {
        let watchers: Vec<_> = serials.iter().map(|serial| scope.spawn(|| watch(serial, &over))).collect();
        let ends = Ends(&over);
        let beats = |count: usize| {
            for serial in &serials {
                patiently("heartbeats", Duration::from_secs(30), || {
                    (heartbeats(serial).len() >= count).then_some(())
                });
            }
        };
        beats(4);
        for kill in 0..MAX_KILLS {
            // If it can be met, at a moment at which a guest waits for a page that it has not touched.
            if serve != "decode" || drill.kill_when(Duration::from_secs(3), is_read).is_none() {
                drill.kill();
            }
            beats(8 + 4 * kill);
            if kill + 1 >= MIN_KILLS && (serve != "decode" || drill.met_reads(&PENDING) > 0) {
                break;
            }
        }
        drop(ends);
        watchers.into_iter().map(|watcher| watcher.join().unwrap()).collect()
    });
    for dir in &dirs {
        assert_eq!(Qmp::connect(&dir.join("qmp.sock")).unwrap().status().unwrap(), "running");
    }
    drill.report(&format!("QEMU guests, {serve}"), &[]);
    assert!(
        serve != "decode" || drill.met_reads(&PENDING) > 0,
        "no kill happened while a READ request of a guest was pending"
    );
    let gaps: Vec<Duration> = came.iter().map(|came| longest_gap(came)).collect();
    println!("{serve}: {} and {} heartbeats, longest gaps {gaps:.0?}", came[0].len(), came[1].len());
    assert!(gaps.iter().all(|gap| *gap <= Duration::from_secs(3)), "a heart stood still: {gaps:?}");
    let all = gaps.iter().all(|gap| *gap <= Duration::from_millis(300));
    if all { Ok(()) } else { Err(format!("gaps of {gaps:?}")) }
}

#[test]
fn hearts_beat_on_by_decode() {
    kills_under_guests("decode");
}

#[test]
fn hearts_beat_on_by_passthrough() {
    kills_under_guests("passthrough");
}
