//! Opens, mappings and many templates leak no descriptors and no memory in supervisor and server.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stencilfs::store::BLOCK_SIZE;
use stencilfs::sys::memory::mapped_file::MappedFile;

use crate::support::host;
use crate::support::mount::TestMount;

const PAGE: usize = 4096;
const SIZE: usize = 4 << 20;

/// Open descriptors, and resident and locked memory in KiB, of a process.
#[derive(Debug, Clone, Copy)]
struct Usage {
    fds: u64,
    resident: u64,
    locked: u64,
}

fn usage(pid: u64) -> Usage {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    Usage { fds, resident: field("VmRSS:"), locked: field("VmLck:") }
}

fn usage_of_both(world: &TestMount) -> [Usage; 2] {
    let status = world.status();
    ["supervisor_pid", "server_pid"].map(|role| usage(status[role].as_u64().unwrap()))
}

/// True if the value grew by at most 5 %.
fn is_near(before: u64, after: u64) -> bool {
    after <= before + before / 20
}

/// Opens the paths in turn and reads a page on every 16th open; then maps them in turn, `mappings` times.
fn work(paths: &[PathBuf], opens: usize, mappings: usize) {
    let mut page = [0; PAGE];
    for i in 0..opens {
        let file = File::open(&paths[i % paths.len()]).unwrap();
        if i % 16 == 0 {
            file.read_exact_at(&mut page, (i % (SIZE / PAGE) * PAGE) as u64).unwrap();
        }
    }
    for i in 0..mappings {
        let file = File::open(&paths[i % paths.len()]).unwrap();
        let map = MappedFile::map(&file, SIZE as u64).unwrap();
        std::hint::black_box(map[i % (SIZE / PAGE) * PAGE]);
    }
}

#[test]
fn soak_opens_and_mappings_leak_nothing() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut paths = Vec::new();
        for seed in 0..4u8 {
            let mut bytes = vec![0; SIZE];
            blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
            let digest = world.import_bytes(&bytes, &format!("web:{seed}"));
            paths.push(world.file(&digest, "memory"));
            paths.push(world.mountpoint().join(format!("templates/web/{seed}/memory")));
        }
        // Warm up first: fill the block cache and let every thread serve requests.
        for path in &paths {
            let file = File::open(path).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
            for block in 0..SIZE / BLOCK_SIZE as usize {
                file.read_exact_at(&mut [0; PAGE], (block * BLOCK_SIZE as usize) as u64).unwrap();
            }
        }
        work(&paths, 2000, 200);
        // A leak shows in each measurement; other noise does not.
        host::measured(|| measure_growth(&world, &paths));
    }
}

fn measure_growth(world: &TestMount, paths: &[PathBuf]) -> Result<(), String> {
    let before = usage_of_both(world);
    work(paths, host::rounds(10_000, 100_000), host::rounds(1_000, 10_000));
    // The last descriptors are closed with a delay: the connections of callers, of which `status` is one.
    let fds_are_closed =
        |now: &[Usage; 2]| before.iter().zip(now).all(|(before, now)| is_near(before.fds, now.fds));
    let until = Instant::now() + Duration::from_secs(10);
    let mut after = usage_of_both(world);
    while !fds_are_closed(&after) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        after = usage_of_both(world);
    }
    println!("before {before:?}, after {after:?}");
    assert!(fds_are_closed(&after), "descriptors: before {before:?}, after {after:?}");
    let mut both = before.iter().zip(&after);
    let all_near = both.all(|(before, after)| {
        is_near(before.resident, after.resident) && is_near(before.locked, after.locked)
    });
    if all_near { Ok(()) } else { Err(format!("before {before:?}, after {after:?}")) }
}

/// More templates than the server keeps open, under the lowest RLIMIT_NOFILE that the server accepts.
#[test]
fn the_server_limits_the_number_of_open_templates() {
    const TEMPLATES: u32 = 90;
    /// Templates that the server keeps open under this limit.
    const KEPT: u64 = 64;
    let _host = host::shared();
    let world = TestMount::unmounted();
    let digests: Vec<String> = (0..TEMPLATES)
        .map(|n| world.import_bytes(&n.to_le_bytes().repeat(PAGE / 4), &format!("web:{n}")))
        .collect();
    let args = ["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"];
    let mut limited = std::process::Command::new("prlimit");
    let mounted = limited
        .arg("--nofile=1024:1024")
        .arg(world.command().get_program())
        .args(args)
        .env("STENCIL_STORE", world.store_dir())
        .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
        .status()
        .unwrap();
    assert!(mounted.success());
    let read = |n: usize| fs::read(world.file(&digests[n], "memory")).unwrap();
    for round in 0..3 {
        for n in 0..digests.len() {
            assert!(read(n) == (n as u32).to_le_bytes().repeat(PAGE / 4), "template {n} in round {round}");
        }
    }
    let fds =
        fs::read_dir(Path::new("/proc").join(world.server().to_string()).join("fd")).unwrap().count() as u64;
    // One pack per template, two tables per open template, and up to 40 other descriptors.
    assert!(fds <= u64::from(TEMPLATES) + 2 * KEPT + 40, "{fds} descriptors");
    assert!(fds > u64::from(TEMPLATES), "the limit must be reached: {fds} descriptors");
}
