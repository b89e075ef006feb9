//! The kernel never serves a byte that was flipped before the verification. The scrub finds a byte that was flipped
//! afterwards.

use std::fs::{self, File};

use rustix::fs::fgetxattr;
use rustix::io::Errno;
use stencilfs::sys::files::immutable;

use crate::mount::damage::{flip, image, lost_blocks};
use crate::support::actor::Actor;
use crate::support::daemon::drill::drop_caches;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

#[test]
fn a_byte_flipped_before_the_verification_is_found_and_never_served() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    flip(&world.store_dir());
    let path = world.file(&digest, "memory");
    assert_eq!(lost_blocks(&path, &bytes).len(), 1);
    let why = wait_for("the end of the verification", || {
        let why = world.status()["templates"][0]["why"].as_str()?.to_owned();
        why.contains("cannot be verified").then_some(why)
    });
    let log = world.log();
    assert!(log.contains("has no backing: ") && log.contains("packs/"), "{why}\n{log}");
    assert_eq!(lost_blocks(&path, &bytes).len(), 1, "after the verification too");
    assert_eq!(world.counter("opens_passthrough"), 0);

    // Importing the same memory again repairs the template.
    world.import_bytes(&bytes, "web:1");
    assert!(fs::read(&path).unwrap() == bytes);
}

/// Bytes that shrink by compression.
fn text() -> Vec<u8> {
    image().iter().map(|byte| b'a' + byte % 8).collect()
}

/// Flips a byte of a sealed pack.
fn flip_sealed(world: &TestMount) {
    let packs = fs::read_dir(world.store_dir().join("packs")).unwrap();
    let sealed: Vec<File> = packs.map(|pack| File::open(pack.unwrap().path()).unwrap()).collect();
    assert!(sealed.iter().all(|pack| immutable::clear(pack).unwrap()));
    flip(&world.store_dir());
    sealed.iter().for_each(|pack| immutable::set(pack).unwrap());
}

#[test]
fn damage_in_compressed_records_is_named_and_not_retried() {
    let _host = host::shared();
    for codec in ["lz4", "zstd"] {
        let world = TestMount::unmounted();
        let text = text();
        let source = world.dir().join("memory");
        fs::write(&source, &text).unwrap();
        let answer = world.json(&["import", source.to_str().unwrap(), "web:1", "--compression", codec]);
        flip(&world.store_dir());
        world.mount(&["--serve", "kernel"]).ok();
        // No file is opened: a mount verifies all templates.
        let why = wait_for("the verification in the background", || {
            let why = world.status()["templates"][0]["why"].as_str()?.to_owned();
            (!why.contains("being verified")).then_some(why)
        });
        assert!(why.contains("cannot be verified") && why.contains("packs/"), "{codec}: {why}");
        let digest = answer["digest"].as_str().unwrap();
        assert_eq!(lost_blocks(&world.file(digest, "memory"), &text).len(), 1, "{codec}");
    }
}

#[test]
fn the_scrub_verifies_the_packs_that_the_kernel_decodes_also_after_a_repair() {
    let _host = host::shared();
    // Raw records become wrong bytes, compressed ones wrong bytes or an error of the kernel.
    for bytes in [image(), text()] {
        let world = TestMount::with(&["--serve", "kernel", "--scrub-interval", "5"]);
        let digest = world.import_bytes(&bytes, "web:1");
        world.wait_until_verified(&digest);
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), bytes.len()));
        flip_sealed(&world);
        world.import_bytes(&bytes, "web:1");
        world.stencil(&["verify"]).ok();
        let why = wait_for("the scrub", || Some(world.status()["templates"][0]["why"].as_str()?.to_owned()));
        let expected = ["decodes other bytes than those imported", "cannot decode the block"];
        assert!(expected.iter().any(|text| why.contains(text)), "{why}");
        assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes, "decode reads the repaired packs");
    }
}

#[test]
fn a_byte_flipped_after_the_verification_is_found_by_the_scrub_and_by_no_later_mount_forgotten() {
    let _host = host::shared();
    let options = ["--serve", "kernel", "--scrub-interval", "1"];
    let world = TestMount::with(&options);
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    world.wait_until_verified(&digest);
    wait_for("a scrub without damage", || world.log().contains("were verified again").then_some(()));

    flip_sealed(&world);
    let why = wait_for("the scrub", || Some(world.status()["templates"][0]["why"].as_str()?.to_owned()));
    assert!(why.contains("cannot be verified"), "{why}");
    assert_eq!(world.status()["templates"][0]["serving"], "decode");
    assert!(world.log().contains("was damaged after its verification: "));
    let counted = ["scrubs_done", "scrubs_damaged", "scrubbed_bytes"].map(|name| world.counter(name));
    assert!(counted[0] > 0 && counted[1] == 1 && counted[2] >= bytes.len() as u64, "{counted:?}");
    drop_caches();
    let path = world.file(&digest, "memory");
    assert_eq!(lost_blocks(&path, &bytes).len(), 1);

    // The successor of the server serves the file by decode too.
    world.kill_server();
    assert_eq!(lost_blocks(&path, &bytes).len(), 1);
    assert_eq!(world.status()["templates"][0]["serving"], "decode");

    let remembered = fgetxattr(
        File::open(world.store_dir().join("images").join(&digest)).unwrap(),
        "trusted.stencil.verified.memory",
        &mut [0; 64][..],
    );
    assert_eq!(remembered, Err(Errno::NODATA));
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    world.mount(&["--serve", "kernel", "--scrub-interval", "0"]).ok();
    assert_eq!(lost_blocks(&path, &bytes).len(), 1);
    assert_eq!(world.counter("opens_passthrough"), 0);
}
