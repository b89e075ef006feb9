//! Copied pages that are swapped out, and copied pages that KSM has merged.

use std::collections::BTreeSet;

use crate::clones::dirty_exact::{PAGE, SIZE, dirty, for_both, map, private_pages, row, total};
use crate::support::actor::Actor;
use crate::support::host;

#[test]
fn swapped_copies_are_dirty_and_not_private_ram() {
    let _host = host::alone();
    let swap = host::SwapFile::on(256 << 20);
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        map(&mut actor, memory);
        actor.write_pages(0, 10..110);
        // MADV_PAGEOUT skips pages in a per-CPU list, which holds up to 31; a read swaps in up to 8 neighbouring pages.
        for _ in 0..50 {
            actor.tell("pageout 0 10 80");
            if dirty(world, actor.pid()).1.len() >= 60 {
                break;
            }
        }
        actor.tell("read 0 11");
        let (present, swapped) = dirty(world, actor.pid());
        assert_eq!(present.union(&swapped).copied().collect::<BTreeSet<u64>>(), (10..110).collect());
        assert!(present.contains(&11) && (90..110).all(|p| present.contains(&p)));
        assert!(swapped.len() >= 30 && swapped.iter().all(|p| (10..90).contains(p)), "{swapped:?}");
        let row = row(world, actor.pid());
        assert_eq!(row["swap_bytes"].as_u64().unwrap(), swapped.len() as u64 * PAGE);
        assert_eq!(private_pages(&row), present.len() as u64);
        assert_eq!(row["dirty_pages"], 100);
    });
    drop(swap);
}

#[test]
fn ksm_merged_pages_count_once_in_the_total() {
    let _host = host::alone();
    let ksm = host::Ksm::on();
    for_both(|world, _, memory| {
        let mut actors: Vec<Actor> = (0..4).map(|_| Actor::start()).collect();
        for actor in &mut actors {
            map(actor, memory);
            actor.tell(&format!("mergeable 0 {SIZE}"));
            for page in 0..400 {
                // 16 distinct contents, each in all four clones.
                actor.tell(&format!("fill 0 {page} {}", 1 + page % 16));
            }
        }
        let merged = || total(world, "private_bytes") / PAGE;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        // KSM maps a merged page at most 256 times (max_page_sharing): 1600 pages with 16 contents become 16 frames.
        while merged() != 16 {
            assert!(std::time::Instant::now() < deadline, "KSM has left {} frames, not 16", merged());
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        for actor in &actors {
            assert_eq!(private_pages(&row(world, actor.pid())), 400, "each clone counts its own copies");
        }
        // KSM has nothing left to merge. All clones have copied the same pages.
        let why = world.json(&["density", "--why"]);
        let reasons = why["templates"][0]["reasons"].as_array().unwrap();
        let codes: Vec<&str> = reasons.iter().map(|reason| reason["code"].as_str().unwrap()).collect();
        assert_eq!(codes, ["copied-by-all"], "{reasons:?}");
        // A write to a merged page copies it.
        actors[0].tell("write 0 3 99");
        assert_eq!(merged(), 17);
    });
    drop(ksm);
}
