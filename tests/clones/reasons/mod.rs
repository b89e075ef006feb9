//! `stencil density --why`: clones for each reason, of which every copied page is known. The frame audit agrees with
//! the figures from which the bytes come.

mod caches;
mod copied_file;
mod serving;
mod together;

use std::collections::BTreeMap;

use serde_json::Value;

use super::accounting::number;
use super::dirty_exact::{PAGE, SIZE, map, world};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;

/// Two clones without a reason: each has filled 100 pages that the other has not, every page with different bytes.
struct Herd {
    world: TestMount,
    digest: String,
    clones: [Actor; 2],
}

/// Bytes by code: of the template, of the first clone, of the second.
type Found = [BTreeMap<String, u64>; 3];

impl Herd {
    fn new(serve: &str) -> Herd {
        let (world, digest) = world(serve);
        let mut clones = [Actor::start(), Actor::start()];
        for (index, actor) in clones.iter_mut().enumerate() {
            map(actor, &world.file(&digest, "memory"));
            for page in 0..100 {
                let number = index * 100 + page;
                actor.tell(&format!("fill 0 {} {}", 200 + number, 1 + number));
            }
        }
        Herd { world, digest, clones }
    }

    fn map_again(&mut self, id: u32, offset: u64, length: u64) {
        let memory = self.world.file(&self.digest, "memory");
        self.clones[0].tell(&format!("map {id} {} {offset} {length} rw", memory.display()));
    }

    fn density(&self) -> Value {
        let density = self.world.json(&["density", "--why", "--audit"]);
        let frames = &density["audit"]["frames"];
        assert_eq!(frames["private_bytes"], frames["private_accounted"], "{frames:#}");
        density
    }

    fn row<'a>(&self, density: &'a Value, clone: usize) -> &'a Value {
        let rows = density["clones"].as_array().unwrap();
        rows.iter().find(|row| row["pid"] == self.clones[clone].pid()).unwrap()
    }

    fn found(&self) -> Found {
        let density = self.density();
        [&density["templates"][0], self.row(&density, 0), self.row(&density, 1)].map(reasons)
    }
}

fn reasons(row: &Value) -> BTreeMap<String, u64> {
    let list = row["reasons"].as_array().unwrap_or_else(|| panic!("no reasons in {row:#}"));
    assert!(list.iter().all(|reason| reason["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty())));
    let pair =
        |reason: &Value| (reason["code"].as_str().unwrap().to_owned(), reason["bytes"].as_u64().unwrap());
    let mut found: BTreeMap<String, u64> = list.iter().map(pair).collect();
    assert_eq!(found.len(), list.len(), "each code once: {row:#}");
    // Readahead decides how many zero pages of a template are in RAM.
    let zeros = found.remove("resident-zeros").unwrap_or(0);
    assert_eq!(zeros, row["resident_zero_bytes"].as_u64().unwrap_or(0), "{row:#}");
    found
}

/// Bytes of pages by code.
fn pages(expected: &[(&str, u64)]) -> BTreeMap<String, u64> {
    expected.iter().map(|(code, pages)| ((*code).to_owned(), pages * PAGE)).collect()
}

fn none() -> BTreeMap<String, u64> {
    BTreeMap::new()
}

#[test]
fn clean_clones_have_no_reason() {
    let _host = host::shared();
    let herd = Herd::new("decode");
    assert_eq!(herd.found(), [none(), none(), none()]);
    let text = herd.world.stencil(&["density", "--why"]).ok().out;
    let codes = text.split_once("\nreasons\n").unwrap().1;
    assert!(
        codes == "  none\n" || codes.starts_with("  resident-zeros ") && codes.lines().count() == 2,
        "{text}"
    );
    assert!(herd.density()["clones"][0]["reasons"].is_array());
    assert!(herd.world.json(&["density"])["clones"][0]["reasons"].is_null(), "without --why");
}

#[test]
fn pages_with_the_bytes_of_the_template_or_zeros_are_named() {
    let _host = host::shared();
    let mut herd = Herd::new("decode");
    // Page 5 of the template has a 7 there. Pages 3 and 4 have data, the second half of the file has none.
    for command in ["write 0 5 7", "fill 0 3 0", "fill 0 4 0"] {
        herd.clones[0].tell(command);
    }
    herd.clones[1].tell(&format!("fill 0 {} 0", SIZE / PAGE - 3));
    let expected =
        [none(), pages(&[("equal-to-template", 1), ("zeros", 2)]), pages(&[("equal-to-template", 1)])];
    assert_eq!(herd.found(), expected);
    let text = herd.world.stencil(&["density", "--why"]).ok().out;
    assert!(
        text.contains("equal-to-template     8.00 KiB  2 clones, most by ")
            && text.contains("zeros")
            && text.contains(&format!("8.00 KiB  1 clone: {}\n", herd.clones[0].pid()))
            && text.contains("balloon"),
        "{text}"
    );
}

#[test]
fn equal_copies_and_pages_that_all_clones_copy_are_named() {
    let _host = host::shared();
    let mut herd = Herd::new("decode");
    // Ten pages in both clones, with different bytes, except that one page of each clone is equal to another.
    for page in 10..20 {
        herd.clones[0].tell(&format!("fill 0 {page} {}", 205 + page));
        herd.clones[1].tell(&format!("fill 0 {page} {}", 225 + page));
    }
    assert_eq!(herd.found(), [pages(&[("copied-by-all", 20)]), none(), none()]);
    herd.clones[0].tell("fill 0 30 250");
    herd.clones[1].tell("fill 0 40 250");
    herd.clones[1].tell("fill 0 41 250");
    assert_eq!(herd.found(), [pages(&[("copied-by-all", 20), ("equal-copies", 2)]), none(), none()]);
}

#[test]
fn a_mapping_of_which_every_page_is_copied_is_named() {
    let _host = host::shared();
    let mut herd = Herd::new("decode");
    herd.map_again(1, 1 << 20, 8 * PAGE);
    herd.clones[0].write_pages(1, 0..7);
    assert_eq!(herd.found(), [none(), none(), none()]);
    herd.clones[0].write_pages(1, 7..8);
    assert_eq!(herd.found(), [none(), pages(&[("all-copied", 8)]), none()]);
}

#[test]
fn page_tables_and_memory_of_the_monitor_are_named_if_they_are_larger() {
    let _host = host::shared();
    let mut herd = Herd::new("decode");
    herd.clones[0].tell(&format!("anon 1 {SIZE}"));
    herd.clones[0].write_pages(1, 0..400);
    let density = herd.density();
    let row = herd.row(&density, 0);
    assert_eq!(
        reasons(row),
        BTreeMap::from([("overhead".to_owned(), row["overhead_bytes"].as_u64().unwrap())])
    );
    drop(herd);
    // One page in each 2 MiB of 512 MiB needs a page of page tables.
    let mut herd = Herd::new("decode");
    for id in 1..9 {
        herd.map_again(id, 0, SIZE);
        herd.clones[0].read_pages(id, (0..SIZE / PAGE).step_by(512));
    }
    let density = herd.density();
    let row = herd.row(&density, 0);
    let tables = row["page_table_bytes"].as_u64().unwrap();
    assert_eq!(reasons(row), BTreeMap::from([("page-tables".to_owned(), tables)]));
    assert_eq!(reasons(herd.row(&density, 1)), none());
}

#[test]
fn a_mapping_that_cannot_have_huge_entries_is_named() {
    let _host = host::shared();
    let mut herd = Herd::new("passthrough");
    let before = herd.density();
    assert_eq!(reasons(herd.row(&before, 0)), none());
    let clean = |density: &Value, herd: &Herd| number(herd.row(density, 0), "mapped_clean_bytes");
    let (before, memory) = (clean(&before, &herd), herd.world.file(&herd.digest, "memory"));
    herd.clones[0].tell(&format!("shifted 1 {} 0 {SIZE}", memory.display()));
    herd.clones[0].read_pages(1, [0, 4000]);
    let density = herd.density();
    let bytes = clean(&density, &herd) - before;
    assert!(bytes >= 2 * PAGE);
    assert_eq!(reasons(herd.row(&density, 0)), BTreeMap::from([("misaligned".to_owned(), bytes)]));
}
