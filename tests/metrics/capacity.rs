//! `stencil capacity`: its limits, its text and its errors. `alone::memory::capacity` tests its interval.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::clones::accounting::{MIB, PAGE, number, world};
use crate::support::host;
use crate::support::mount::{TestMount, temporary};

/// Lays out cgroups of version 2 as below /sys/fs/cgroup: a tenant with a limit, and a group without one inside.
fn unified_groups(top: &Path, limit: u64) {
    let inner = top.join("tenant.slice/vm.scope");
    fs::create_dir_all(&inner).unwrap();
    let stat =
        |inactive: u64| format!("anon 1048576\nkernel 65536\ninactive_file {inactive}\nactive_file 0\n");
    for (directory, max, high) in [
        (inner.clone(), "max".to_owned(), "max".to_owned()),
        (top.join("tenant.slice"), limit.to_string(), (limit / 2).to_string()),
    ] {
        let files = [("memory.max", max), ("memory.high", high), ("memory.current", (4 * MIB).to_string())];
        for (name, text) in files {
            fs::write(directory.join(name), format!("{text}\n")).unwrap();
        }
        fs::write(directory.join("memory.stat"), stat(2 * MIB)).unwrap();
        fs::write(directory.join("cgroup.procs"), "").unwrap();
    }
}

fn resource<'a>(reply: &'a Value, name: &str) -> &'a Value {
    let all = reply["resources"].as_array().unwrap();
    all.iter().find(|r| r["resource"] == name).unwrap_or_else(|| panic!("no {name} in {reply:#}"))
}

/// Launches clones that all have the same memory.
fn launched() -> TestMount {
    let (world, _) = world("passthrough", 16 * MIB);
    world.stencil(&["clone", "web:1", "-n", "8", "--simulate", "read=100p,write=512p"]).ok();
    world
}

#[test]
fn the_limit_of_a_unified_cgroup_above_ends_first() {
    let _host = host::shared();
    let world = launched();
    let top = temporary("cgroup-");
    unified_groups(top.path(), 100 * MIB);
    let group = top.path().join("tenant.slice/vm.scope");
    let group = group.to_str().unwrap();
    let reply = world.json(&["capacity", "web:1", "--memcg", group, "--reserve", "10M"]);
    assert_eq!(reply["ends_first"], "cgroup_memory", "{reply:#}");
    let memory = resource(&reply, "cgroup_memory");
    assert_eq!(memory["limit"], top.path().join("tenant.slice").to_str().unwrap());
    // Limit − use + cached files − reserve; the cgroup has none of the template's pages.
    assert_eq!(number(&memory["free_bytes"], "estimate"), (100 - 4 + 2 - 10) * MIB);
    let processors = std::thread::available_parallelism().unwrap().get() as u64;
    assert_eq!(number(&memory["free_bytes"], "upper"), 88 * MIB + processors * 64 * PAGE);
    let resident = number(&reply["template"], "resident_bytes");
    assert_eq!(number(&memory["free_bytes"], "lower"), 88 * MIB - resident.max(12 * MIB));
    let per_clone = &memory["bytes_per_clone"];
    for bound in ["lower", "estimate", "upper"] {
        assert!((2 * MIB..3 * MIB).contains(&number(per_clone, bound)), "{reply:#}");
    }
    let further = number(&memory["further_clones"], "estimate");
    assert_eq!(further, 88 * MIB / number(per_clone, "estimate"));
    let warning = reply["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("memory.high of the cgroup"), "{warning}");
    // Tasks of the present clones do not count for this cgroup; its own do.
    for (name, text) in [("pids.max", "50"), ("pids.current", "20")] {
        fs::write(Path::new(group).join(name), text).unwrap();
    }
    let tasks = resource(&world.json(&["capacity", "web:1", "--memcg", group]), "tasks").clone();
    assert_eq!(number(&tasks, "free_tasks"), 30, "{tasks}");
    // A cgroup with memory.high alone slows the clones down.
    fs::write(top.path().join("tenant.slice/memory.max"), "max").unwrap();
    let reply = world.json(&["capacity", "web:1", "--memcg", group]);
    let warnings = reply["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{reply:#}");
    assert!(warnings[0].as_str().unwrap().starts_with("memory.high of the cgroup"), "{reply:#}");
}

#[test]
fn each_limit_of_the_host_is_listed() {
    let _host = host::shared();
    let world = launched();
    let reply = world.json(&["capacity", "web:1"]);
    assert_eq!((number(&reply, "clones"), number(&reply, "measured_clones")), (8, 8));
    let host = resource(&reply, "host_memory");
    assert_eq!(number(&reply["further_clones"], "estimate"), {
        let all = reply["resources"].as_array().unwrap();
        all.iter().filter_map(|r| r["further_clones"]["estimate"].as_u64()).min().unwrap()
    });
    assert!(number(&host["free_bytes"], "lower") < number(&host["free_bytes"], "upper"));
    let tasks = resource(&reply, "tasks");
    assert_eq!(number(&tasks["tasks_per_clone"], "upper"), 1);
    assert!(number(tasks, "free_tasks") > 0);
    let mappings = resource(&reply, "mappings");
    assert!((10..200).contains(&number(&mappings["mappings_per_clone"], "upper")), "{mappings}");
    assert!(mappings["further_clones"].is_null());
    let missing = number(resource(&reply, "template_cache"), "missing_bytes");
    let template = &reply["template"];
    let expected = number(template, "data_bytes").saturating_sub(number(template, "resident_bytes"));
    assert_eq!(missing, expected);
    // A reserve of more than all memory leaves no room.
    let none = world.json(&["capacity", "web:1", "--reserve", "100T"]);
    assert_eq!(number(&none["further_clones"], "upper"), 0, "{none:#}");
    assert_eq!(none["ends_first"], "host_memory");
}

#[test]
fn greater_ages_than_measured_widen_the_interval() {
    let _host = host::shared();
    let world = launched();
    let width = |words: &[&str]| {
        let reply = world.json(&[&["capacity", "web:1"], words].concat());
        let further = &reply["further_clones"];
        let bounds = ["lower", "upper"].map(|bound| number(further, bound) as f64);
        ((bounds[1] - bounds[0]) / number(further, "estimate") as f64, reply)
    };
    let (now, _) = width(&[]);
    let (later, reply) = width(&["--for", "86400"]);
    assert!(now < 0.4 && later > 0.8, "{now} {later} {reply:#}");
    assert!(reply["warnings"][0].as_str().unwrap().contains("no clone was measured at this age"));
    assert!(reply["warnings"][1].as_str().unwrap().contains("about the same age"), "{reply:#}");
}

#[test]
fn the_text_has_at_most_15_lines_of_100_columns() {
    let _host = host::shared();
    let world = launched();
    let top = temporary("cgroup-with-a-name-that-is-longer-than-the-column-of-the-limits-");
    let top = top.path().join("tenant.slice");
    unified_groups(&top, 100 * MIB);
    let group = top.join("tenant.slice/vm.scope");
    let words = ["capacity", "web:1", "--for", "86400", "--memcg", group.to_str().unwrap()];
    let text = world.stencil(&words).ok().out;
    assert!(text.lines().count() <= 15, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(text.contains("ends first: memory of the cgroup"), "{text}");
}

#[test]
fn errors_say_what_to_do() {
    let _host = host::shared();
    let (world, _) = world("passthrough", 4 * MIB);
    let run = world.stencil(&["capacity", "web:1"]).exits(4).says("was measured");
    assert!(run.err.contains("launch some clones"), "{run:?}");
    world.stencil(&["clone", "web:1", "--simulate", "write=10p"]).ok();
    let run = world.stencil(&["capacity", "web:1", "--memcg", "/proc"]).exits(4).says("no memory cgroup");
    assert!(run.err.contains("memory.max"), "{run:?}");
    let top = temporary("cgroup-");
    for text in ["", "-5", "1e9"] {
        fs::write(top.path().join("memory.max"), text).unwrap();
        fs::write(top.path().join("memory.current"), "7").unwrap();
        let run = world.stencil(&["capacity", "web:1", "--memcg", top.path().to_str().unwrap()]);
        run.exits(1).says("expected a number");
    }
}
