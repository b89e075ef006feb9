//! Real Firecrackers: a booted guest becomes a template, and clones of it run while servers are killed.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::clones::vmm_api::{Api, Server};
use stencilfs::sys::memory::cachestat;
use stencilfs::sys::memory::pagemap::{Categories, Pagemap, Query};

use crate::support::daemon::drill::{Drill, is_read};
use crate::support::host;
use crate::support::mount::{Run, TestMount};
use crate::support::vm::firecracker::{Firecracker, Serial, WRITTEN_PAGES, program};

/// Number of clones.
const CLONES: usize = 8;

/// Number of kills of the server. At each kill the guests check 32 pages; in the end they check all 1024.
const KILLS: usize = 20;

/// Boots a guest in the directory `source`. `more` are requests before the start.
pub fn boot(world: &TestMount, more: &[(&str, Value)]) -> Firecracker {
    let directory = world.dir().join("source");
    fs::create_dir_all(&directory).unwrap();
    Firecracker::boot(&directory, more)
}

/// Boots a guest and imports its snapshot as `fc:1`. Returns the paused Firecracker.
pub fn import_snapshot(world: &TestMount, more: &[(&str, Value)]) -> Firecracker {
    let source = boot(world, more);
    let directory = world.dir().join("source");
    source.snapshot("Full", &directory);
    import(world, &directory).ok();
    source
}

pub fn import(world: &TestMount, directory: &Path) -> Run {
    let [memory, state] = ["memory", "state"].map(|name| directory.join(name).display().to_string());
    world.stencil(&["import", &memory, "fc:1", "--state", &state, "--format", "firecracker"])
}

/// A running clone.
pub struct Clone {
    pub id: String,
    pub pid: u64,
    pub serial: Serial,
    /// Directory of the clone.
    pub dir: PathBuf,
}

impl Clone {
    /// Opens the serial port of a clone, given as `stencil --json clone` prints it.
    pub fn of(clone: &Value) -> Clone {
        let dir = PathBuf::from(clone["dir"].as_str().unwrap());
        Clone {
            id: clone["id"].as_str().unwrap().to_owned(),
            pid: clone["pid"].as_u64().unwrap(),
            serial: Serial::of_clone(&dir),
            dir,
        }
    }
}

/// Launches clones.
pub fn launch(world: &TestMount, count: usize, more: &[&str]) -> Vec<Clone> {
    let (count, program) = (count.to_string(), program("firecracker"));
    let words = ["clone", "fc:1", "-n", &count, "--firecracker", program.to_str().unwrap()];
    let launched = world.json(&[&words, more].concat());
    launched["clones"].as_array().unwrap().iter().map(Clone::of).collect()
}

/// Runs a request on the API socket of a clone.
pub fn request(directory: &Path, request: &str, body: &Value) {
    let mut api = Api::connect(Server::Firecracker, &directory.join("api.sock")).unwrap();
    api.run(request, body, Instant::now() + Duration::from_secs(60)).unwrap();
}

/// The number of dirty pages of a process.
pub fn dirty(world: &TestMount, pid: u64) -> u64 {
    world.json(&["dirty", &pid.to_string()])["dirty_pages"].as_u64().unwrap()
}

/// Sends a command to all guests, then waits for the answers.
#[track_caller]
pub fn ask_all(clones: &mut [Clone], command: char, answer: &str) {
    clones.iter_mut().for_each(|clone| clone.serial.send(command));
    for clone in clones {
        assert_eq!(clone.serial.answer(), answer, "clone {}, command {command}", clone.id);
    }
}

fn clones_survive_server_kills(serve: &str) {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", serve]);
    let source = boot(&world, &[]);
    world.stencil(&["capture", source.socket().to_str().unwrap(), "fc:1", "--quit"]).ok();
    drop(source);
    let digest = world.json(&["inspect", "fc:1"])["digest"].as_str().unwrap().to_owned();
    world.wait_until_verified(&digest);
    let mut clones = launch(&world, CLONES, &[]);

    // After one command, each guest has written to the pages of its stack and of its variables.
    ask_all(&mut clones, 'r', "K");
    let before: Vec<u64> = clones.iter().map(|clone| dirty(&world, clone.pid)).collect();
    println!("{serve}: each Firecracker has copied {} pages before its guest wrote", before[0]);
    ask_all(&mut clones, 'w', "W");
    let after: Vec<u64> = clones.iter().map(|clone| dirty(&world, clone.pid)).collect();
    assert_eq!(before, [before[0]; CLONES]);
    assert_eq!(after, [before[0] + WRITTEN_PAGES; CLONES]);
    let audit = world.json(&["density", "--audit"])["audit"]["frames"].clone();
    let error = audit["error_percent"].as_f64().unwrap();
    assert!(error.abs() <= 0.5, "{serve}: {audit}");

    let memory = world.file(&digest, "memory");
    let mut drill = Drill::new(&world);
    for _ in 0..KILLS {
        // A server that answers no request before its end would be restarted after a pause.
        let file = File::open(&memory).unwrap();
        // Pages that no guest has touched are read again. With `--serve decode`, the server is killed during such a
        // READ.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        clones.iter_mut().for_each(|clone| clone.serial.send('m'));
        if serve != "decode" || drill.kill_when(Duration::from_millis(500), is_read).is_none() {
            drill.kill();
        }
        for clone in &mut clones {
            assert_eq!(clone.serial.answer(), "K", "clone {} after kill {}", clone.id, drill.kills().len());
        }
    }
    drill.report(&format!("Firecracker guests, {serve}"), &[]);
    ask_all(&mut clones, 'a', "K");
    ask_all(&mut clones, 'r', "K");
    let all = world.json(&["ps"]);
    let answers = format!("K\nW\n{}", "K\n".repeat(KILLS + 2));
    for (clone, row) in clones.iter().zip(all["clones"].as_array().unwrap()) {
        assert_eq!(
            (row["kind"].as_str(), row["state"].as_str()),
            (Some("firecracker"), Some("running")),
            "{row}"
        );
        let logs = world.json(&["logs", &clone.id]);
        assert!(logs["log"].as_str().unwrap().contains("Running Firecracker v"), "{logs}");
        assert_eq!((&logs["serial"], &logs["sockets"]), (&answers.as_str().into(), &Value::Array(vec![])));
    }

    let stopped = world.json(&["stop", "--all"]);
    let stopped = stopped["stopped"].as_array().unwrap();
    assert_eq!(stopped.iter().map(|clone| &clone["how"]).collect::<Vec<_>>(), ["stopped"; CLONES]);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    assert_eq!(world.processes(), vec![]);
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
    assert_eq!(fs::read_dir(world.runtime_dir().join("clones")).unwrap().count(), 0);
}

#[test]
fn clones_of_a_firecracker_survive_server_kills_by_decode() {
    clones_survive_server_kills("decode");
}

#[test]
fn clones_of_a_firecracker_survive_server_kills_by_passthrough() {
    clones_survive_server_kills("passthrough");
}

#[test]
fn clones_of_a_firecracker_survive_server_kills_by_kernel_decode() {
    clones_survive_server_kills("kernel");
}

/// The memory that the commands `r` and `a` of the guest read: guest addresses.
const READ: [Range<u64>; 2] = [4 << 20..6 << 20, 64 << 20..68 << 20];

/// The pages of these guest addresses that 2 MiB entries map.
fn large_pages(world: &TestMount, pid: u64, addresses: &Range<u64>) -> u64 {
    let density = world.json(&["density"]);
    let maps = density["clones"][0]["maps"].as_array().unwrap();
    let map = maps.iter().find(|map| map["file"] == "memory").unwrap();
    let start = map["start"].as_u64().unwrap() - map["offset"].as_u64().unwrap();
    let query = Query { all: Categories::FILE | Categories::HUGE, ..Query::default() };
    let found =
        Pagemap::open(pid as u32).unwrap().scan(start + addresses.start..start + addresses.end, &query);
    found.unwrap().iter().map(|region| (region.range.end - region.range.start) / 4096).sum()
}

#[test]
fn memory_that_is_read_is_mapped_by_large_entries_and_a_write_splits_one() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    host::measured(|| {
        world.stencil(&["stop", "--all"]).ok();
        host::compact_memory();
        let mut clone = launch(&world, 1, &[]).remove(0);
        for command in ['r', 'a'] {
            assert_eq!(clone.serial.ask(command), "K");
        }
        let large = READ.map(|range| large_pages(&world, clone.pid, &range));
        println!("{large:?} of 512 and 1024 pages that the guest has read are mapped by 2 MiB entries");
        if large.iter().sum::<u64>() * 10 < (512 + 1024) * 9 {
            return Err(format!("{large:?} of 512 and 1024 pages"));
        }
        // All writes of this command go to the same 2 MiB.
        assert_eq!(clone.serial.ask('w'), "W");
        let after = READ.map(|range| large_pages(&world, clone.pid, &range));
        assert_eq!(after, [large[0].saturating_sub(512), large[1]]);
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", clone.pid)).unwrap();
        let fields = smaps.lines().filter_map(|line| line.strip_prefix("FilePmdMapped:"));
        let mapped: u64 =
            fields.map(|value| value.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum();
        assert!(mapped >= after.iter().sum::<u64>() * 4, "{mapped} KiB");
        Ok(())
    });
    world.stencil(&["stop", "--all"]).ok();
}

/// The working set of one guest is warmed; a second guest then uses hardly any other pages, and causes few READs.
#[test]
fn a_warmed_guest_finds_its_pages_in_memory() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    drop(import_snapshot(&world, &[]));
    let digest = world.json(&["inspect", "fc:1"])["digest"].as_str().unwrap().to_owned();
    let record = |clone: &Clone| world.json(&["working-set", "record", &clone.pid.to_string()]);
    let start = world.counter("reads");
    let mut first = launch(&world, 1, &[]).remove(0);
    for command in ['r', 'a', 'w'] {
        first.serial.ask(command);
    }
    let cold = world.counter("reads") - start;
    let recorded = record(&first);
    assert_eq!(recorded["recorded_written_pages"], dirty(&world, first.pid));
    world.stencil(&["stop", "--all"]).ok();
    let file = File::open(world.file(&digest, "memory")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let warm = world.json(&["warm", "fc:1"])["warmed"].clone();
    assert_eq!(warm["read_pages"], recorded["pages"], "{warm}");
    let resident = cachestat::cached(&file).unwrap().get();
    let pages = recorded["pages"].as_u64().unwrap();
    assert!(pages <= resident && 10 * resident <= 13 * pages, "{resident} of {pages} pages");

    let reads = world.counter("reads");
    let mut second = launch(&world, 1, &["--no-warm"]).remove(0);
    for command in ['r', 'a', 'w'] {
        second.serial.ask(command);
    }
    let found = world.json(&["warm", "fc:1", "--dry-run"])["comparison"].clone();
    let [touched, hits] = ["touched_pages", "hits"].map(|name| found[name].as_u64().unwrap());
    assert!(10 * hits >= 9 * touched, "{found}");
    let warm = world.counter("reads") - reads;
    println!("a set of {pages} pages; {found}; READs: {cold} without, {warm} with warming");
    // The state file is not part of the set, and another scenario may need memory.
    assert!(4 * warm <= cold, "{cold} READs without, {warm} with warming");
}

#[test]
fn the_printed_body_restores_a_guest() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    let body = world.json(&["args", "fc:1", "--vmm", "firecracker"])["body"].clone();
    let directory = world.dir().join("restored");
    fs::create_dir(&directory).unwrap();
    let mut restored = Firecracker::start(&directory);
    restored.load(&body);
    for command in ['r', 'a'] {
        assert_eq!(restored.serial.ask(command), "K");
    }
    let before = dirty(&world, restored.pid().into());
    assert_eq!(restored.serial.ask('w'), "W");
    assert_eq!(dirty(&world, restored.pid().into()), before + WRITTEN_PAGES);
    let density = world.json(&["density"]);
    assert_eq!(density["clones"][0]["pid"], restored.pid(), "{density:#}");
}

#[test]
fn a_snapshotted_guest_continues_and_its_diff_snapshot_is_refused() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mut source = import_snapshot(&world, &[]);
    source.resume();
    assert_eq!([source.serial.ask('w'), source.serial.ask('r')], ["W", "K"]);
    let directory = world.dir().join("diff");
    fs::create_dir(&directory).unwrap();
    source.snapshot("Diff", &directory);
    let refused = import(&world, &directory).exits(2).says("bytes of the memory file are holes");
    assert!(refused.err.contains("diff snapshot"), "{}", refused.err);
    let [memory, state] = ["memory", "state"].map(|name| directory.join(name).display().to_string());
    world.stencil(&["import", &memory, "fc:2", "--state", &state]).exits(2).says("memory file are holes");
}

#[test]
fn clones_that_would_write_to_one_disk_are_refused() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let disk = world.dir().join("source-disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let drive =
        json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false, "is_read_only": false});
    drop(import_snapshot(&world, &[("PUT /drives/data", drive)]));
    drop(launch(&world, 1, &[]));
    world.stencil(&["stop", "--all"]).ok();
    let firecracker = program("firecracker");
    let run = world.stencil(&["clone", "fc:1", "-n", "2", "--firecracker", firecracker.to_str().unwrap()]);
    let run = run.exits(1).says("each would write to this file");
    assert!(run.err.contains(disk.to_str().unwrap()), "{}", run.err);
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
}

#[test]
fn a_script_makes_the_disk_of_each_clone() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let disk = world.dir().join("source/disk.img");
    fs::create_dir_all(disk.parent().unwrap()).unwrap();
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let drive = json!({"drive_id": "data", "path_on_host": "disk.img", "is_root_device": false, "is_read_only": false});
    drop(import_snapshot(&world, &[("PUT /drives/data", drive)]));
    let script = world.dir().join("firecracker-with-disk");
    let text = format!(
        "#!/bin/sh\ncp --reflink=auto {} disk.img && exec {} \"$@\"\n",
        disk.display(),
        program("firecracker").display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let launched = world.json(&["clone", "fc:1", "-n", "2", "--firecracker", script.to_str().unwrap()]);
    let mut clones: Vec<Clone> = launched["clones"].as_array().unwrap().iter().map(Clone::of).collect();
    ask_all(&mut clones, 'r', "K");
    for clone in &clones {
        let identity = |file: &fs::Metadata| (file.dev(), file.ino());
        let own = identity(&fs::metadata(clone.dir.join("disk.img")).unwrap());
        let fds = fs::read_dir(format!("/proc/{}/fd", clone.pid)).unwrap();
        let opened =
            fds.filter_map(|fd| fs::metadata(fd.unwrap().path()).ok()).filter(|file| identity(file) == own);
        assert_eq!(opened.count(), 1, "clone {} has not opened its disk", clone.id);
    }
    world.stencil(&["stop", "--all"]).ok();
    assert!(clones.iter().all(|clone| !clone.dir.exists()), "a disk is left");
}

#[test]
fn each_clone_has_its_own_vsock_socket() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[("PUT /vsock", json!({"guest_cid": 3, "uds_path": "./vsock.sock"}))]));
    for clone in launch(&world, 2, &[]) {
        let stream = UnixStream::connect(clone.dir.join("vsock.sock")).unwrap();
        let peer = rustix::net::sockopt::socket_peercred(&stream).unwrap();
        assert_eq!(peer.pid.as_raw_nonzero().get() as u64, clone.pid);
    }
    world.stencil(&["stop", "--all"]).ok();
    // This version of Firecracker has no other path for a clone.
    let program = program("firecracker");
    let words = ["clone", "fc:1", "--firecracker", program.to_str().unwrap(), "--vsock", "v.sock"];
    world.stencil(&words).exits(1).says("unknown field `vsock_override`");
    let outside = ["clone", "fc:1", "--firecracker", program.to_str().unwrap(), "--vsock", "/run/v.sock"];
    world.stencil(&outside).exits(2).says("the socket must be in the directory or the jail of the clone");
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
}

#[test]
fn the_refusal_of_a_device_names_snapshot_and_device() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    File::create(world.dir().join("source-disk")).unwrap().set_len(1 << 20).unwrap();
    let disk = world.dir().join("source-disk");
    let drive =
        json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false, "is_read_only": true});
    drop(import_snapshot(&world, &[("PUT /drives/data", drive)]));
    drop(launch(&world, 1, &[]));
    world.stencil(&["stop", "--all"]).ok();
    fs::remove_file(&disk).unwrap();
    let firecracker = program("firecracker");
    let run = world.stencil(&["clone", "fc:1", "-n", "2", "--firecracker", firecracker.to_str().unwrap()]);
    let run = run.exits(1).says("Firecracker refused PUT /snapshot/load");
    for words in
        ["No such file or directory", disk.to_str().unwrap(), "/state", "hint: give each clone the devices"]
    {
        assert!(run.err.contains(words), "'{words}' is not in: {}", run.err);
    }
    let run = world.stencil(&[
        "clone",
        "fc:1",
        "--firecracker",
        firecracker.to_str().unwrap(),
        "--network",
        "eth9=t",
    ]);
    run.exits(1).says("Unknown Network Device");
    assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
}
