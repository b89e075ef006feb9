//! `stencil density` on real clones: its totals, and the fields of its JSON. `alone::accounting` tests its audits.

use std::collections::BTreeMap;
use std::fs;

use rustix::process::Signal;
use serde_json::Value;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::mount::TestMount;
use crate::support::{daemon::drill, host};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// Mounts a store with a template of `size` bytes. Three quarters of its pages have distinct data, the rest are zero.
/// Returns the mount and the digest of the template.
pub fn world(serve: &str, size: u64) -> (TestMount, String) {
    let world = TestMount::new(serve);
    let mut bytes = vec![0u8; size as usize];
    let data = bytes.len() / 4 * 3;
    for (index, page) in bytes[..data].chunks_exact_mut(PAGE as usize).enumerate() {
        page[..8].copy_from_slice(&(index as u64 + 1).to_le_bytes());
    }
    let digest = world.import_bytes(&bytes, "web:1");
    (world, digest)
}

pub fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {value:#}"))
}

/// Asserts that the totals of `stencil density` are the sums of their parts.
pub fn assert_sums(density: &Value) {
    let totals = &density["totals"];
    let parts = [
        "template_bytes",
        "store_cache_bytes",
        "private_bytes",
        "page_table_bytes",
        "overhead_bytes",
        "disk_bytes",
    ];
    let sum: u64 = parts.iter().map(|part| number(totals, part)).sum();
    assert_eq!(number(totals, "host_bytes"), sum, "{totals:#}");
    let clones = density["clones"].as_array().unwrap();
    assert_eq!(number(totals, "clones"), clones.len() as u64);
    for field in ["mapped_bytes", "swap_bytes", "page_table_bytes", "disk_bytes"] {
        let sum: u64 = clones.iter().map(|clone| number(clone, field)).sum();
        assert_eq!(number(totals, field), sum, "{field}");
    }
    let resident: u64 =
        density["templates"].as_array().unwrap().iter().map(|t| number(t, "resident_bytes")).sum();
    assert_eq!(number(totals, "template_bytes"), resident);
}

/// Returns the size of the copied memory in the mappings of a clone that begin at these addresses, in bytes:
/// `Private_Dirty` plus `Shared_Dirty` of `/proc/PID/smaps`.
fn smaps_dirty(pid: u64, starts: &[u64]) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut in_mapping, mut sum) = (false, 0);
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields[0].contains('-') && fields.len() >= 5 && !fields[0].ends_with(':') {
            let start = fields[0].split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok());
            in_mapping = starts.contains(&start.unwrap());
        } else if in_mapping && matches!(fields[0], "Private_Dirty:" | "Shared_Dirty:") {
            sum += fields[1].parse::<u64>().unwrap() * 1024;
        }
    }
    sum
}

#[test]
fn host_memory_is_the_sum_of_its_parts_and_matches_smaps() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (world, digest) = world(serve, 32 * MIB);
        world.stencil(&["clone", "web:1", "-n", "12", "--simulate", "read=100p,write=300p"]).ok();
        let density = world.json(&["density"]);
        assert_sums(&density);
        let clones = density["clones"].as_array().unwrap();
        assert_eq!(clones.len(), 12);
        for clone in clones {
            assert_eq!(number(clone, "dirty_pages"), 300, "{clone:#}");
            assert_eq!(
                (clone["kind"].as_str(), clone["digest"].as_str()),
                (Some("simulated"), Some(&*digest))
            );
            let maps = clone["maps"].as_array().unwrap();
            let starts: Vec<u64> = maps.iter().map(|map| number(map, "start")).collect();
            assert_eq!(number(clone, "private_bytes"), smaps_dirty(number(clone, "pid"), &starts));
        }
        let totals = &density["totals"];
        assert_eq!(number(totals, "private_bytes"), 12 * 300 * PAGE);
        assert_eq!(number(&density["templates"][0], "clones"), 12);
        assert_eq!(density["templates"][0]["serving"], serve);
        assert_eq!(number(&density["templates"][0], "data_bytes"), 24 * MIB);
        // `copied_bytes` is the cost of the same clones without sharing: all data of the template, the written zero
        // pages, page tables and overhead.
        let copied = number(totals, "copied_bytes");
        let tables_and_overhead = number(totals, "page_table_bytes") + number(totals, "overhead_bytes");
        let written_zero = copied - tables_and_overhead - 12 * 24 * MIB;
        // A quarter of the template is zero, and the 300 written pages are spread evenly.
        assert!(
            (12 * 40 * PAGE..12 * 120 * PAGE).contains(&written_zero),
            "{} written zero pages",
            written_zero / PAGE
        );
        assert!(
            totals["lazy_ratio"]
                .as_f64()
                .is_some_and(|lazy| lazy < totals["sharing_ratio"].as_f64().unwrap())
        );
        world.stencil(&["stop", "--all"]).ok();
        assert_eq!(number(&world.json(&["density"])["totals"], "clones"), 0);
    }
}

#[test]
fn two_tags_of_one_template_share_its_resident_pages() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let (world, _) = world(serve, 16 * MIB);
        world.stencil(&["tag", "web:1", "shop:7"]).ok();
        let mut actors: Vec<Actor> = (0..2).map(|_| Actor::start()).collect();
        for (actor, tag) in actors.iter_mut().zip(["web/1", "shop/7"]) {
            let path = world.mountpoint().join("templates").join(tag).join("memory");
            actor.tell(&format!("map 0 {} 0 {} ro", path.display(), 16 * MIB));
            actor.read_pages(0, 0..(16 * MIB / PAGE));
        }
        let density = world.json(&["density"]);
        assert_eq!(number(&density["totals"], "template_bytes"), 16 * MIB, "{density:#}");
        assert_eq!(number(&density["totals"], "clones"), 2);
        let by_ino: BTreeMap<u64, usize> =
            density["clones"].as_array().unwrap().iter().fold(BTreeMap::new(), |mut map, clone| {
                *map.entry(number(&clone["maps"][0], "ino")).or_default() += 1;
                map
            });
        assert_eq!(by_ino.into_values().collect::<Vec<_>>(), [2]);
    }
}

#[test]
fn density_scans_each_page_of_a_clone_once() {
    /// Pages of the address space of a process: x86-64 with four-level page tables.
    const ADDRESS_SPACE: u64 = 0x7_FFFF_FFFF;
    let _host = host::shared();
    let (world, digest) = world("passthrough", 64 * MIB);
    world.stencil(&["clone", "web:1", "-n", "8", "--simulate", "read=1000p,write=250p"]).ok();
    // A clone that Stencil has not launched.
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 64 * MIB));
    actor.write_pages(0, 0..100);
    let output = world.command().args(["-vv", "density"]).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    let line = log.lines().find(|line| line.contains("pages scanned")).unwrap_or_else(|| panic!("{log}"));
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [clones, pages, reads] = numbers[..] else { panic!("{line}") };
    assert_eq!(clones, 9, "{line}");
    // One page of a process that Stencil did not launch shows whether its writes are tracked.
    assert!(pages <= clones * ADDRESS_SPACE + 1, "a page is scanned twice: {line}");
    // The copied pages lie apart. One read for each would be 250 reads for each clone.
    assert!(reads <= clones * 24, "{line}");
}

/// Clones that are stopped by SIGSTOP and resumed on drop.
pub struct StoppedClones(Vec<ProcessId>);

impl StoppedClones {
    /// Stops every clone in the output of `stencil ps --json`.
    pub fn of(ps: &Value) -> StoppedClones {
        let clones = ps["clones"].as_array().unwrap();
        let processes: Vec<ProcessId> = clones
            .iter()
            .map(|clone| ProcessId::of(number(clone, "pid") as u32).unwrap().expect("the clone is alive"))
            .collect();
        let all = StoppedClones(processes);
        // A thread inside the kernel stops only after its system call or page fault, which may cover 2 MiB.
        all.0.iter().for_each(|process| drill::stop(*process));
        all
    }
}

impl Drop for StoppedClones {
    fn drop(&mut self) {
        for process in &self.0 {
            let _ = process.signal(Signal::CONT);
        }
    }
}

#[test]
fn density_json_has_the_promised_fields() {
    let _host = host::shared();
    let (world, _) = world("decode", 4 * MIB);
    world.stencil(&["clone", "web:1", "-n", "2", "--simulate", "write=3p"]).ok();
    let density = world.json(&["density", "--audit"]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&density), "schema templates clones totals headroom audit");
    assert_eq!(
        keys(&density["templates"][0]),
        "digest tags serving size_bytes data_bytes resident_bytes resident_zero_bytes store_cache_bytes clones \
         bytes_per_further_clone"
    );
    assert_eq!(
        keys(&density["clones"][0]),
        "id pid pids reference command cgroup uid digest kind labels mapped_bytes mapped_clean_bytes private_bytes swap_bytes \
         dirty_pages replaced_pages page_table_bytes overhead_bytes disk_bytes pmd_mapped_bytes maps"
    );
    assert_eq!(
        keys(&density["clones"][0]["maps"][0]),
        "digest file dev ino start offset length serving anonymous"
    );
    assert_eq!(
        keys(&density["totals"]),
        "clones mapped_bytes copied_bytes template_bytes store_cache_bytes private_bytes page_table_bytes \
         overhead_bytes disk_bytes swap_bytes host_bytes bytes_per_further_clone clones_per_gib sharing_ratio lazy_ratio \
         overcommit_ratio"
    );
    assert_eq!(
        keys(&density["headroom"]),
        "available_bytes commit_left_bytes commit_bytes_per_clone further_clones"
    );
    // The table has the same figures as the JSON.
    let text = world.stencil(&["density", "--wide"]).ok().out;
    for clone in density["clones"].as_array().unwrap() {
        let line = text.lines().find(|line| line.starts_with(clone["id"].as_str().unwrap())).unwrap();
        assert!(line.split_whitespace().any(|word| word == "3"), "{line}");
    }
}
