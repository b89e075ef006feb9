//! Reasons from how files are served and mapped.

use std::collections::BTreeSet;

use super::{Herd, none, number, pages, reasons};
use crate::clones::dirty_exact::{PAGE, SIZE, map, world_with};
use crate::support::actor::Actor;
use crate::support::host;

#[test]
fn decode_for_want_of_a_backing_is_named() {
    let _host = host::shared();
    let (world, digest) = world_with(&["--serve", "auto", "--cache-size", "1M"]);
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    actor.read_pages(0, 0..300);
    // More copied memory than page tables and overhead, so that these are no reasons.
    for page in 1000..1200 {
        actor.tell(&format!("fill 0 {page} {}", page - 950));
    }
    let density = world.json(&["density", "--why"]);
    let row = &density["clones"][0];
    let clean = number(row, "mapped_clean_bytes");
    assert!(clean >= 300 * PAGE);
    assert_eq!(reasons(row), pages(&[("decode-fallback", clean / PAGE)]));
    let served = &density["templates"][0]["served"][0];
    assert!(served["serving"] == "decode" && served["why"].is_string(), "{served}");
}

#[test]
fn huge_advice_by_decode_is_named() {
    let _host = host::shared();
    for (serve, expected) in [("decode", pages(&[("huge-advice", SIZE / PAGE)])), ("passthrough", none())] {
        let mut herd = Herd::new(serve);
        herd.clones[0].tell(&format!("huge 0 {SIZE}"));
        herd.clones[0].read_pages(0, [5000]);
        assert_eq!(herd.found(), [none(), expected, none()], "{serve}");
    }
}

#[test]
fn huge_pages_never_copy_more_than_the_written_pages_of_a_file() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let mut herd = Herd::new(serve);
        herd.clones[0].tell(&format!("huge 0 {SIZE}"));
        // One page in each 2 MiB, all pages of one, and a request to make one huge page of each part.
        let written: BTreeSet<u64> = (0..SIZE / PAGE).step_by(512).chain(1024..1536).collect();
        for page in &written {
            herd.clones[0].tell(&format!("write 0 {page} 77"));
        }
        for part in 0..SIZE >> 21 {
            // EINVAL: the kernel has no huge pages for copies of a file.
            assert!(herd.clones[0].ask(&format!("collapse 0 {} 512", part * 512)).is_err());
        }
        let density = herd.density();
        let row = herd.row(&density, 0);
        let own: u64 = written.iter().filter(|page| !(200..300).contains(*page)).count() as u64;
        assert_eq!(number(row, "private_bytes"), (own + 100) * PAGE, "{serve}");
    }
}
