//! Rows about launching and stopping simulated clones. The floor is a program that only forks and touches the same pages.

use std::process::Command;
use std::time::Instant;

use stencilfs::error::{Error, Result};

use crate::run::Context;
use crate::run::floor::processors;
use crate::run::sampling::{Counters, Measurement, Procedure, Title, settle, touch};
use crate::run::site::{Mount, json_of, run};

/// Pages that each clone reads and writes.
const TOUCHED: (u64, u64) = (1000, 250);

pub fn measure(context: &Context, mount: &Mount) -> Result<()> {
    if !context.wants(&["launch"]) {
        return Ok(());
    }
    let counts: &[(u64, &'static str)] = match context.is_quick() {
        true => &[(100, "stencil"), (10, "stencil-10")],
        false => &[(1000, "stencil"), (100, "stencil-100"), (10, "stencil-10")],
    };
    let mut subjects = Vec::new();
    for (count, name) in counts {
        subjects.push(stencil(context, mount, *count, name));
    }
    subjects.push(bare(context, mount, counts[0].0));
    let title = Title {
        name: "launch",
        about: "Launch 1000 clones, each of which reads 1000 pages and writes 250, until all have done that; then stop \
                all. stencil: simulated clones; stencil-N: N of them; bare: a loop of fork, open, mmap and as many \
                touches, then kill and wait. All start twice as many at a time as there are processors.",
        input: "dense",
        caches: "all pages and programs in the page cache; passthrough",
    };
    context.row(title, subjects)
}

/// Reads the template and the programs into the page cache: an earlier row has dropped them.
fn prepare(context: &Context, mount: &Mount) -> Result<()> {
    touch(context.site, &mount.memory("dense"), &["sweep", "normal"], None)?;
    let store = mount.store.to_string_lossy();
    let words = ["--store", &store, "clone", "bench:dense", "--simulate", "read=1p"];
    let launched = run(&mut context.site.stencil(&words));
    run(&mut context.site.stencil(&["stop", "--all"]))?;
    launched?;
    // The copies of 1000 clones take 1 GiB, and their page tables twice as much.
    settle(context.site, 4 * context.dense_bytes)
}

fn stencil<'a>(context: &'a Context, mount: &'a Mount, count: u64, name: &'a str) -> Procedure<'a> {
    let (read, write) = TOUCHED;
    let simulate = format!("read={read}p,write={write}p");
    let site = context.site;
    let (store, number) = (mount.store.display().to_string(), count.to_string());
    let launch = move || {
        site.stencil(&["--store", &store, "clone", "bench:dense", "-n", &number, "--simulate", &simulate])
    };
    Procedure {
        name,
        command: site.recorded(&launch()),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            prepare(context, mount)?;
            let before = Counters::now(site)?;
            let launched = run(&mut launch());
            let measurement = before.finish(site);
            let began = Instant::now();
            // After a failure too: no clone may stay.
            let stopped = site.stencil(&["stop", "--all"]).output();
            let stop_seconds = began.elapsed().as_secs_f64();
            let lines = launched?.lines().count() as u64;
            if lines != count || !stopped.is_ok_and(|output| output.status.success()) {
                return Err(Error::failed(format!("{lines} of {count} clones were launched and stopped")));
            }
            Ok(measurement?.count("clones", count).with("stop_seconds", stop_seconds))
        }),
    }
}

fn bare<'a>(context: &'a Context, mount: &'a Mount, count: u64) -> Procedure<'a> {
    let site = context.site;
    let (read, write) = TOUCHED;
    let parallel = 2 * processors() as u64;
    let mut command = Command::new(&site.fork_loop);
    command.arg(mount.memory("dense")).args([count, read, write, parallel].map(|number| number.to_string()));
    Procedure {
        name: "bare",
        command: site.recorded(&command),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            prepare(context, mount)?;
            let before = Counters::now(site)?;
            let found = json_of(&mut command)?;
            let seconds = |name: &str| found[name].as_f64().unwrap_or(f64::NAN);
            let measurement =
                Measurement::seconds(seconds("seconds")).with("stop_seconds", seconds("stop_seconds"));
            Ok(before.add_to(measurement, site)?.count("clones", count))
        }),
    }
}
