//! The kernel decodes the imported bytes from every kind of record, and serves a verified template at its first open.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde_json::json;

use crate::support::daemon::drill::drop_caches;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::random;

const BLOCK: usize = 64 << 10;
const PAGE: usize = 4096;

/// Blocks with few and with many different bytes, zero blocks, and a block that is zero in parts. Differs for each
/// `seed`, so that no block is shared.
pub fn mixed(seed: u64, blocks: usize) -> Vec<u8> {
    let mut bytes = random(seed, blocks * BLOCK);
    for (number, block) in bytes.chunks_mut(BLOCK).enumerate() {
        match number % 5 {
            0 => {}
            1 => block.fill(0),
            2 => block.iter_mut().for_each(|byte| *byte &= 3),
            3 => block[3 * PAGE..9 * PAGE].fill(0),
            _ => block.iter_mut().for_each(|byte| *byte = b'a' + *byte % 20),
        }
    }
    bytes
}

#[test]
fn every_kind_of_record_is_decoded_byte_for_byte() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    let mut all = Vec::new();
    for (seed, codec) in (1..).zip(["lz4", "zstd", "zstd:19", "none"]) {
        for nth in 0..5 {
            // The last block ends after 1 to 13 pages.
            let memory = &mixed(seed * 10 + nth, 23)[..22 * BLOCK + (3 * nth as usize + 1) * PAGE];
            let disk = random(seed * 100 + nth, 5000);
            let tag = format!("{}-{nth}:1", codec.replace(':', "-"));
            let (source, disk_path) = (world.dir().join("memory"), world.dir().join("disk"));
            fs::write(&source, memory).unwrap();
            fs::write(&disk_path, &disk).unwrap();
            let file = format!("disk={},kind=blob", disk_path.display());
            let words = ["import", source.to_str().unwrap(), &tag, "--compression", codec];
            let answer = world.json(&[&words[..], &["--file", &file]].concat());
            let digest = answer["digest"].as_str().unwrap().to_owned();
            world.wait_until_verified(&digest);
            all.push((tag, digest, memory.to_owned(), disk));
        }
    }
    drop_caches();
    let before = world.counter("reads");
    for (tag, digest, memory, _) in &all {
        assert!(fs::read(world.file(digest, "memory")).unwrap() == *memory, "{tag}");
    }
    assert_eq!(world.counter("reads"), before, "no READ reaches the server");

    // VMMs read disks directly (`O_DIRECT`), which the kernel refuses for files that it decodes.
    let direct = |path: &Path| File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    for (tag, digest, _, disk) in &all {
        let path = world.file(digest, "disk");
        assert!(fs::read(&path).unwrap() == *disk, "{tag}");
        assert!(direct(&path).is_ok());
        assert_eq!(direct(&world.file(digest, "memory")).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
    let status = world.status();
    let files = status["templates"][0]["files"].as_array().unwrap();
    let serving: Vec<_> = files.iter().map(|file| (&file["name"], &file["serving"])).collect();
    assert_eq!(serving, [(&json!("disk"), &json!("decode")), (&json!("memory"), &json!("kernel"))]);
}

#[test]
fn a_file_is_served_by_decode_until_its_blocks_are_verified() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    let bytes = random(1, 96 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let early = File::open(&path).unwrap();
    assert_eq!((world.counter("opens_decode"), world.counter("opens_passthrough")), (1, 0));
    world.wait_until_verified(&digest);
    let late = File::open(&path).unwrap();
    assert!(early.metadata().unwrap().ino() != late.metadata().unwrap().ino(), "each way has its own number");
    for file in [&early, &late] {
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == bytes);
    }
    let text = world.stencil(&["status"]).ok().out;
    assert!(text.contains("kernel"), "{text}");
}

#[test]
fn a_verified_template_is_decoded_by_the_kernel_from_the_first_open_of_the_next_mount_on() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    let digest = world.import_bytes(&mixed(1, 64), "web:1");
    world.wait_until_verified(&digest);
    let mountpoint = world.mountpoint().to_str().unwrap().to_owned();
    world.stencil(&["umount", &mountpoint]).ok();
    world.mount(&["--serve", "kernel"]).ok();
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == mixed(1, 64));
    assert_eq!((world.counter("opens_decode"), world.counter("opens_passthrough")), (0, 1));

    // A pack can change while the store is unsealed, so the next mount verifies all files again.
    world.stencil(&["umount", &mountpoint]).ok();
    world.stencil(&["store", "unseal", world.store_dir().to_str().unwrap()]).ok();
    world.mount(&["--serve", "kernel"]).ok();
    drop(File::open(world.file(&digest, "memory")).unwrap());
    let verified = "is served by decode: the blocks are being verified for kernel decode";
    wait_for("another verification", || world.log().contains(verified).then_some(()));
}
