//! Several causes at once, and pages that clones share or have as anonymous memory.

use std::collections::BTreeSet;

use super::{Herd, none, number, pages, reasons};
use crate::clones::dirty_exact::{PAGE, SIZE, dirty, world};
use crate::support::host;

#[test]
fn two_causes_in_one_clone_are_both_named() {
    let _host = host::shared();
    // Advice without effect, and copies that the guest has made equal again.
    let mut herd = Herd::new("decode");
    herd.clones[0].tell(&format!("huge 0 {SIZE}"));
    for page in 20..40 {
        herd.clones[0].tell(&format!("write 0 {page} 7"));
    }
    let expected = pages(&[("huge-advice", SIZE / PAGE), ("equal-to-template", 20)]);
    assert_eq!(herd.found(), [none(), expected, none()]);
    drop(herd);
    // A mapping at an unsuitable address, of which zeros were written to some pages.
    let mut herd = Herd::new("passthrough");
    let before = number(herd.row(&herd.density(), 0), "mapped_clean_bytes");
    let memory = herd.world.file(&herd.digest, "memory");
    herd.clones[0].tell(&format!("shifted 1 {} 0 {SIZE}", memory.display()));
    herd.clones[0].read_pages(1, 1000..1100);
    for page in 2000..2010 {
        herd.clones[0].tell(&format!("fill 1 {page} 0"));
    }
    let density = herd.density();
    let row = herd.row(&density, 0);
    let shifted = number(row, "mapped_clean_bytes") - before;
    assert_eq!(reasons(row), pages(&[("misaligned", shifted / PAGE), ("zeros", 10)]));
}

#[test]
fn pages_that_a_fork_shares_are_no_equal_copies() {
    let _host = host::shared();
    let mut herd = Herd::new("decode");
    let child = herd.clones[0].tell("fork 0 50 51");
    let density = herd.density();
    let rows = density["clones"].as_array().unwrap();
    let child = rows.iter().find(|row| row["pid"] == child).unwrap();
    assert_eq!(number(child, "private_bytes"), 102 * PAGE);
    // The child shares 100 pages with its parent, and has written the same byte to two pages with different data.
    assert_eq!(reasons(&density["templates"][0]), none());
    herd.clones[0].tell("fill 0 60 210");
    herd.clones[1].tell("fill 0 61 210");
    assert_eq!(reasons(&herd.density()["templates"][0]), pages(&[("equal-copies", 1)]));
}

#[test]
fn zero_memory_is_explained_page_by_page() {
    let _host = host::shared();
    let (world, _) = world("passthrough");
    let launched = world.json(&["clone", "web:1", "-n", "2", "--simulate", "write=20%"]);
    let clones = launched["clones"].as_array().unwrap();
    let written: Vec<BTreeSet<u64>> =
        clones.iter().map(|clone| dirty(&world, clone["pid"].as_u64().unwrap() as u32).0).collect();
    let both = written[0].intersection(&written[1]).count() as u64;
    let density = world.json(&["density", "--why"]);
    let maps = density["clones"][0]["maps"].as_array().unwrap();
    assert!(maps.iter().any(|map| map["anonymous"] == true), "no zero memory: {maps:#?}");
    assert!(both > 100 && written[0].iter().any(|page| *page > SIZE / PAGE / 2));
    assert_eq!(reasons(&density["templates"][0])["copied-by-all"], 2 * both * PAGE);
    for row in density["clones"].as_array().unwrap() {
        assert_eq!(reasons(row), none());
    }
}
