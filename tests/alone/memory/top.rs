//! The CPU time of `stencil top`.

use std::time::{Duration, Instant};

use crate::clones::accounting::world;
use crate::metrics::top::Watch;
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::terminal::Terminal;

/// Clones that copy no pages, and clones that copy some in each second.
const IDLE: u32 = 900;
const ACTIVE: u64 = 100;

const DURATION: Duration = Duration::from_secs(12);

/// Returns the CPU time that a process has used.
fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// Copies pages for some time. Returns the part of a processor that the process uses meanwhile.
fn share(pid: u32, active: &mut [Actor], page: &mut u64, mut each: impl FnMut()) -> f64 {
    let (start, before) = (Instant::now(), cpu_time(pid));
    while start.elapsed() < DURATION {
        *page += 4;
        for actor in active.iter_mut() {
            actor.write_pages(0, *page..*page + 4);
        }
        each();
    }
    (cpu_time(pid) - before).as_secs_f64() / start.elapsed().as_secs_f64()
}

#[test]
fn top_takes_a_third_of_a_processor_for_1000_clones() {
    if cfg!(debug_assertions) {
        println!("skipped: the limit is for a release build");
        return;
    }
    let _host = host::alone();
    let size = 16 << 20;
    let (world, digest) = world("passthrough", size);
    world.stencil(&["clone", "web:1", "-n", &IDLE.to_string(), "--simulate", "read=1000p,write=250p"]).ok();
    let mut active: Vec<Actor> = (0..ACTIVE).map(|_| Actor::start()).collect();
    for actor in &mut active {
        actor.tell(&format!("map 0 {} 0 {size} rw", world.file(&digest, "memory").display()));
        actor.read_pages(0, 0..1000);
        actor.write_pages(0, 0..250);
    }
    let (mut page, limit) = (1000, 0.35);
    host::measured(|| {
        let mut watch = Watch::start(&world, "1");
        let first = watch.sample();
        assert_eq!(first["clones"].as_array().unwrap().len() as u64, u64::from(IDLE) + ACTIVE);
        let (start, mut samples, mut copied) = (Instant::now(), 0, 0.0);
        let json = share(watch.pid(), &mut active, &mut page, || {
            let sample = watch.sample();
            samples += 1;
            copied += sample["copied_pages_per_second"].as_f64().unwrap();
        });
        let rate = f64::from(samples) / start.elapsed().as_secs_f64();
        assert!(copied > 0.0);
        drop(watch);
        let mut command = world.command();
        command.arg("top");
        let mut terminal = Terminal::run(command, 200, 60);
        terminal.wait_for("1000 clones");
        let wait = || std::thread::sleep(Duration::from_millis(900));
        let screen = share(terminal.child.id(), &mut active, &mut page, wait);
        terminal.press("q");
        terminal.end();
        println!("{json:.3} of a processor as JSON at {rate:.2} Hz, {screen:.3} on a screen");
        if json <= limit && screen <= limit && rate > 0.8 {
            return Ok(());
        }
        Err(format!("{json:.3} of a processor as JSON at {rate:.2} Hz, {screen:.3} on a screen"))
    });
}
