//! `gc` returns the space of removed templates without disturbing readers; `du` agrees with du(1).

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::error::Error;
use stencilfs::progress::{Progress, Silent};
use stencilfs::store::{BLOCK_SIZE, Collect, Digest, Scratch, Store, Template, TemplateRef};
use stencilfs::units::Bytes;

use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::run;
use crate::support::store::{Fixture, guest_like, random, read_all, stencil};

const BLOCK: usize = BLOCK_SIZE as usize;

fn bytes_of(template: &Template) -> stencilfs::error::Result<Vec<u8>> {
    let (mut scratch, mut out, mut block) = (Scratch::default(), Vec::new(), vec![0; BLOCK]);
    for number in 0..template.block_count(0) {
        let length = template.read_block(0, number, &mut scratch, &mut block)?;
        out.extend_from_slice(&block[..length]);
    }
    Ok(out)
}

/// Panics unless the numbers of `stencil du` add up to the result of du(1).
fn assert_du_adds_up(fixture: &Fixture) -> serde_json::Value {
    let answer = fixture.run(&["--json", "du"]).ok().json();
    let store = fixture.path("store");
    let seen = run("du", &["-s", "--block-size=1", store.to_str().unwrap()]);
    let seen: u64 = seen.split_whitespace().next().unwrap().parse().unwrap();
    let totals = &answer["totals"];
    assert_eq!(totals["store_bytes"], seen, "{answer:#}");
    let parts = [
        "unique_bytes",
        "shared_bytes",
        "dead_bytes",
        "overhead_bytes",
        "table_bytes",
        "session_bytes",
        "other_bytes",
    ];
    let sum: i64 = parts.iter().map(|part| totals[part].as_i64().unwrap()).sum();
    assert_eq!(sum, seen as i64, "{answer:#}");
    let of = |field: &str| {
        answer["templates"].as_array().unwrap().iter().map(|t| t[field].as_u64().unwrap()).sum::<u64>()
    };
    for part in ["unique_bytes", "logical_bytes", "data_bytes"] {
        assert_eq!(of(part), totals[part].as_u64().unwrap(), "{part}: {answer:#}");
    }
    answer
}

#[test]
fn du_totals_equal_the_result_of_coreutils_du() {
    let fixture = Fixture::new();
    let (own, common) = (random(1, 16 * BLOCK), random(2, 8 * BLOCK));
    fixture.import("a", &[&own[..], &common].concat());
    let alone = assert_du_adds_up(&fixture);
    assert_eq!(alone["totals"]["shared_bytes"], 0);
    fixture.import("b", &[&common[..], &random(3, 4 * BLOCK)].concat());
    fixture.import("c", &guest_like(4, 3 << 20));
    let three = assert_du_adds_up(&fixture);
    // Random blocks are stored raw: a record is a block.
    let template = |name: &str| {
        let all = three["templates"].as_array().unwrap();
        all.iter().find(|t| t["tags"][0] == format!("{name}:latest")).unwrap().clone()
    };
    let near = |value: &serde_json::Value, blocks: u64| {
        let (got, expected) = (value.as_u64().unwrap(), blocks * BLOCK_SIZE);
        assert!((expected..expected + expected / 50).contains(&got), "{got}, expected {expected}: {three:#}");
    };
    for (name, unique, shared) in [("a", 16, 8), ("b", 4, 8)] {
        near(&template(name)["unique_bytes"], unique);
        near(&template(name)["shared_bytes"], shared);
        near(&template(name)["stored_bytes"], unique + shared);
    }
    near(&three["totals"]["shared_bytes"], 8);
    fixture.run(&["rm", "a"]).ok();
    let left = assert_du_adds_up(&fixture);
    near(&left["totals"]["dead_bytes"], 16);
    assert_eq!(left["totals"]["shared_bytes"], 0);
    let text = fixture.run(&["du"]).ok().stdout;
    assert!(text.contains("UNIQUE") && text.contains(" unreferenced "), "{text}");
}

#[test]
fn gc_returns_the_space_of_removed_templates() {
    let fixture = Fixture::new();
    let common = random(2, 8 * BLOCK);
    let kept = [&common[..], &random(3, 4 * BLOCK)].concat();
    let first = [&random(1, 16 * BLOCK)[..], &common].concat();
    fixture.import("first", &first);
    fixture.import("kept", &kept);
    fixture.import("other", &random(5, 10 * BLOCK));
    // A reader with the old placement and no open pack.
    let reader = Store::open(&fixture.path("store")).unwrap();
    let digest = reader.resolve(&"kept".parse().unwrap()).unwrap();
    let template = reader.template(&digest).unwrap();
    fixture.run(&["rm", "first", "other"]).ok();
    // The leftovers of a killed writer.
    let dead = fixture.path("store/tmp/dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("pack"), random(6, 1 << 20)).unwrap();
    let before = fixture.disk_usage();
    let dry = fixture.run(&["--json", "gc", "--dry-run"]).ok().json();
    assert_eq!(dry["removed_packs"], 2, "{dry:#}");
    assert_eq!(dry["repacked_packs"], 1, "{dry:#}");
    assert_eq!(fixture.disk_usage(), before, "a dry run has changed the store");
    let packs = fixture.files("packs");
    let done = fixture.run(&["--json", "gc"]).ok().json();
    for field in ["removed_packs", "repacked_packs", "placements", "new_packs", "dead_bytes"] {
        assert_eq!(done[field], dry[field], "{field}: {done:#}");
    }
    let freed = done["freed_bytes"].as_u64().unwrap();
    let measured = before - fixture.disk_usage();
    assert!(freed.abs_diff(measured) < 64 << 10, "{freed} bytes reported, {measured} measured");
    assert!(measured > 25 * BLOCK_SIZE, "{measured}");
    assert!(!dead.exists());
    let now = fixture.files("packs");
    assert_eq!(now.iter().filter(|p| packs.contains(p)).count(), 1, "only the pack of `kept` stays");
    assert!(bytes_of(&template).unwrap() == kept, "the open reader read wrong bytes");
    assert!(read_all(&fixture.store(), &digest, 0).unwrap() == kept);
    fixture.run(&["verify"]).ok();
    let again = fixture.run(&["--json", "gc"]).ok().json();
    assert_eq!((&again["removed_packs"], &again["freed_bytes"]), (&0.into(), &0.into()));
    assert_du_adds_up(&fixture);
    // Removed blocks are stored again when they are imported again.
    fixture.import("first", &first);
    fixture.run(&["verify"]).ok();
    fixture.run(&["rm", "first", "kept"]).ok();
    fixture.run(&["gc"]).ok();
    assert_eq!(fixture.files("packs").len(), 0, "an empty store has packs");
}

#[test]
fn gc_leaves_a_damaged_pack_unchanged() {
    let fixture = Fixture::new();
    let common = random(2, 4 * BLOCK);
    fixture.import("first", &[&common[..], &random(1, 16 * BLOCK)].concat());
    fixture.import("kept", &common);
    let pack = fixture.files("packs").remove(0);
    fixture.run(&["rm", "first"]).ok();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[300] ^= 1;
    fs::write(&pack, &bytes).unwrap();
    fixture.run(&["gc"]).ok();
    assert!(fs::read(&pack).unwrap() == bytes);
    assert_eq!(fixture.run(&["verify"]).code, 3);
    // If the blocks of a template are unknown, gc frees nothing.
    fixture.import("kept", &common);
    fixture.run(&["gc"]).ok();
    fixture.run(&["verify"]).ok();
    let placement = fixture.files("images").into_iter().find(|p| p.ends_with("placement")).unwrap();
    let mut bytes = fs::read(&placement).unwrap();
    bytes[100] ^= 1;
    fs::write(&placement, bytes).unwrap();
    let packs = fixture.files("packs");
    let refused = fixture.run(&["gc"]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(refused.stderr.contains("import the same memory again"), "{refused:?}");
    assert_eq!(fixture.files("packs"), packs);
    fixture.import("kept", &common);
    fixture.run(&["gc"]).ok();
    fixture.run(&["verify"]).ok();
}

/// A gc that is killed at any moment loses nothing, and the next gc frees the rest.
#[test]
fn a_killed_gc_loses_no_data() {
    let fixture = Fixture::new();
    let parts: Vec<Vec<u8>> = (0..6).map(|seed| random(seed, 64 * BLOCK)).collect();
    let kept: Vec<u8> = parts.iter().flat_map(|p| p[..20 * BLOCK].to_vec()).collect();
    let start = Instant::now();
    let mut longest = Duration::from_millis(20);
    let rounds: u32 = host::rounds(12, 80);
    let mut killed = 0;
    // The first round measures the duration of gc. If the host is busy in that round, later kills come after the end of
    // gc: further rounds then run until enough kills have come in time.
    for round in 0..rounds * 4 {
        if round >= rounds && killed * 4 > rounds {
            break;
        }
        for (number, part) in parts.iter().enumerate() {
            fixture.import(&format!("part-{number}"), part);
        }
        fixture.import("kept", &kept);
        for number in 0..parts.len() {
            fixture.run(&["rm", &format!("part-{number}")]).ok();
        }
        if round == 0 {
            let begun = Instant::now();
            fixture.run(&["gc"]).ok();
            longest = begun.elapsed();
            continue;
        }
        let mut gc = stencil(fixture.dir.path(), &["gc"]).stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(longest.mul_f64(f64::from(round % rounds) / f64::from(rounds)));
        gc.kill().unwrap();
        match gc.wait().unwrap().code() {
            None => killed += 1,
            // gc has become faster: the next kill comes earlier.
            Some(_) => longest = longest.mul_f64(0.8),
        }
        let store = fixture.store();
        let digest = store.resolve(&"kept".parse().unwrap()).unwrap();
        assert!(read_all(&store, &digest, 0).unwrap() == kept, "round {round}");
        fixture.run(&["verify"]).ok();
        fixture.run(&["gc"]).ok();
        assert!(fixture.disk_usage() < 125 * BLOCK_SIZE, "{}", fixture.disk_usage());
        fixture.assert_clean();
    }
    fixture.run(&["verify"]).ok();
    assert!(killed * 4 > rounds, "only {killed} of {rounds} gc runs were killed in time");
    host::soaking().then(|| println!("{killed} of {rounds} killed, {:?}", start.elapsed()));
}

/// Imports in a loop on four threads do not block gc, and no import loses a block.
#[test]
fn soak_continuous_imports_do_not_starve_gc() {
    let fixture = Fixture::new();
    let store = fixture.store();
    fixture.import("kept", &guest_like(1, 4 << 20));
    let digest = store.resolve(&"kept".parse().unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..4 {
            let (fixture, stop) = (&fixture, &stop);
            scope.spawn(move || {
                let mut seed = number * 1000;
                let store = fixture.store();
                while !stop.load(Ordering::Relaxed) {
                    seed += 1;
                    let tag = format!("im-{number}");
                    let bytes = guest_like(seed, 1 << 20);
                    let imported = store.import(fixture.request(&tag, &bytes), &Silent).unwrap();
                    assert!(read_all(&store, &imported.digest, 0).unwrap() == bytes);
                }
            });
        }
        let _ends = SetOnDrop(&stop);
        for _ in 0..host::rounds(5, 60) {
            let none = AtomicBool::new(false);
            let begun = Instant::now();
            store.collect(Collect::default(), &none, &Silent).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
            read_all(&store, &digest, 0).unwrap();
        }
    });
    fixture.run(&["verify"]).ok();
}

/// An unreadable tag may name any template.
#[test]
fn gc_removes_no_untagged_template_while_a_tag_is_damaged() {
    let fixture = Fixture::new();
    let (named, tag) = (fixture.import("web:1", &random(1, BLOCK)).digest, fixture.path("store/tags/web/1"));
    let unnamed = fixture.import("other:1", &random(2, BLOCK)).digest;
    fs::remove_file(fixture.path("store/tags/other/1")).unwrap();
    let (sound, files) = (fs::read(&tag).unwrap(), fixture.files(""));
    for damage in [&b""[..], b"blake3:", b"x\n", &sound[..40], &[0xff; 72]] {
        fs::write(&tag, damage).unwrap();
        for words in [&["gc", "--untagged"][..], &["gc", "--untagged", "--dry-run"]] {
            let refused = fixture.run(words);
            assert_eq!(refused.code, 3, "{refused:?}");
            for part in ["store/tags/web/1", "stencil tag DIGEST web:1"] {
                assert!(refused.stderr.contains(part), "{part}: {refused:?}");
            }
        }
        assert_eq!(fixture.files(""), files, "a refused gc has changed the store");
    }
    fixture.run(&["tag", &named.to_string(), "web:1"]).ok();
    let done = fixture.run(&["--json", "gc", "--untagged"]).ok().json();
    assert_eq!(done["removed_digests"], serde_json::json!([unnamed]));
    assert!(read_all(&fixture.store(), &named, 0).unwrap() == random(1, BLOCK));
}

/// Another command may remove an unreferenced pack at any moment of a verification.
#[test]
fn soak_a_pack_removed_during_verify_is_not_damage() {
    let fixture = Fixture::new();
    fixture.import("kept", &random(1, BLOCK));
    let kept = fixture.files("packs");
    fixture.import("gone", &random(2, BLOCK));
    fixture.run(&["rm", "gone"]).ok();
    let pack = fixture.files("packs").into_iter().find(|pack| !kept.contains(pack)).unwrap();
    let aside = fixture.path("aside");
    fs::hard_link(&pack, &aside).unwrap();
    let begun = Instant::now();
    fixture.store().verify(None, &AtomicBool::new(false), &Silent).unwrap();
    let usual = begun.elapsed();
    let (mut seen, mut missed) = (0, 0);
    for round in 0..host::rounds(1000, 5_000) {
        let store = fixture.store();
        let begun = Instant::now();
        // The removal comes before, during or after the verification of the pack.
        let delay = usual.mul_f64((round % 100) as f64 / 50.0);
        let verified = thread::scope(|scope| {
            scope.spawn(|| {
                while begun.elapsed() < delay {
                    std::hint::spin_loop();
                }
                fs::remove_file(&pack).unwrap();
            });
            store.verify(None, &AtomicBool::new(false), &Silent).unwrap()
        });
        assert!(verified.damages.is_empty(), "round {round}: {:#?}", verified.damages);
        (seen, missed) = match verified.blocks {
            2 => (seen + 1, missed),
            _ => (seen, missed + 1),
        };
        fs::hard_link(&aside, &pack).unwrap();
    }
    assert!(
        seen > 0 && missed > 0,
        "the pack was removed before its verification in {missed} rounds, after it in {seen}"
    );
}

/// Removes the template and runs gc when the first block is verified.
struct Remover<'a> {
    store: &'a Store,
    digest: Digest,
    done: AtomicBool,
}

impl Progress for Remover<'_> {
    fn start(&self, _: &str, _: Option<Bytes>) {}
    fn start_count(&self, _: &str, _: &'static str, _: u64) {}
    fn advance(&self, _: Bytes) {
        if !self.done.swap(true, Ordering::Relaxed) {
            let what = TemplateRef::Digest(self.digest);
            self.store
                .remove(&what, Some(&self.digest), |_| Ok(Some(Vec::new())), |_| Ok(Vec::new()))
                .unwrap();
            self.store.collect(Collect::default(), &AtomicBool::new(false), &Silent).unwrap();
        }
    }
    fn finish(&self) {}
}

#[test]
fn a_template_removed_during_verify_is_not_damage() {
    let fixture = Fixture::new();
    let bytes = random(1, 2 * BLOCK);
    let half = fixture.import("half", &bytes[..BLOCK]).digest;
    let digest = fixture.import("whole", &bytes).digest;
    fixture.run(&["rm", &half.to_string()]).ok();
    assert_eq!(fixture.files("packs").len(), 2, "the second pack must be unopened at the removal");
    // A separate instance, like a verification by another process.
    let (store, other) = (fixture.store(), fixture.store());
    let remover = Remover { store: &other, digest, done: AtomicBool::new(false) };
    let verified = store.verify(Some(&digest), &AtomicBool::new(false), &remover).unwrap();
    assert!(verified.damages.is_empty(), "{:#?}", verified.damages);
    assert!(remover.done.into_inner() && fixture.files("packs").is_empty());
}

/// A removal that starts after gc has counted references and fails late, when gc has passed the template.
struct PutBack<'a> {
    store: &'a Store,
    digest: Digest,
    packs: Vec<PathBuf>,
    done: AtomicBool,
}

impl Progress for PutBack<'_> {
    fn start(&self, _: &str, _: Option<Bytes>) {
        let (store, digest, packs) = (self.store.clone(), self.digest, self.packs.clone());
        let (taken, has_gone) = mpsc::channel();
        thread::spawn(move || {
            let late = |_: &[Digest]| {
                taken.send(()).unwrap();
                let begun = Instant::now();
                while packs.iter().all(|pack| pack.exists()) && begun.elapsed() < Duration::from_secs(1) {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(Error::in_use("in use"))
            };
            let what = TemplateRef::Digest(digest);
            store.remove(&what, Some(&digest), |_| Ok(Some(Vec::new())), late).unwrap_err();
        });
        has_gone.recv().unwrap();
        self.done.store(true, Ordering::Relaxed);
    }
    fn start_count(&self, _: &str, _: &'static str, _: u64) {}
    fn advance(&self, _: Bytes) {}
    fn finish(&self) {}
}

#[test]
fn a_template_restored_after_a_failed_rm_keeps_all_packs() {
    let fixture = Fixture::new();
    let bytes = random(2, 8 * BLOCK);
    fixture.import("first", &[&random(1, 16 * BLOCK)[..], &bytes].concat());
    let digest = fixture.import("kept", &bytes).digest;
    fixture.run(&["rm", "first"]).ok();
    let (store, other) = (fixture.store(), fixture.store());
    let packs = fixture.files("packs");
    let removal = PutBack { store: &other, digest, packs, done: AtomicBool::new(false) };
    let done = store.collect(Collect::default(), &AtomicBool::new(false), &removal).unwrap();
    assert!(removal.done.into_inner());
    assert_eq!((done.repacked_packs, done.placements), (1, 1));
    assert!(read_all(&fixture.store(), &digest, 0).unwrap() == bytes);
    fixture.run(&["verify"]).ok();
}
