//! The row about measuring the memory of clones. The floor is a program that only scans the same mappings.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use stencilfs::error::{Error, Result};

use crate::run::Context;
use crate::run::sampling::{Counters, Measurement, Procedure, Title};
use crate::run::site::{Mount, json_of, run};

/// Number of clones of a full and of a short run.
const CLONES: (u64, u64) = (1000, 100);

pub fn measure(context: &Context, mount: &Mount) -> Result<()> {
    if !context.wants(&["density"]) {
        return Ok(());
    }
    let count = if context.is_quick() { CLONES.1 } else { CLONES.0 };
    let (store, number) = (mount.store.display().to_string(), count.to_string());
    let words = ["--store", &store, "clone", "bench:dense", "-n", &number];
    let launched =
        run(&mut context.site.stencil(&[&words[..], &["--simulate", "read=1000p,write=250p"]].concat()));
    let measured = launched.and_then(|_| row(context, &store, count));
    run(&mut context.site.stencil(&["stop", "--all"]))?;
    measured
}

fn row(context: &Context, store: &str, count: u64) -> Result<()> {
    let site = context.site;
    let list = site.path("mappings");
    fs::write(&list, mappings(&json_of(&mut site.stencil(&["--json", "--store", store, "density"]))?))
        .map_err(|e| Error::io("cannot write", &list, e))?;
    let title = Title {
        name: "density",
        about: "Measure the memory of 1000 simulated clones, each of which has read 1000 pages and written 250. stencil: \
                density on all processors; stencil-1: density on one; bare: a loop of open and PAGEMAP_SCAN over the \
                template mappings of the same clones, on one processor.",
        input: "dense",
        caches: "all pages and programs in the page cache; passthrough",
    };
    let density = || site.stencil(&["--store", store, "density"]);
    let mut bare = Command::new(&site.scan_loop);
    bare.arg(&list);
    let timed = |mut command: Command| {
        move |_| {
            let before = Counters::now(site)?;
            let began = Instant::now();
            run(&mut command)?;
            let measurement = Measurement::seconds(began.elapsed().as_secs_f64());
            Ok(before.add_to(measurement, site)?.count("clones", count))
        }
    };
    let subject = |name, command: &Command, take| Procedure {
        name,
        command: site.recorded(command),
        read_ahead_bytes: None,
        take,
    };
    let scan = {
        let mut command = on_first_processor(&bare);
        move |_| {
            let before = Counters::now(site)?;
            let found = json_of(&mut command)?;
            if found["copied_pages"].as_u64().is_none_or(|pages| pages < 250 * count) {
                return Err(Error::damage(format!("the bare scan has not found the copied pages: {found}")));
            }
            let measurement = Measurement::seconds(found["seconds"].as_f64().unwrap_or(f64::NAN));
            Ok(before.add_to(measurement, site)?.count("clones", count))
        }
    };
    context.row(
        title,
        vec![
            subject("stencil", &density(), Box::new(timed(density()))),
            subject(
                "stencil-1",
                &on_first_processor(&density()),
                Box::new(timed(on_first_processor(&density()))),
            ),
            subject("bare", &on_first_processor(&bare), Box::new(scan)),
        ],
    )
}

/// One line for each template mapping: process, first address, end.
fn mappings(density: &Value) -> String {
    let of_clone = |clone: &Value| {
        let pid = clone["pid"].as_u64().unwrap_or_default();
        let line = |map: &Value| {
            let start = map["start"].as_u64().unwrap_or_default();
            format!("{pid} {start:x} {:x}\n", start + map["length"].as_u64().unwrap_or_default())
        };
        map_array(&clone["maps"], line)
    };
    map_array(&density["clones"], of_clone)
}

fn map_array(array: &Value, text: impl Fn(&Value) -> String) -> String {
    array.as_array().into_iter().flatten().map(text).collect()
}

/// The same command on the first processor.
fn on_first_processor(command: &Command) -> Command {
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", "0"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => pinned.env(name, value),
            None => pinned.env_remove(name),
        };
    }
    pinned
}
