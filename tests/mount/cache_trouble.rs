//! The cache directory is full, missing or read-only: templates are served by decode meanwhile, and by passthrough once
//! the directory is usable again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::actor::Actor;
use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::{TestMount, run, wait_for};

const PAGE: usize = 4096;

fn random(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

fn template(world: &TestMount) -> Value {
    world.status()["templates"][0].clone()
}

/// Opens the file repeatedly until passthrough serves the template: a failed hydration is tried again after ten
/// seconds.
fn wait_promoted(world: &TestMount, path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(25);
    while template(world)["serving"] != "passthrough" || template(world)["hydrated_bytes"] == 0 {
        assert!(Instant::now() < deadline, "the template is not promoted: {:#}", template(world));
        File::open(path).unwrap();
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Maps the file in a new process and compares the first byte of every page.
fn map_and_compare(path: &Path, bytes: &[u8]) -> Actor {
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
    for page in 0..bytes.len() / PAGE {
        assert_eq!(clone.tell(&format!("read 0 {page}")) as u8, bytes[page * PAGE], "page {page}");
    }
    clone
}

/// Opens a template and fills the cache disk during its hydration. Returns the content, path and status of the
/// template, or `None` if the hydration completed before the disk was full.
fn open_while_disk_fills(world: &TestMount, filler: &Path, seed: u8) -> Option<(Vec<u8>, PathBuf, Value)> {
    let bytes = random(seed, 64 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let hydrations = || world.log().matches("hydrating template").count();
    let before = hydrations();
    std::thread::scope(|scope| {
        let open = scope.spawn(|| File::open(&path).map(drop));
        wait_for("the start of the hydration", || (hydrations() > before).then_some(()));
        let file = File::create(filler).unwrap();
        let mut chunk = 16 << 20;
        let (mut length, flags) = (0, rustix::fs::FallocateFlags::empty());
        while chunk >= 1 << 20 {
            match rustix::fs::fallocate(&file, flags, length, chunk) {
                Ok(()) => length += chunk,
                Err(_) => chunk /= 2,
            }
        }
        open.join().unwrap().expect("the open succeeds");
    });
    let status = template(world);
    if status["serving"] == "passthrough" {
        world.stencil(&["rm", "web:1"]).ok();
        fs::remove_file(filler).unwrap();
        return None;
    }
    Some((bytes, path, status))
}

#[test]
fn soak_a_full_cache_disk_during_hydration_fails_no_read() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let (cache, disk) = (world.dir().join("cache"), world.dir().join("disk"));
    fs::create_dir(&cache).unwrap();
    File::create(&disk).unwrap().set_len(96 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-m", "0", disk.to_str().unwrap()]);
    run("mount", &["-o", "loop", disk.to_str().unwrap(), cache.to_str().unwrap()]);
    // Unmounts the disk on drop; the Stencil mount that uses it has ended by then.
    let _disk = Mounted(cache.clone());
    world.mount(&["--cache-dir", cache.to_str().unwrap(), "--cache-size", "1G"]).ok();
    let filler = cache.join("filler");
    // If the hydration completes first, the next attempt uses another template.
    let (bytes, path, status) =
        (3..20).find_map(|seed| open_while_disk_fills(&world, &filler, seed)).unwrap();
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    // On a busy host the disk may be full before the first byte of the backing is written: the space check fails first.
    let is_full = ["No space left", "the file system of the cache has"].iter().any(|text| why.contains(text));
    assert!(is_full && why.contains("cache"), "{why}");
    let density = world.json(&["density", "--why"]);
    let template =
        density["templates"].as_array().unwrap().iter().find(|row| row["digest"] == status["digest"]);
    let served = &template.unwrap()["served"][0];
    assert_eq!((&served["serving"], &served["why"]), (&"decode".into(), &status["why"]), "{served}");
    assert!(world.log().contains("has no backing: "), "{}", world.log());
    let clone = map_and_compare(&path, &bytes);
    fs::remove_file(&filler).unwrap();
    wait_promoted(&world, &path);
    drop(map_and_compare(&path, &bytes));
    let density = world.json(&["density", "--why"]);
    let row = &density["clones"][0];
    let decode = row["reasons"].as_array().unwrap().iter().find(|reason| reason["code"] == "decode");
    assert_eq!(decode.map(|reason| &reason["bytes"]), Some(&row["mapped_clean_bytes"]), "{row:#}");
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
}

#[test]
fn soak_a_cache_directory_removed_and_recreated_fails_no_read() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let cache = world.dir().join("cache");
    fs::create_dir(&cache).unwrap();
    world.mount(&["--cache-dir", cache.to_str().unwrap()]).ok();
    let (first_bytes, second_bytes) = (random(4, 8 << 20), random(5, 8 << 20));
    let digest = world.import_bytes(&first_bytes, "early:1");
    let first_path = world.file(&digest, "memory");
    let clone = map_and_compare(&first_path, &first_bytes);
    fs::remove_dir(&cache).unwrap();
    world.stencil(&["rm", "early:1"]).exits(5);
    let digest = world.import_bytes(&second_bytes, "late:1");
    let path = world.file(&digest, "memory");
    let status_of = || {
        let all = world.status();
        let found = all["templates"].as_array().unwrap().iter().find(|t| t["digest"] == digest.as_str());
        found.unwrap().clone()
    };
    let mut mapper = map_and_compare(&path, &second_bytes);
    let status = status_of();
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    assert!(why.contains("No such file") && why.contains("/cache"), "{why}");
    // The first backing has no name in the directory, and is still served.
    assert!(fs::read(&first_path).unwrap() == first_bytes);
    fs::create_dir(&cache).unwrap();
    let deadline = Instant::now() + Duration::from_secs(25);
    while status_of()["serving"] != "passthrough" || status_of()["hydrated_bytes"] == 0 {
        assert!(Instant::now() < deadline, "the template is not promoted: {:#}", status_of());
        File::open(&path).unwrap();
        std::thread::sleep(Duration::from_millis(250));
    }
    drop(map_and_compare(&path, &second_bytes));
    assert_eq!(
        mapper.tell("read 0 7") as u8,
        second_bytes[7 * PAGE],
        "a process that maps the template while it is served by decode is still served"
    );
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
}

/// The supervisor passes the errno to the server, which tries temporary errors again.
#[test]
fn soak_a_temporarily_read_only_cache_fails_no_read() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let cache = world.dir().join("cache");
    fs::create_dir(&cache).unwrap();
    let cache_path = cache.to_str().unwrap();
    run("mount", &["--bind", cache_path, cache_path]);
    let _bound = Mounted(cache.clone());
    world.mount(&["--cache-dir", cache_path]).ok();
    run("mount", &["-o", "remount,bind,ro", cache_path]);
    let bytes = random(6, 8 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let mut clone = map_and_compare(&path, &bytes);
    let status = template(&world);
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    assert!(why.contains("Read-only file system") && why.contains("/cache"), "{why}");
    run("mount", &["-o", "remount,bind,rw", cache_path]);
    wait_promoted(&world, &path);
    drop(map_and_compare(&path, &bytes));
    assert_eq!(
        clone.tell("read 0 7") as u8,
        bytes[7 * PAGE],
        "a process that maps the template while it is served by decode is still served"
    );
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
}
