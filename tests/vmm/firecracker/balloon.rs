//! The balloon of a real Firecracker: it maps other memory over pages of the template.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::firecracker::MEMORY_MIB;
use crate::vmm::firecracker_guests::{import_snapshot, launch, request};

const PAGE: u64 = 4096;

/// Number of pages that one command of the guest gives to the balloon.
const PAGES: u64 = 256;

/// First page of the known data.
const KNOWN: u64 = (64 << 20) / PAGE;

/// The last pages of the memory.
const LAST: u64 = (MEMORY_MIB << 20) / PAGE - PAGES;

/// Writes a diff of the process: its dirty pages, and holes.
fn write_diff(pid: u64, ranges: &[Value], diff: &Path) {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let file = File::create(diff).unwrap();
    file.set_len(MEMORY_MIB << 20).unwrap();
    for range in ranges {
        let number = |field: &str| range[field].as_u64().unwrap();
        let mut bytes = vec![0; (number("pages") * PAGE) as usize];
        memory.read_exact_at(&mut bytes, number("address")).unwrap();
        file.write_all_at(&bytes, number("first_page") * PAGE).unwrap();
    }
}

#[test]
fn pages_of_the_balloon_are_dirty_and_part_of_a_diff() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 0});
    drop(import_snapshot(&world, &[("PUT /balloon", balloon)]));
    let mut clone = launch(&world, 1, &[]).remove(0);
    assert_eq!(clone.serial.ask('a'), "K");
    let measured = |world: &TestMount| world.json(&["density"])["clones"][0].clone();
    let before = measured(&world);
    assert_eq!(before["replaced_pages"], 0);

    // The known words of the pages are gone: the guest reads zeros there.
    assert_eq!(clone.serial.ask('b'), "00000000 00000000 L");
    request(&clone.dir, "PATCH /vm", &json!({"state": "Paused"}));
    let dirty = world.json(&["dirty", &clone.pid.to_string(), "--ranges"]);
    let of = |first: u64| -> Vec<Value> {
        let all = dirty["ranges"].as_array().unwrap().iter();
        all.filter(|range| range["replaced"] == true && range["first_page"] == first).cloned().collect()
    };
    assert_eq!(dirty["replaced_pages"], PAGES, "{dirty:#}");
    assert_eq!(of(KNOWN)[0]["pages"], PAGES, "{dirty:#}");
    let after = measured(&world);
    assert_eq!((&after["replaced_pages"], &after["dirty_pages"]), (&PAGES.into(), &dirty["dirty_pages"]));
    let bytes = |field: &str| after[field].as_u64().unwrap() as i64 - before[field].as_u64().unwrap() as i64;
    assert_eq!(bytes("mapped_bytes"), -((PAGES * PAGE) as i64));
    assert!(bytes("private_bytes") >= PAGE as i64, "the page that the guest has written is counted");
    let audit = world.json(&["density", "--audit"])["audit"]["frames"].clone();
    assert_eq!(audit["private_bytes"], audit["private_accounted"], "{audit}");
    let text = world.stencil(&["dirty", &clone.pid.to_string()]).ok().out;
    assert!(text.contains("256 replaced by other memory"), "{text}");

    // At the end of the memory, no mapping of the template follows.
    request(&clone.dir, "PATCH /vm", &json!({"state": "Resumed"}));
    assert_eq!(clone.serial.ask('e'), "00000000 00000000 L");
    assert_eq!(clone.serial.ask('w'), "W");
    request(&clone.dir, "PATCH /vm", &json!({"state": "Paused"}));
    let full = world.dir().join("full");
    fs::create_dir(&full).unwrap();
    let files = json!({"snapshot_path": full.join("state"), "mem_file_path": full.join("memory")});
    request(&clone.dir, "PUT /snapshot/create", &files);
    let bitmap = world.dir().join("bitmap");
    let dirty = world.json(&["dirty", &clone.pid.to_string(), "--ranges"]);
    world.stencil(&["dirty", &clone.pid.to_string(), "--bitmap", bitmap.to_str().unwrap()]).ok();
    assert_eq!(dirty["replaced_pages"], 2 * PAGES, "{dirty:#}");
    let set: u32 = fs::read(&bitmap).unwrap().iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(u64::from(set), dirty["dirty_pages"].as_u64().unwrap());
    let bit = |page: u64| fs::read(&bitmap).unwrap()[page as usize / 8] >> (page % 8) & 1;
    assert_eq!([KNOWN - 1, KNOWN, LAST - 1, LAST, LAST + PAGES - 1].map(bit), [0, 1, 0, 1, 1]);

    // A diff made from the ranges, applied to the template, is the guest's memory as Firecracker sees it.
    let diff = world.dir().join("diff");
    fs::create_dir(&diff).unwrap();
    write_diff(clone.pid, dirty["ranges"].as_array().unwrap(), &diff.join("memory"));
    fs::copy(full.join("state"), diff.join("state")).unwrap();
    world.stencil(&["import", diff.to_str().unwrap(), "fc:2", "--base", "fc:1"]).ok();
    let back = world.dir().join("back");
    fs::create_dir(&back).unwrap();
    world.stencil(&["export", "fc:2", back.to_str().unwrap()]).ok();
    assert!(fs::read(back.join("memory")).unwrap() == fs::read(full.join("memory")).unwrap());
    world.stencil(&["stop", "--all"]).ok();
}
