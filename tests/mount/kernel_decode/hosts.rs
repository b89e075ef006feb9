//! Hosts and stores without kernel decode: files are served by decode, and the status has the reason.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::random;

const LENGTH: usize = 1 << 20;

/// Mounts the store of a scenario with these options, and returns why a template is served by decode.
fn reason(world: &TestMount, options: &[&str]) -> String {
    let bytes = random(1, LENGTH);
    let digest = world.import_bytes(&bytes, "web:1");
    world.mount(&[&["--serve", "kernel"], options].concat()).ok();
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    wait_for("the reason", || {
        let why = world.status()["templates"][0]["why"].as_str()?.to_owned();
        (!why.contains("being verified")).then_some(why)
    })
}

fn in_memory(path: &Path) -> Mounted {
    fs::create_dir_all(path).unwrap();
    mount("none", path, "tmpfs", MountFlags::empty(), Some(c"mode=755")).unwrap();
    Mounted(path.to_owned())
}

#[test]
fn metadata_in_a_directory_that_cannot_hold_backings_is_refused() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let memory = world.dir().join("memory-cache");
    let _mounted = in_memory(&memory);
    let run = world.mount(&["--serve", "kernel", "--cache-dir", memory.to_str().unwrap()]);
    run.exits(1).says("the cache directory cannot hold backings");
}

#[test]
fn a_store_whose_packs_cannot_be_sealed_is_served_by_decode() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let (tmpfs, cache) = (world.store_dir(), world.dir().join("cache"));
    fs::create_dir(&cache).unwrap();
    fs::remove_dir_all(&tmpfs).unwrap();
    let _mounted = in_memory(&tmpfs);
    let why = reason(&world, &["--cache-dir", cache.to_str().unwrap()]);
    assert!(why.contains("the host does not support kernel decode: "), "{why}");
    assert!(why.contains("immutable"), "{why}");
}

#[test]
fn a_pack_with_a_second_name_is_not_sealed() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let digest = world.import_bytes(&random(1, LENGTH), "web:1");
    let pack = fs::read_dir(world.store_dir().join("packs")).unwrap().next().unwrap().unwrap().path();
    fs::hard_link(&pack, world.dir().join("link")).unwrap();
    let why = reason(&world, &[]);
    assert!(why.contains("second name"), "{why}");
    fs::remove_file(world.dir().join("link")).unwrap();
    drop(digest);
}
