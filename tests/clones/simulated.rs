//! Simulated clones: they touch exactly the requested pages, in processes that outlive their launcher.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::procfs;

use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

const PAGE: usize = 4096;

fn image(pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE];
    for (number, page) in bytes.chunks_mut(PAGE).enumerate().filter(|(n, _)| n % 2 == 0) {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    bytes
}

fn dirty_pages(world: &TestMount, id: &str) -> u64 {
    let density = world.json(&["density"]);
    let clones = density["clones"].as_array().unwrap();
    let clone = clones.iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no {id} in {density:#}"));
    clone["dirty_pages"].as_u64().unwrap()
}

fn ids(launched: &Value) -> Vec<String> {
    launched["clones"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn simulated_clones_touch_exactly_the_requested_pages() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&image(4096), "web:v1");
        let launched = world.json(&["clone", "web:v1", "-n", "5", "--simulate", "read=10%,write=333p"]);
        assert_eq!(launched["digest"], digest.as_str());
        let ids = ids(&launched);
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 5);
        for (clone, id) in launched["clones"].as_array().unwrap().iter().zip(&ids) {
            assert_eq!(clone["touched"]["written_pages"], 333, "{clone}");
            assert_eq!(clone["touched"]["read_pages"], 410, "{clone}");
            assert_eq!(dirty_pages(&world, id), 333, "{serve} {clone}");
            let pid = clone["pid"].as_u64().unwrap() as u32;
            let stat = procfs::stat(pid).unwrap().unwrap();
            let process = ProcessId::of(pid).unwrap().unwrap();
            assert_eq!(clone["identity"].as_u64(), Some(process.identity));
            let parent = procfs::cmdline(stat.ppid).unwrap().unwrap_or_default();
            assert!(!parent.iter().any(|word| word == "launch-zygote"), "the zygote still runs: {parent:?}");
            let session = rustix::process::getsid(rustix::process::Pid::from_raw(pid as i32)).unwrap();
            assert_ne!(
                session,
                rustix::process::getsid(None).unwrap(),
                "the clone is in the session of the caller"
            );
            assert_eq!(std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 1);
        }
        let log = world.stencil(&["logs", &ids[0]]).ok().out;
        assert!(log.contains("wrote 333 pages of memory"), "{log}");
        let one = world.json(&["clone", "web:v1", "--simulate", "write=1p"]);
        let log = world.stencil(&["logs", one["clones"][0]["id"].as_str().unwrap()]).ok().out;
        assert!(log.contains("read 0 pages, wrote 1 page of memory"), "{log}");
        world.stencil(&["stop", "--all"]).ok();
        assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
        assert_eq!(std::fs::read_dir(world.runtime_dir().join("clones")).unwrap().count(), 0);
    }
}

#[test]
fn an_idle_simulated_clone_uses_little_memory() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&image(256), "web");
    let launched = world.json(&["clone", "web", "-n", "100", "--simulate", "read=0%,write=0%"]);
    let mut total = 0;
    for clone in launched["clones"].as_array().unwrap() {
        let pid = clone["pid"].as_u64().unwrap() as u32;
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = rollup.lines().find(|l| l.starts_with("Pss_Anon:")).unwrap();
        total += line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    }
    assert!(total / 100 <= 130, "{} KiB of anonymous memory each", total / 100);
    println!("an idle simulated clone: {} KiB of anonymous memory", total / 100);
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn writes_of_clones_do_not_change_the_template() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let bytes = image(2048);
    let digest = world.import_bytes(&bytes, "web");
    world.json(&["clone", "web", "-n", "4", "--simulate", "read=50%,write=50%,seed=9"]);
    world.stencil(&["stop", "--all"]).ok();
    assert!(std::fs::read(world.file(&digest, "memory")).unwrap() == bytes);
}

#[test]
fn writes_to_rom_raise_sigsegv_and_copy_no_page() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        let (ram, rom) = (world.dir().join("ram.img"), world.dir().join("rom.img"));
        std::fs::write(&ram, image(256)).unwrap();
        std::fs::write(&rom, image(64)).unwrap();
        let file = format!("firmware={},kind=rom", rom.display());
        world.stencil(&["import", ram.to_str().unwrap(), "vm", "--file", &file]).ok();

        let failed =
            world.stencil(&["clone", "vm", "-n", "2", "--simulate", "write=1p,file=firmware"]).exits(1);
        assert!(failed.err.contains("killed by SIGSEGV"), "{}", failed.err);
        let message = "ROM file 'firmware'; before the write the clone had 0 private pages of the file";
        assert!(failed.err.contains(message), "{}", failed.err);
        assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));

        // Reads of the ROM succeed, and so do writes to the RAM of the same template.
        world.json(&["clone", "vm", "--simulate", "read=100%,file=firmware"]);
        let writer = world.json(&["clone", "vm", "--simulate", "write=7p"]);
        assert_eq!(dirty_pages(&world, &ids(&writer)[0]), 7);
        world.stencil(&["stop", "--all"]).ok();
    }
}

#[test]
fn invalid_clone_requests_are_refused() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.import_bytes(&image(16), "web");
    world.stencil(&["clone", "web", "--simulate", "write=1p"]).exits(4).says("the store is not mounted");
    world.mount(&[]).ok();
    world.stencil(&["clone", "other", "--simulate", "write=1p"]).exits(4);
    world
        .stencil(&["clone", "web"])
        .exits(2)
        .says("template web:latest has no launch recipe, because it was not");
    world.stencil(&["clone", "web", "--simulate", "write=101%"]).exits(2);
    world.stencil(&["clone", "web", "--simulate", "write=17p"]).exits(2);
    world
        .stencil(&["clone", "web", "--simulate", "write=1p,file=nope"])
        .exits(2)
        .says("no memory file 'nope'");
    world.stencil(&["clone", "web", "--", "cat", "{state}"]).exits(1);
    world.stencil(&["stop", "cnone"]).exits(4).says("no clone has the id");
    world.stencil(&["logs", "../x"]).exits(4);
    assert_eq!(std::fs::read_dir(world.runtime_dir().join("launches")).unwrap().count(), 0);
}

/// Clones that become ready while SIGSTOP pauses their launcher are past their timeout and are killed.
#[test]
fn every_clone_of_a_paused_launcher_has_a_record() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&image(1024), "web");
    let words = ["clone", "web", "-n", "400", "--parallel", "400", "--timeout", "1", "--keep-going"];
    let mut launcher = world.command();
    launcher.args(words).args(["--simulate", "read=50%"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut launcher = launcher.spawn().unwrap();
    let records = || std::fs::read_dir(world.runtime_dir().join("clones")).map_or(0, Iterator::count);
    wait_for("a record", || (records() > 0).then_some(()));
    let pid = Pid::from_child(&launcher);
    kill_process(pid, Signal::STOP).unwrap();
    // Longer than the timeout of the clones.
    std::thread::sleep(Duration::from_millis(1500));
    kill_process(pid, Signal::CONT).unwrap();
    launcher.wait().unwrap();
    let listed = world.json(&["ps"]);
    let rows = listed["clones"].as_array().unwrap();
    for row in rows {
        assert_eq!((row["id"].is_string(), &row["state"]), (true, &"running".into()), "{row}");
    }
    println!("{} of 400 clones were ready in time", rows.len());
    world.stencil(&["stop", "--all"]).ok();
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
}
