//! Damage in the store: reads of damaged blocks fail with EIO; no read returns a wrong byte.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use stencilfs::store::BLOCK_SIZE;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;

const PAGE: usize = 4096;
const BLOCKS: usize = 64;

/// Incompressible data, so that each byte of the pack belongs to exactly one block.
pub fn image() -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK_SIZE as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Flips one byte in the middle of the largest pack.
pub fn flip(store: &Path) {
    let mut packs: Vec<_> = fs::read_dir(store.join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.sort_by_key(|p| fs::metadata(p).unwrap().len());
    let pack = File::options().read(true).write(true).open(packs.last().unwrap()).unwrap();
    let middle = pack.metadata().unwrap().len() / 2;
    let mut byte = [0];
    pack.read_exact_at(&mut byte, middle).unwrap();
    pack.write_all_at(&[byte[0] ^ 0x10], middle).unwrap();
    pack.sync_all().unwrap();
}

/// Returns the blocks whose pages cannot be read; asserts that the pages of all other blocks have the expected bytes.
pub fn lost_blocks(path: &Path, expected: &[u8]) -> Vec<usize> {
    let file = File::open(path).unwrap();
    let mut page = vec![0; PAGE];
    let mut lost = Vec::new();
    for (number, wanted) in expected.chunks(PAGE).enumerate() {
        match file.read_exact_at(&mut page, (number * PAGE) as u64) {
            Ok(()) => assert!(page == wanted, "page {number} has wrong bytes"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "page {number}: {error}");
                lost.push(number * PAGE / BLOCK_SIZE as usize);
            }
        }
    }
    let pages = lost.len();
    lost.dedup();
    assert_eq!(pages, lost.len() * BLOCK_SIZE as usize / PAGE, "all pages of a damaged block must fail");
    lost
}

#[test]
fn a_flipped_byte_fails_only_its_block_with_eio() {
    let _host = host::shared();
    for serve in ["decode", "auto"] {
        let world = TestMount::new(serve);
        let bytes = image();
        let digest = world.import_bytes(&bytes, "web:1");
        flip(&world.store_dir());
        let path = world.file(&digest, "memory");
        let lost = lost_blocks(&path, &bytes);
        assert_eq!(lost.len(), 1, "{serve}: {lost:?}");
        let status = world.status();
        assert!(status["counters"]["damaged"].as_u64().unwrap() > 0, "{status:#}");
        let offset = lost[0] as u64 * BLOCK_SIZE;
        let log = world.log();
        for text in [&digest, "file memory", &format!("offset {offset}:"), "expected", "packs/"] {
            assert!(log.contains(text), "{serve}: '{text}' is not in the log:\n{log}");
        }
        let why = &status["templates"][0]["why"];
        assert!(why.as_str().unwrap().contains(if serve == "auto" {
            "cannot be verified: "
        } else {
            "decode"
        }));

        // A clone gets SIGBUS at the first access to a page of the damaged block, and not before that access.
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
        let first = lost[0] * BLOCK_SIZE as usize / PAGE;
        for number in (0..bytes.len() / PAGE).filter(|n| !(first..first + 16).contains(n)) {
            assert_eq!(clone.tell(&format!("read 0 {number}")) as u8, bytes[number * PAGE]);
        }
        assert_eq!(
            clone.dies_of(&format!("read 0 {first}")),
            Some(libc::SIGBUS),
            "page of the damaged block"
        );
        world.stencil(&["verify"]).exits(3);
    }
}

#[test]
fn passthrough_refuses_a_damaged_template() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    flip(&world.store_dir());
    let error = File::open(world.file(&digest, "memory")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert_eq!(world.counter("hydrations_failed"), 1);
    let why = world.status()["templates"][0]["why"].to_string();
    assert!(why.contains("cannot be verified: "), "{why}");
}

#[test]
fn swapped_packs_return_eio_and_never_wrong_bytes() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let first = image();
    let second: Vec<u8> = first.iter().map(|b| b ^ 0x55).collect();
    let (a, b) = (world.import_bytes(&first, "web:1"), world.import_bytes(&second, "web:2"));
    let packs: Vec<_> =
        fs::read_dir(world.store_dir().join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(packs.len(), 2, "{packs:?}");
    let aside = world.dir().join("aside");
    fs::rename(&packs[0], &aside).unwrap();
    fs::rename(&packs[1], &packs[0]).unwrap();
    fs::rename(&aside, &packs[1]).unwrap();
    for (digest, bytes) in [(&a, &first), (&b, &second)] {
        assert_eq!(lost_blocks(&world.file(digest, "memory"), bytes).len(), BLOCKS);
    }
    // After the packs are restored, reads by the next server succeed: the errors are not persistent.
    fs::rename(&packs[0], &aside).unwrap();
    fs::rename(&packs[1], &packs[0]).unwrap();
    fs::rename(&aside, &packs[1]).unwrap();
    world.kill_server();
    for (digest, bytes) in [(&a, &first), (&b, &second)] {
        assert!(fs::read(world.file(digest, "memory")).unwrap() == *bytes);
    }
}
