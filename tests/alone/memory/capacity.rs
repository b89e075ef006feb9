//! `stencil capacity` against the truth: clones are started in a memory cgroup until the kernel kills one.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use stencilfs::sys::process::cgroup::OomKills;

use crate::clones::accounting::{MIB, PAGE, number, world};
use crate::support::actor::{self, Actor};
use crate::support::host;
use crate::support::memory_group::MemoryGroup;
use crate::support::mount::TestMount;
use crate::support::vm::guest;

/// Pages of the template.
const PAGES: u64 = 8 * MIB / PAGE;

/// How long a clone lives, in seconds.
const LIFETIME: f64 = 4.0;

/// A clone that writes as many pages as a curve says.
struct Writer {
    actor: Actor,
    start: Instant,
    written: u64,
}

impl Writer {
    fn start(group: &MemoryGroup, memory: &str) -> Writer {
        let start = Instant::now();
        let mut actor = Actor::through(group.command(&Command::new(actor::program())));
        actor.tell(&format!("map 0 {memory} 0 {} rw", PAGES * PAGE));
        Writer { actor, start, written: 0 }
    }

    fn age(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Writes to further pages, which are scattered over the template. Returns false if the kernel has killed the clone.
    fn write_until(&mut self, pages: u64) -> bool {
        while self.written < pages {
            // An odd factor makes a permutation of a power of two.
            let page = self.written * 797 % PAGES;
            if !self.actor.survives(&format!("write 0 {page}")) {
                return false;
            }
            self.written += 1;
        }
        true
    }
}

/// Starts clones over the time of one life, lets them write along `pages` (the number of pages by age in seconds), asks
/// for the capacity, and then starts clones until the kernel kills one. Returns the reply and the number of clones that
/// fitted.
fn capacity_and_truth(limit: u64, first: usize, pages: fn(f64) -> f64) -> (Value, u64) {
    let (world, digest) = world("passthrough", PAGES * PAGE);
    let memory = world.file(&digest, "memory").display().to_string();
    let group = MemoryGroup::limited(limit);
    let mut clones: Vec<Writer> = Vec::new();
    let start = Instant::now();
    let mut asked = None;
    let reply = loop {
        let due = start.elapsed().as_secs_f64() / LIFETIME * first as f64;
        while clones.len() < first && clones.len() as f64 <= due {
            clones.push(Writer::start(&group, &memory));
        }
        for clone in &mut clones {
            let wanted = pages(clone.age().min(LIFETIME)) as u64;
            assert!(clone.write_until(wanted), "the limit is too low for the first clones");
        }
        if start.elapsed().as_secs_f64() < LIFETIME {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        // The clones go on while they are measured.
        let asked = asked.get_or_insert_with(|| {
            let mut command = world.command();
            command.args(["--json", "capacity", "web:1", "--for", &LIFETIME.to_string()]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        });
        if asked.try_wait().unwrap().is_some_and(|status| status.success()) {
            let mut text = String::new();
            std::io::Read::read_to_string(asked.stdout.as_mut().unwrap(), &mut text).unwrap();
            break serde_json::from_str(&text).unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(30), "no reply");
    };
    let full = pages(LIFETIME) as u64;
    let kills = OomKills::of(clones[0].actor.pid()).expect("no counter of kills");
    for clone in &mut clones {
        assert!(clone.write_until(full), "the limit is too low for the first clones");
    }
    let mut further = 0;
    loop {
        let mut clone = Writer::start(&group, &memory);
        let fits = clone.write_until(full) && !kills.has_increased();
        clones.push(clone);
        if !fits {
            assert!(kills.has_increased(), "the kernel has killed no clone");
            return (reply, further);
        }
        further += 1;
    }
}

/// Asserts that the truth lies in the interval, and that the interval is at most ± 15 %.
#[track_caller]
fn assert_found(reply: &Value, truth: u64) {
    let further = &reply["further_clones"];
    let [lower, estimate, upper] = ["lower", "estimate", "upper"].map(|bound| number(further, bound));
    println!("{lower} to {upper}, most likely {estimate}; {truth} fitted; {}", reply["growth"]);
    assert!((lower..=upper).contains(&truth), "{lower} to {upper}, but {truth} fitted: {reply:#}");
    assert!((upper - lower) as f64 / 2.0 <= 0.15 * estimate as f64, "{lower} to {upper}: {reply:#}");
    assert_eq!(reply["ends_first"], "cgroup_memory", "{reply:#}");
}

/// Runs one workload in a cgroup of 144 MiB, in `make soak` of 1 GiB.
fn workload(pages: fn(f64) -> f64) {
    let _host = host::alone();
    let (limit, first) = host::rounds((144 * MIB, 26), (1024 * MIB, 190));
    let (reply, truth) = capacity_and_truth(limit, first, pages);
    assert_found(&reply, truth);
}

#[test]
fn soak_clones_that_do_not_grow_end_in_the_interval() {
    workload(|_| 400.0);
}

#[test]
fn soak_clones_that_grow_to_a_limit_end_in_the_interval() {
    workload(|age| 420.0 * (1.0 - (-age / 1.2).exp()));
}

#[test]
fn soak_clones_that_grow_with_the_root_of_their_age_end_in_the_interval() {
    workload(|age| 200.0 * age.sqrt());
}

#[test]
fn soak_clones_that_grow_evenly_end_in_the_interval() {
    workload(|age| 50.0 + 90.0 * age);
}

/// Guests of QEMU differ from each other, and take more memory for their emulator than for copied pages.
#[test]
fn soak_qemu_guests_end_in_the_interval() {
    /// Time in which a guest reaches the memory that it keeps.
    const WARM_UP: Duration = Duration::from_secs(4);
    let _host = host::alone();
    // Dropped after the mount, which stops the clones.
    let group = MemoryGroup::limited(1024 * MIB);
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&["--serve", "passthrough"]).ok();
    let launch = |count: &str| {
        let mut command = world.command();
        group.command(command.args(["clone", "guest:v1", "-n", count])).output().unwrap()
    };
    let launched = launch("5");
    assert!(launched.status.success(), "{}", String::from_utf8_lossy(&launched.stderr));
    std::thread::sleep(WARM_UP);
    let reply = world.json(&["capacity", "guest:v1", "--memcg", group.dir().to_str().unwrap()]);
    println!("{}", world.stencil(&["capacity", "guest:v1"]).out);
    let first = world.json(&["ps"])["clones"][0]["pid"].as_u64().unwrap();
    let kills = OomKills::of(first as u32).expect("no counter of kills");
    let mut further = 0;
    loop {
        let launched = launch("1");
        std::thread::sleep(WARM_UP / 4);
        if kills.has_increased() {
            break;
        }
        assert!(launched.status.success(), "{}", String::from_utf8_lossy(&launched.stderr));
        further += 1;
    }
    assert_found(&reply, further);
}
