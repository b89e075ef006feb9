//! The serving mode of a file, the reported reason for the mode, and its cost in memory.

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

/// Incompressible bytes.
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
fn new_opens_use_a_ready_backing_and_old_opens_stay_valid() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "0"]);
    let bytes = random(1, 96 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let mut clone = Actor::start();
    let early = File::open(&path).unwrap();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
    // `status` shows the reason only until the backing is ready; the log keeps the reason.
    let reason = "is served by decode: the backing is still being filled after the timeout of 0 s";
    assert!(world.log().contains(reason), "{}", world.log());
    wait_for("the backing", || (template(&world, &digest)["files"][0]["hydrated"] == true).then_some(()));
    let late = File::open(&path).unwrap();
    assert!(world.counter("opens_decode") >= 2);
    let after = template(&world, &digest);
    assert_eq!((&after["serving"], &after["why"]), (&Value::from("passthrough"), &Value::Null), "{after}");
    assert_ne!(
        early.metadata().unwrap().ino(),
        late.metadata().unwrap().ino(),
        "the two serving modes must have different inode numbers"
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
fn backings_are_immutable_even_for_root() {
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
    let backings: Vec<PathBuf> = fs::read_dir(format!("/proc/{supervisor}/fd"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(is_backing)
        .collect();
    assert_eq!(backings.len(), 1, "{backings:?}");
    let flags = rustix::fs::ioctl_getflags(File::open(&backings[0]).unwrap()).unwrap();
    assert!(flags.contains(rustix::fs::IFlags::IMMUTABLE));
    let error = File::options().write(true).open(&backings[0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(1), "open for writing must fail with EPERM for root too");
}

/// Sum of a field in bytes over all mappings of this path in `/proc/self/smaps`.
pub fn smaps(path: &Path, field: &str) -> u64 {
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
fn a_fault_reads_as_many_bytes_as_the_read_ahead_of_the_mount() {
    let _host = host::shared();
    // Bytes of the page cache after one fault in the middle of a file.
    let cached_after_fault = |world: &TestMount| {
        let digest = world.import_bytes(&random(7, 32 << 20), "web:1");
        let file = File::open(world.file(&digest, "memory")).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mapping = Mapping::new(&Request::view(file.as_fd(), Bytes::new(32 << 20))).unwrap();
        mapping.load(MemoryOffset::new(16 << 20)).unwrap();
        cachestat::cached(&file).unwrap().bytes().get()
    };
    for (option, size) in [("--read-ahead=4M", 4 << 20), ("-oread-ahead=0", 0), ("--watchdog=10", 512 << 10)]
    {
        let world = TestMount::with(&["--serve", "decode", option]);
        assert_eq!(world.status()["read_ahead_bytes"], size, "{option}");
        assert_eq!(cached_after_fault(&world), size.max(PAGE), "{option}");
        // The value belongs to the mount, not to a server.
        world.kill_server();
        assert_eq!(cached_after_fault(&world), size.max(PAGE), "{option}");
        let text = world.stencil(&["status"]).ok().out;
        assert_eq!(text.contains("(decode, read-ahead"), size != 512 << 10, "{text}");
    }
    let world = TestMount::unmounted();
    world.mount(&["-o", "read-ahead=4097"]).exits(2).says("expected whole pages, at most 64.0 MiB");
}

#[test]
fn first_touch_of_a_backing_maps_huge_pages() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    host::measured(|| {
        host::compact_memory();
        let mapped = bytes_mapped_with_huge_pages(&world);
        // One fault in each 2 MiB must map the whole file.
        if mapped == 32 << 20 {
            Ok(())
        } else {
            Err(format!("only {mapped} bytes are mapped with huge pages"))
        }
    });
}

/// Maps a file like a VMM: privately, writable, at an address where 2 MiB entries are possible.
pub fn private_mapping(file: &File, length: u64) -> Mapping {
    let request = Request {
        length: Bytes::new(length),
        align: Bytes::new(HUGE_PAGE_SIZE),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: false,
        sync: false,
    };
    Mapping::new(&request).unwrap()
}

/// Imports and maps a template of 32 MiB, touches one page per 2 MiB, and returns the number of bytes mapped with huge
/// pages.
fn bytes_mapped_with_huge_pages(world: &TestMount) -> u64 {
    static SEED: AtomicU8 = AtomicU8::new(100);
    let digest = world.import_bytes(&random(SEED.fetch_add(1, Ordering::Relaxed), 32 << 20), "web:1");
    let path = world.file(&digest, "memory");
    let file = File::open(&path).unwrap();
    let map = private_mapping(&file, 32 << 20);
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
    assert_eq!(template(&world, &digest)["serving"], "passthrough", "the mode that an open would get");
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
fn status_states_in_words_how_a_file_is_served() {
    let _host = host::shared();
    for (serve, before, after) in
        [("passthrough", "passthrough, not hydrated yet", "passthrough"), ("decode", "decode", "decode")]
    {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&random(3, 1 << 20), "web:1");
        let table = || {
            let text = world.stencil(&["status"]).ok().out;
            let row = text.lines().find(|line| line.contains(&digest[..12])).unwrap();
            let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
            cells.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let row = |serving: &str| [&digest[..12], "memory", "1.00 MiB", serving, "0"].map(str::to_owned);
        assert_eq!(table(), row(before), "{serve}");
        let _open = File::open(world.file(&digest, "memory")).unwrap();
        assert_eq!(table(), row(after), "{serve}");
    }
}

#[test]
fn a_template_larger_than_the_cache_is_served_by_decode() {
    let _host = host::shared();
    let bytes = random(2, 16 << 20);
    let world = TestMount::with(&["--cache-size", "8M"]);
    let digest = world.import_bytes(&bytes, "web:1");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    let status = template(&world, &digest);
    assert_eq!(status["serving"], "decode");
    assert!(
        status["why"].as_str().unwrap().contains("the maximum size of all backings is 8.00 MiB"),
        "{status}"
    );

    let strict = TestMount::with(&["--serve", "passthrough", "--cache-size", "8M"]);
    let digest = strict.import_bytes(&bytes, "web:1");
    let error = fs::read(strict.file(&digest, "memory")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "passthrough must not fall back to decode");
}

#[test]
fn a_full_cache_disk_falls_back_to_decode() {
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
    assert!(status["why"].as_str().unwrap().contains("the file system of the cache has "), "{status}");
}

#[test]
fn eviction_takes_unused_backings_and_keeps_those_in_use() {
    let _host = host::shared();
    let world = TestMount::with(&["--cache-size", "24M"]);
    let images: Vec<_> = (0..3u8).map(|i| random(10 + i, 16 << 20)).collect();
    let digests: Vec<_> = (0..3).map(|i| world.import_bytes(&images[i], &format!("web:{i}"))).collect();
    let path = |i: usize| world.file(&digests[i], "memory");
    let serving = |i: usize| template(&world, &digests[i])["serving"].as_str().unwrap().to_owned();
    assert!(fs::read(path(0)).unwrap() == images[0]);
    // The first backing is unused and is evicted.
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path(1).display(), 16 << 20));
    assert_eq!((serving(1), world.counter("evictions")), ("passthrough".into(), 1));
    // The second backing is mapped, though its file is closed, and stays.
    assert!(fs::read(path(2)).unwrap() == images[2]);
    assert_eq!((serving(1), serving(2)), ("passthrough".into(), "decode".into()));
    assert_eq!(world.counter("evictions"), 1);
    for number in 0..(16 << 20) / PAGE {
        assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, images[1][(number * PAGE) as usize]);
    }
    assert!(fs::read(path(1)).unwrap() == images[1], "the file can be opened again");
}

#[test]
fn tags_of_identical_content_share_ram() {
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
        // The page cache has the content once, through whatever path the clones map it.
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
fn the_next_open_follows_a_moved_tag() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let (old, new) = (random(5, 1 << 20), random(6, 1 << 20));
    world.import_bytes(&old, "web:1");
    let path = world.mountpoint().join("templates/web/1/memory");
    let before = File::open(&path).unwrap();
    assert!(fs::read(&path).unwrap() == old);
    world.import_bytes(&new, "web:1");
    assert!(fs::read(&path).unwrap() == new, "the next open must have the new content");
    let mut all = vec![0; old.len()];
    before.read_exact_at(&mut all, 0).unwrap();
    assert!(all == old, "the earlier open must keep the old content");
    world.stencil(&["rm", "web:1"]).ok();
    assert_eq!(File::open(&path).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn open_by_handle_works_across_servers() {
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

/// Calls name_to_handle_at(2) (system call 303) and prints the handle in hexadecimal.
const HANDLE: &str = r#"
my $h = pack("Ii", 128, 0) . "\0" x 128; my $m = "\0" x 8;
syscall(303, -100, $ARGV[0] . "\0", $h, $m, 0) == 0 or die "name_to_handle_at: $!";
print unpack("H*", $h);
"#;

/// Calls open_by_handle_at(2) (system call 304) and copies the file.
const OPEN_HANDLE: &str = r#"
my $h = pack("H*", $ARGV[1]); opendir(my $d, $ARGV[0]) or die; open(my $mnt, "<", $ARGV[0]) or die "mount: $!";
my $fd = syscall(304, fileno($mnt), $h, 0); $fd >= 0 or die "open_by_handle_at: $!";
open(my $in, "<&=", $fd) or die; open(my $out, ">", $ARGV[2]) or die; binmode $in; binmode $out;
while (my $n = sysread($in, my $b, 1 << 20)) { syswrite($out, $b) == $n or die } close $out;
"#;
