//! Which way a file is served, why, and what that costs in memory.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::Value;
use stencilfs::sys::memory::cachestat;
use stencilfs::sys::memory::mapping::{Mapping, Protection, Request, Sharing};
use stencilfs::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset};

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, run, wait_for};

const PAGE: u64 = 4096;

/// So many bytes that do not compress.
fn random(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn template(world: &TestMount, digest: &str) -> Value {
    let status = world.status();
    let all = status["templates"].as_array().unwrap();
    all.iter().find(|t| t["digest"] == digest).unwrap_or_else(|| panic!("no {digest} in {status:#}")).clone()
}

#[test]
fn a_file_is_promoted_when_its_backing_is_ready_and_old_opens_go_on() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "0"]);
    let bytes = random(1, 96 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let mut clone = Actor::start();
    let early = File::open(&path).unwrap();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
    // The reason is in `status` for as long as it holds, and in the log.
    let reason = "is served by decode: its backing is still being filled after the timeout of 0 s";
    assert!(world.log().contains(reason), "{}", world.log());
    wait_for("the backing", || (template(&world, &digest)["files"][0]["hydrated"] == true).then_some(()));
    let late = File::open(&path).unwrap();
    assert!(world.counter("opens_decode") >= 2);
    let after = template(&world, &digest);
    assert_eq!((&after["serving"], &after["why"]), (&Value::from("passthrough"), &Value::Null), "{after}");
    assert_ne!(
        early.metadata().unwrap().ino(),
        late.metadata().unwrap().ino(),
        "the number says how it is served"
    );
    assert_eq!(late.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
    assert_eq!(world.counter("opens_passthrough"), 1);
    for file in [&early, &late] {
        let mut all = vec![0; bytes.len()];
        file.read_exact_at(&mut all, 0).unwrap();
        assert!(all == bytes);
    }
    for number in (0..bytes.len() as u64 / PAGE).step_by(97) {
        assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[(number * PAGE) as usize]);
    }
}

#[test]
fn a_backing_can_be_changed_by_nobody() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let bytes = random(9, 4 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    assert!(fs::read(&path).unwrap() == bytes);
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap();
    let is_backing = |link: &PathBuf| {
        let target = fs::read_link(link).unwrap_or_default();
        target.starts_with(world.store_dir()) && target.to_string_lossy().ends_with("(deleted)")
    };
    let held: Vec<PathBuf> = fs::read_dir(format!("/proc/{supervisor}/fd"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(is_backing)
        .collect();
    assert_eq!(held.len(), 1, "{held:?}");
    let flags = rustix::fs::ioctl_getflags(File::open(&held[0]).unwrap()).unwrap();
    assert!(flags.contains(rustix::fs::IFlags::IMMUTABLE));
    let error = File::options().write(true).open(&held[0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(1), "EPERM, for root too");
}

/// Sum of a field of the maps of this process that have that path, in bytes.
fn smaps(path: &Path, field: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut ours = false;
    let mut sum = 0;
    for line in text.lines() {
        match line.split_once(':') {
            Some((key, value)) if !key.contains(' ') => {
                if ours && key == field {
                    sum += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
                }
            }
            _ => ours = line.ends_with(path.to_str().unwrap()),
        }
    }
    sum
}

#[test]
fn a_backing_is_mapped_by_huge_pages_at_the_first_touch() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    host::measured(|| {
        host::compact_memory();
        let mapped = mapped_by_huge_pages(&world);
        // A fault for each 2 MiB, and no more.
        if mapped == 32 << 20 { Ok(()) } else { Err(format!("{mapped} bytes are mapped by huge pages")) }
    });
}

/// Of a new template of 32 MiB.
fn mapped_by_huge_pages(world: &TestMount) -> u64 {
    static SEED: AtomicU8 = AtomicU8::new(100);
    let digest = world.import_bytes(&random(SEED.fetch_add(1, Ordering::Relaxed), 32 << 20), "web:1");
    let path = world.file(&digest, "memory");
    let file = File::open(&path).unwrap();
    let map = Mapping::new(&Request {
        length: Bytes::new(32 << 20),
        align: Bytes::new(HUGE_PAGE_SIZE),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: false,
        sync: false,
    })
    .unwrap();
    for offset in (0..32 << 20).step_by(HUGE_PAGE_SIZE as usize) {
        map.load(MemoryOffset::new(offset)).unwrap();
    }
    smaps(&path, "FilePmdMapped")
}

#[test]
fn the_first_open_waits_for_the_backing() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let digest = world.import_bytes(&random(1, 32 << 20), "web:1");
    assert_eq!(template(&world, &digest)["serving"], "passthrough", "that is what an open would get");
    assert_eq!(template(&world, &digest)["hydrated_bytes"], 0);
    File::open(world.file(&digest, "memory")).unwrap();
    let now = template(&world, &digest);
    assert_eq!(
        (&now["serving"], now["hydrated_bytes"].as_u64()),
        (&Value::from("passthrough"), Some(32 << 20))
    );
    assert_eq!(world.counter("opens_decode"), 0);
}

#[test]
fn what_does_not_fit_the_cache_is_served_by_decode_and_says_why() {
    let _host = host::shared();
    let bytes = random(2, 16 << 20);
    let world = TestMount::with(&["--cache-size", "8M"]);
    let digest = world.import_bytes(&bytes, "web:1");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    let status = template(&world, &digest);
    assert_eq!(status["serving"], "decode");
    assert!(status["why"].as_str().unwrap().contains("the cache is limited to 8.00 MiB"), "{status}");

    let strict = TestMount::with(&["--serve", "passthrough", "--cache-size", "8M"]);
    let digest = strict.import_bytes(&bytes, "web:1");
    let error = fs::read(strict.file(&digest, "memory")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "passthrough never falls back");
}

#[test]
fn a_full_cache_disk_leads_to_decode() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let cache = world.dir().join("cache");
    let disk = world.dir().join("disk");
    fs::create_dir(&cache).unwrap();
    File::create(&disk).unwrap().set_len(12 << 20).unwrap();
    run("mkfs.ext4", &["-q", disk.to_str().unwrap()]);
    run("mount", &["-o", "loop", disk.to_str().unwrap(), cache.to_str().unwrap()]);
    world.mount(&["--cache-dir", cache.to_str().unwrap(), "--cache-size", "1G"]).ok();
    let bytes = random(3, 16 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let same = fs::read(world.file(&digest, "memory")).unwrap() == bytes;
    let status = template(&world, &digest);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    run("umount", &[cache.to_str().unwrap()]);
    assert!(same);
    assert_eq!(status["serving"], "decode");
    assert!(status["why"].as_str().unwrap().contains("free"), "{status}");
}

#[test]
fn a_backing_that_nobody_uses_makes_room_and_one_in_use_stays() {
    let _host = host::shared();
    let world = TestMount::with(&["--cache-size", "24M"]);
    let images: Vec<_> = (0..3u8).map(|i| random(10 + i, 16 << 20)).collect();
    let digests: Vec<_> = (0..3).map(|i| world.import_bytes(&images[i], &format!("web:{i}"))).collect();
    let path = |i: usize| world.file(&digests[i], "memory");
    let serving = |i: usize| template(&world, &digests[i])["serving"].as_str().unwrap().to_owned();
    assert!(fs::read(path(0)).unwrap() == images[0]);
    // The first is used by nobody: it goes.
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path(1).display(), 16 << 20));
    assert_eq!((serving(1), world.counter("evictions")), ("passthrough".into(), 1));
    // The second is mapped, though its file is closed: it stays.
    assert!(fs::read(path(2)).unwrap() == images[2]);
    assert_eq!((serving(1), serving(2)), ("passthrough".into(), "decode".into()));
    assert_eq!(world.counter("evictions"), 1);
    for number in 0..(16 << 20) / PAGE {
        assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, images[1][(number * PAGE) as usize]);
    }
    assert!(fs::read(path(1)).unwrap() == images[1], "and can be opened again");
}

#[test]
fn two_tags_of_one_content_cost_ram_once() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let bytes = random(4, 8 << 20);
        let digest = world.import_bytes(&bytes, "web:1");
        world.stencil(&["tag", "web:1", "other:9"]).ok();
        world
            .stencil(&[
                "import",
                world.dir().join("web-1").to_str().unwrap(),
                "third:1",
                "--compression",
                "none",
            ])
            .ok();
        let paths = ["web/1", "other/9", "third/1"]
            .map(|t| world.mountpoint().join("templates").join(t).join("memory"));
        let inodes = paths.each_ref().map(|p| fs::metadata(p).unwrap().ino());
        assert!(inodes.iter().all(|&i| i == inodes[0]), "{inodes:?}");
        let mut clones: Vec<Actor> = paths.iter().map(|p| map_and_read(p, bytes.len() as u64)).collect();
        // The page cache holds it once, whoever maps it under whatever name.
        if serve == "decode" {
            let cached = cachestat::cached(File::open(&paths[0]).unwrap()).unwrap().bytes().get();
            assert_eq!(cached, bytes.len() as u64);
        } else {
            let status = template(&world, &digest);
            assert_eq!(status["hydrated_bytes"], bytes.len() as u64);
            assert_eq!(world.status()["cache_used"], bytes.len() as u64);
        }
        assert_eq!(template(&world, &digest)["clones"], 3);
        clones.clear();
    }
}

fn map_and_read(path: &Path, length: u64) -> Actor {
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {length} rw", path.display()));
    actor.read_pages(0, 0..length / PAGE);
    actor
}

#[test]
fn a_tag_that_moves_is_seen_by_the_next_open() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let (old, new) = (random(5, 1 << 20), random(6, 1 << 20));
    world.import_bytes(&old, "web:1");
    let path = world.mountpoint().join("templates/web/1/memory");
    let before = File::open(&path).unwrap();
    assert!(fs::read(&path).unwrap() == old);
    world.import_bytes(&new, "web:1");
    assert!(fs::read(&path).unwrap() == new, "the next open has the new content");
    let mut all = vec![0; old.len()];
    before.read_exact_at(&mut all, 0).unwrap();
    assert!(all == old, "the old open has the old");
    world.stencil(&["rm", "web:1"]).ok();
    assert_eq!(File::open(&path).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn handles_open_a_file_without_its_name() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = random(7, 1 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let handle = run("perl", &["-e", HANDLE, path.to_str().unwrap()]);
    world.kill_server();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let copy = world.dir().join("copy");
    let mnt = world.mountpoint().to_str().unwrap();
    run("perl", &["-e", OPEN_HANDLE, mnt, handle.trim(), copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == bytes);
}

/// name_to_handle_at(2), printed as hex.
const HANDLE: &str = r#"
my $h = pack("Ii", 128, 0) . "\0" x 128; my $m = "\0" x 8;
syscall(303, -100, $ARGV[0] . "\0", $h, $m, 0) == 0 or die "name_to_handle_at: $!";
print unpack("H*", $h);
"#;

/// open_by_handle_at(2), then a copy of everything that can be read.
const OPEN_HANDLE: &str = r#"
my $h = pack("H*", $ARGV[1]); opendir(my $d, $ARGV[0]) or die; open(my $mnt, "<", $ARGV[0]) or die "mount: $!";
my $fd = syscall(304, fileno($mnt), $h, 0); $fd >= 0 or die "open_by_handle_at: $!";
open(my $in, "<&=", $fd) or die; open(my $out, ">", $ARGV[2]) or die; binmode $in; binmode $out;
while (my $n = sysread($in, my $b, 1 << 20)) { syswrite($out, $b) == $n or die } close $out;
"#;
