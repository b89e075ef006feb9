//! The folder of backings fills up or vanishes: decode serves meanwhile, and passthrough comes back by itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, run, wait_for};
use crate::support::passing::Mounted;

const PAGE: usize = 4096;

fn random(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

fn template(world: &TestMount) -> Value {
    world.status()["templates"][0].clone()
}

/// Opens again and again until an open gets the backing: what failed is tried again after ten seconds.
fn promoted(world: &TestMount, path: &Path) {
    let until = Instant::now() + Duration::from_secs(25);
    while template(world)["serving"] != "passthrough" || template(world)["hydrated_bytes"] == 0 {
        assert!(Instant::now() < until, "it is not promoted: {:#}", template(world));
        File::open(path).unwrap();
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Maps it in a process of its own and reads every page.
fn reads_right(path: &Path, bytes: &[u8]) -> Actor {
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
    for page in 0..bytes.len() / PAGE {
        assert_eq!(clone.tell(&format!("read 0 {page}")) as u8, bytes[page * PAGE], "page {page}");
    }
    clone
}

/// A template that is opened while the disk of its cache fills up, unless its backing was faster.
fn opened_while_it_fills(world: &TestMount, filler: &Path, seed: u8) -> Option<(Vec<u8>, PathBuf, Value)> {
    let bytes = random(seed, 64 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let hydrating = || world.log().matches("hydrating template").count();
    let before = hydrating();
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| File::open(&path).map(drop));
        wait_for("the hydration", || (hydrating() > before).then_some(()));
        let file = File::create(filler).unwrap();
        let mut piece = 16 << 20;
        let (mut length, flags) = (0, rustix::fs::FallocateFlags::empty());
        while piece >= 1 << 20 {
            match rustix::fs::fallocate(&file, flags, length, piece) {
                Ok(()) => length += piece,
                Err(_) => piece /= 2,
            }
        }
        opener.join().unwrap().expect("the open is answered");
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
fn soak_a_disk_that_fills_up_while_hydrating_costs_nobody_a_page() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let (cache, disk) = (world.dir().join("cache"), world.dir().join("disk"));
    fs::create_dir(&cache).unwrap();
    File::create(&disk).unwrap().set_len(96 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-m", "0", disk.to_str().unwrap()]);
    run("mount", &["-o", "loop", disk.to_str().unwrap(), cache.to_str().unwrap()]);
    // Taken away again whatever happens; the mount above it has ended by then.
    let _disk = Mounted(cache.clone());
    world.mount(&["--cache-dir", cache.to_str().unwrap(), "--cache-size", "1G"]).ok();
    let filler = cache.join("filler");
    // A backing that was ready before the disk was full is made again, of another template.
    let (bytes, path, status) =
        (3..20).find_map(|seed| opened_while_it_fills(&world, &filler, seed)).unwrap();
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    // On a busy host the disk may be full before the first byte of the backing is written.
    let full = ["No space left", "the cache's file system has"].iter().any(|words| why.contains(words));
    assert!(full && why.contains("cache"), "{why}");
    assert!(world.log().contains("has no backing: "), "{}", world.log());
    let clone = reads_right(&path, &bytes);
    fs::remove_file(&filler).unwrap();
    promoted(&world, &path);
    drop(reads_right(&path, &bytes));
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
}

#[test]
fn soak_a_cache_folder_that_is_gone_and_back_costs_nobody_a_page() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let cache = world.dir().join("cache");
    fs::create_dir(&cache).unwrap();
    world.mount(&["--cache-dir", cache.to_str().unwrap()]).ok();
    let (early, late) = (random(4, 8 << 20), random(5, 8 << 20));
    let digest = world.import_bytes(&early, "early:1");
    let early_path = world.file(&digest, "memory");
    let clone = reads_right(&early_path, &early);
    fs::remove_dir(&cache).unwrap();
    world.stencil(&["rm", "early:1"]).exits(5);
    let digest = world.import_bytes(&late, "late:1");
    let path = world.file(&digest, "memory");
    let status_of = || {
        let all = world.status();
        let found = all["templates"].as_array().unwrap().iter().find(|t| t["digest"] == digest.as_str());
        found.unwrap().clone()
    };
    let mut second = reads_right(&path, &late);
    let status = status_of();
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    assert!(why.contains("No such file") && why.contains("/cache"), "{why}");
    // The backing that was there before has no name: it is served on.
    assert!(fs::read(&early_path).unwrap() == early);
    fs::create_dir(&cache).unwrap();
    let until = Instant::now() + Duration::from_secs(25);
    while status_of()["serving"] != "passthrough" || status_of()["hydrated_bytes"] == 0 {
        assert!(Instant::now() < until, "it is not promoted: {:#}", status_of());
        File::open(&path).unwrap();
        std::thread::sleep(Duration::from_millis(250));
    }
    drop(reads_right(&path, &late));
    assert_eq!(second.tell("read 0 7") as u8, late[7 * PAGE], "who maps it by decode goes on");
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
}

/// The supervisor's error keeps its number on the way to the server: what may pass is tried again.
#[test]
fn soak_a_cache_folder_that_is_read_only_for_a_while_costs_nobody_a_page() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let cache = world.dir().join("cache");
    fs::create_dir(&cache).unwrap();
    let folder = cache.to_str().unwrap();
    run("mount", &["--bind", folder, folder]);
    let _bound = Mounted(cache.clone());
    world.mount(&["--cache-dir", folder]).ok();
    run("mount", &["-o", "remount,bind,ro", folder]);
    let bytes = random(6, 8 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let mut clone = reads_right(&path, &bytes);
    let status = template(&world);
    assert_eq!(status["serving"], "decode", "{status:#}");
    let why = status["why"].as_str().unwrap();
    assert!(why.contains("Read-only file system") && why.contains("/cache"), "{why}");
    run("mount", &["-o", "remount,bind,rw", folder]);
    promoted(&world, &path);
    drop(reads_right(&path, &bytes));
    assert_eq!(clone.tell("read 0 7") as u8, bytes[7 * PAGE], "who maps it by decode goes on");
    drop(clone);
    assert_eq!(world.counter("failed"), 0);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
}
