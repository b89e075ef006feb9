//! Memory and disk space of an import, and a full disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::store::{Fixture, guest_like, random, stencil};

/// Runs a command and returns its peak resident memory in bytes. The kernel drops its own high-water mark with the
/// address space at exit, so it is polled while the command runs; it only rises.
fn peak_of(command: &mut Command, input: Option<File>) -> u64 {
    let stdin = input.map_or_else(Stdio::null, Stdio::from);
    let mut child = command.stdin(stdin).stdout(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).map(str::trim);
        if let Some(kib) = line.and_then(|l| l.split(' ').next()).and_then(|n| n.parse::<u64>().ok()) {
            peak = peak.max(kib * 1024);
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return peak;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn soak_a_sparse_image_is_processed_in_bounded_memory() {
    let size: u64 = host::rounds(2 << 30, 4 << 30);
    let fixture = Fixture::new();
    let source = fixture.path("source");
    let file = File::create(&source).unwrap();
    file.set_len(size).unwrap();
    // 160 MiB of data spread over the file, more than two packs.
    for piece in 0..40 {
        file.write_all_at(&random(piece, 4 << 20), piece * (size / 40) / 4096 * 4096).unwrap();
    }
    let source = source.to_str().unwrap();
    for codec in ["lz4", "zstd:19"] {
        let name = if codec == "lz4" { "a" } else { "b" };
        // The second import finds every block in the store: it reads instead of compressing.
        let peak = peak_of(
            &mut stencil(fixture.dir.path(), &["import", source, name, "--compression", codec]),
            None,
        );
        assert!(0 < peak && peak < 256 << 20, "{codec}: {} MiB", peak >> 20);
    }
    let piped = File::open(source).unwrap();
    let peak = peak_of(&mut stencil(fixture.dir.path(), &["import", "-", "c"]), Some(piped));
    assert!(0 < peak && peak < 256 << 20, "from a pipe: {} MiB", peak >> 20);
    let listed = fixture.run(&["ls", "--json"]).ok().json();
    let digests: Vec<_> =
        listed["templates"].as_array().unwrap().iter().map(|t| t["digest"].clone()).collect();
    assert_eq!(digests.len(), 3);
    assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
    let out = fixture.path("out");
    let export = stencil(fixture.dir.path(), &["export", "a", out.to_str().unwrap(), "--sparse"]);
    let peak = peak_of(&mut { export }, None);
    assert!(peak < 256 << 20, "export: {} MiB", peak >> 20);
    assert!(Command::new("cmp").arg(source).arg(&out).status().unwrap().success());
    let peak = peak_of(&mut stencil(fixture.dir.path(), &["verify"]), None);
    assert!(peak < 256 << 20, "verify: {} MiB", peak >> 20);
    let stream = fixture.path("stream");
    let stream = stream.to_str().unwrap();
    let peak = peak_of(&mut stencil(fixture.dir.path(), &["save", "a", "-o", stream]), None);
    assert!(peak < 256 << 20, "save: {} MiB", peak >> 20);
    // Into another store, and into the store that has everything.
    for to in [fixture.path("other"), fixture.path("store")] {
        let mut load = stencil(fixture.dir.path(), &["load", "-i", stream, "--store", to.to_str().unwrap()]);
        let peak = peak_of(&mut load, None);
        assert!(peak < 256 << 20, "load: {} MiB", peak >> 20);
    }
}

#[test]
fn ten_imports_of_one_image_take_the_space_of_one() {
    let fixture = Fixture::new();
    let bytes = guest_like(3, 48 << 20);
    let source = fixture.file("source", &bytes);
    let source = source.to_str().unwrap();
    fixture.run(&["import", source, "a:0"]).ok();
    let one = fixture.disk_usage();
    for (number, more) in [
        ["--compression", "zstd"],
        ["--compression", "none"],
        ["--compression", "zstd:1"],
        ["--label", "a=b"],
        ["--mode", "0400"],
        ["--owner", "1:1"],
        ["--format", "raw"],
        ["--compression", "lz4"],
        ["--compression", "zstd:9"],
    ]
    .iter()
    .enumerate()
    {
        fixture.run(&["import", source, &format!("a:{}", number + 1), more[0], more[1]]).ok();
    }
    let ten = fixture.disk_usage();
    // A tag takes one disk block: 4 KiB of 7 MiB.
    assert!((ten as f64) < one as f64 * 1.01, "{one} bytes for one, {ten} for ten");

    // Another image with the same blocks at other offsets adds only its tables.
    let moved = [vec![0; 1 << 20], bytes.clone(), vec![0; 64 << 10]].concat();
    let shifted = fixture.import("moved", &moved);
    assert_eq!(shifted.stored_bytes.get(), 0);
    assert!(!shifted.existed);
    fixture.run(&["verify"]).ok();
}

/// On a file system of 24 MiB the error has a remedy, and the store is unchanged.
#[test]
fn a_failed_import_on_a_full_disk_leaves_the_store_unchanged() {
    let _host = crate::support::host::shared();
    let fixture = Fixture::new();
    let mount = fixture.path("small");
    fs::create_dir(&mount).unwrap();
    let mount_text = mount.to_str().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs", mount_text]).status();
    assert!(mounted.unwrap().success(), "cannot mount a tmpfs: this test needs root");
    let _unmount = Mounted(mount.clone());
    let small = fixture.file("a", &random(1, 8 << 20));
    let large = fixture.file("b", &random(2, 40 << 20));
    let store = mount.join("store");
    let run = |args: &[&str]| {
        let mut all = vec!["--store", store.to_str().unwrap()];
        all.extend(args);
        fixture.run(&all)
    };
    run(&["import", small.to_str().unwrap(), "a"]).ok();
    let free_blocks = || rustix::fs::statvfs(&mount).unwrap().f_bfree;
    let before = free_blocks();
    for _ in 0..2 {
        let full = run(&["import", large.to_str().unwrap(), "b"]);
        assert_eq!(full.code, 1, "{full:?}");
        assert!(full.stderr.contains("No space left") && full.stderr.contains("free space"), "{full:?}");
        assert_eq!(full.stderr.lines().count(), 2, "{full:?}");
    }
    assert_eq!(free_blocks(), before, "a failed import has left data");
    assert_eq!(fs::read_dir(store.join("tmp")).unwrap().count(), 0);
    run(&["verify"]).ok();
    assert_eq!(run(&["ls", "--json"]).ok().json()["templates"].as_array().unwrap().len(), 1);
    // An export to the full file system leaves no file at OUT.
    fs::write(mount.join("filler"), vec![1; 14 << 20]).unwrap();
    let out = mount.join("out");
    let export = run(&["export", "a", out.to_str().unwrap()]);
    assert_eq!(export.code, 1, "{export:?}");
    assert!(export.stderr.contains("No space left") && !out.exists(), "{export:?}");
    assert_eq!(fs::read_dir(&mount).unwrap().count(), 2);
}
