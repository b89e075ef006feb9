//! `stencil dirty --mark` and `--since`: the pages that a script of writes has changed since each mark, by both methods.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use stencilfs::memory::Backend;
use stencilfs::units::{MemoryOffset, PageIndex};

use super::dirty_exact::{PAGE, SIZE, for_both, map, world};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount};

type Pages = BTreeSet<u64>;

/// The pages of a report: those with a copy, those that were replaced.
fn pages(ranges: &Value) -> [Pages; 2] {
    let mut sets = [Pages::new(), Pages::new()];
    for range in ranges.as_array().unwrap_or_else(|| panic!("no ranges: {ranges}")) {
        let (first, count) = (range["first_page"].as_u64().unwrap(), range["pages"].as_u64().unwrap());
        sets[usize::from(range["replaced"] == true)].extend(first..first + count);
    }
    sets
}

fn since(world: &TestMount, pid: u32, epoch: &str) -> Value {
    let report = world.json(&["dirty", &pid.to_string(), "--since", epoch, "--ranges"]);
    let [copied, replaced] = pages(&report["ranges"]);
    assert_eq!(report["dirty_pages"], copied.len() + replaced.len(), "{report}");
    assert_eq!(report["replaced_pages"], replaced.len(), "{report}");
    report
}

fn mark(world: &TestMount, pid: u32, name: &[&str]) -> Value {
    world.json(&[&["dirty", &pid.to_string(), "--mark"], name].concat())
}

/// Different pages of the whole file, by a fixed rule. Neighbouring seeds have many pages in common.
fn scattered(count: u64, seed: u64) -> Pages {
    (0..count).map(|i| ((i + seed * 40) * 7919) % (SIZE / PAGE)).collect()
}

#[test]
fn a_difference_has_exactly_the_pages_that_are_copied_later() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        map(&mut actor, memory);
        let before = scattered(300, 0);
        actor.write_pages(0, before.iter().copied());
        let marked = mark(world, actor.pid(), &[]);
        assert_eq!([&marked["epoch"], &marked["method"]], ["e1", "difference"]);
        assert_eq!(pages(&since(world, actor.pid(), "e1")["ranges"])[0], Pages::new());

        let later: Pages = scattered(300, 1).difference(&before).copied().collect();
        actor.write_pages(0, later.iter().copied());
        // Two scans do not show that a page was written again.
        actor.write_pages(0, before.iter().copied().take(50));
        let discarded: Vec<u64> = before.iter().copied().rev().take(3).collect();
        for page in &discarded {
            actor.tell(&format!("discard 0 {page} 1"));
        }
        let report = since(world, actor.pid(), "e1");
        assert_eq!(pages(&report["ranges"])[0], later);
        assert_eq!(report["method"], "difference");
        assert_eq!(report["discarded_pages"], 3);
        assert_eq!(pages(&report["discarded"])[0], discarded.iter().copied().collect());

        // The bitmap has the discarded pages too: they have other bytes than at the mark.
        let out = world.dir().join("bitmap");
        let words = ["dirty", &actor.pid().to_string(), "--since", "e1", "--bitmap", out.to_str().unwrap()];
        world.stencil(&words).ok();
        let bits = fs::read(&out).unwrap();
        let set: Pages =
            (0..SIZE / PAGE).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1).collect();
        assert_eq!(set, later.iter().chain(&discarded).copied().collect());

        let text = world.stencil(&["dirty", &actor.pid().to_string(), "--since", "e1"]).ok().out;
        assert!(
            text.contains("pages changed") && text.contains(", by difference; 3 pages discarded"),
            "{text}"
        );
        let words = ["dirty", &actor.pid().to_string(), "--since", "e1", "--ranges"];
        let warning = world.stencil(&words).ok().err;
        assert!(warning.contains("written again are not included"), "{warning}");
        // Without an epoch, the report is as before.
        let all = world.json(&["dirty", &actor.pid().to_string()]);
        assert!(all["method"].is_null() && all["epoch"].is_null(), "{all}");
        assert_eq!(all["dirty_pages"], before.len() + later.len() - 3);
    });
}

#[test]
fn write_protection_finds_every_write_since_each_of_several_epochs() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        map(&mut actor, memory);
        actor.write_pages(0, scattered(300, 0));
        let descriptor = actor.tell(&format!("track 0 {SIZE}"));
        let mut rounds = Vec::new();
        for round in 1..6 {
            let marked = mark(world, actor.pid(), &[]);
            assert_eq!(
                marked,
                json!({"schema": 1, "pid": actor.pid(), "epoch": format!("e{round}"), "method": "write-protect"})
            );
            assert_eq!(pages(&since(world, actor.pid(), &format!("e{round}"))["ranges"])[0], Pages::new());
            actor.read_pages(0, scattered(200, 9));
            let written = scattered(300, round % 4);
            actor.write_pages(0, written.iter().copied());
            rounds.push(written);
            for (first, _) in rounds.iter().enumerate() {
                let expected: Pages = rounds[first..].iter().flatten().copied().collect();
                let report = since(world, actor.pid(), &format!("e{}", first + 1));
                assert_eq!(pages(&report["ranges"])[0], expected, "since e{} in round {round}", first + 1);
                assert_eq!(report["method"], "write-protect");
            }
        }
        // Without the registration only a difference is left, and the report says so.
        let expected: Pages = scattered(300, 0);
        let new: Pages = rounds.iter().flatten().filter(|page| !expected.contains(page)).copied().collect();
        actor.tell(&format!("close {descriptor}"));
        let report = since(world, actor.pid(), "e1");
        assert_eq!(report["method"], "difference");
        assert_eq!(pages(&report["ranges"])[0], new);
    });
}

#[test]
fn replaced_pages_are_never_missing() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        for tracked in [false, true] {
            let mut actor = Actor::start();
            map(&mut actor, memory);
            if tracked {
                actor.tell(&format!("track 0 {SIZE}"));
            }
            actor.write_pages(0, 100..110);
            actor.tell("replace 0 200 8");
            mark(world, actor.pid(), &["before"]);
            actor.tell("replace 0 105 2");
            actor.write_pages(0, [202, 300]);
            let report = since(world, actor.pid(), "before");
            let [copied, replaced] = pages(&report["ranges"]);
            assert_eq!(copied, Pages::from([300]));
            // Write protection has no note about other memory, so all of it counts.
            let earlier = if tracked { 200..208 } else { 0..0 };
            assert_eq!(replaced, earlier.chain(105..107).collect(), "{report}");
            assert_eq!(report["discarded_pages"], 0);
        }
    });
}

/// The memory of the library's backend has zero runs as anonymous memory.
#[test]
fn a_backend_that_tracks_writes_reports_each_page_of_data_and_of_zero_runs() {
    let _host = host::shared();
    let (world, digest) = world("passthrough");
    let backend = Backend::template(world.file(&digest, "memory")).unwrap();
    let poke = |pages: &Pages| {
        for page in pages {
            backend.poke(MemoryOffset::new(page * PAGE + 7), 1).unwrap();
        }
    };
    let before = scattered(500, 0);
    poke(&before);
    let me = std::process::id();
    assert_eq!(mark(&world, me, &["untracked"])["method"], "difference");
    backend.track_writes().unwrap();
    backend.track_writes().unwrap();
    assert_eq!(mark(&world, me, &["tracked"])["method"], "write-protect");
    for page in scattered(100, 7) {
        backend.touch(PageIndex::new(page)).unwrap();
    }
    let written = scattered(500, 1);
    assert!(written.intersection(&before).count() > 100);
    let in_zeros = written.iter().filter(|page| **page >= SIZE / PAGE / 2).count();
    assert!((100..400).contains(&in_zeros));
    poke(&written);
    let report = since(&world, me, "tracked");
    assert_eq!(
        (pages(&report["ranges"])[0].clone(), &report["method"]),
        (written.clone(), &json!("write-protect"))
    );
    let report = since(&world, me, "untracked");
    let new = written.difference(&before).copied().collect();
    assert_eq!((pages(&report["ranges"])[0].clone(), &report["method"]), (new, &json!("difference")));
}

#[test]
fn marks_at_the_same_time_have_different_names_and_lose_no_write() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    actor.write_pages(0, 0..50);
    actor.tell(&format!("track 0 {SIZE}"));
    mark(&world, actor.pid(), &["first"]);
    actor.write_pages(0, 10..20);
    let pid = actor.pid();
    let names: BTreeSet<String> = std::thread::scope(|scope| {
        let marks: Vec<_> = (0..8).map(|_| scope.spawn(|| mark(&world, pid, &[])["epoch"].clone())).collect();
        marks.into_iter().map(|mark| mark.join().unwrap().as_str().unwrap().to_owned()).collect()
    });
    assert_eq!(names, (1..9).map(|number| format!("e{number}")).collect());
    assert_eq!(pages(&since(&world, pid, "first")["ranges"])[0], (10..20).collect());
    for name in &names {
        assert_eq!(pages(&since(&world, pid, name)["ranges"])[0], Pages::new());
    }
    // The oldest epochs go.
    for _ in 0..8 {
        mark(&world, pid, &[]);
    }
    world.stencil(&["dirty", &pid.to_string(), "--since", "first"]).exits(4).says("has no epoch 'first'");
    since(&world, pid, "e1");
}

#[test]
fn a_mark_that_fails_loses_no_write() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    actor.write_pages(0, 0..50);
    actor.tell(&format!("track 0 {SIZE}"));
    let pid = actor.pid();
    mark(&world, pid, &["first"]);
    actor.write_pages(0, 10..20);
    let pid_text = pid.to_string();
    let mut limited = world.command_in("prlimit");
    limited.arg("--fsize=0").arg(STENCIL).args(["dirty", &pid_text, "--mark"]);
    assert_eq!(limited.output().unwrap().status.code(), Some(1));
    let report = since(&world, pid, "first");
    assert_eq!(
        (pages(&report["ranges"])[0].clone(), &report["method"]),
        ((10..20).collect(), &json!("write-protect"))
    );
}

fn records(world: &TestMount) -> Vec<PathBuf> {
    let all = fs::read_dir(world.runtime_dir().join("epochs")).into_iter().flatten();
    all.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn epochs_belong_to_one_process_and_end_with_it() {
    let _host = host::shared();
    let (world, _) = world("decode");
    world.stencil(&["clone", "web:1", "-n", "1", "--simulate", "write=10p"]).ok();
    let id = || world.stencil(&["ps", "-q"]).ok().out.trim().to_owned();
    let first = id();
    assert_eq!(world.stencil(&["dirty", &first, "--mark", "start"]).ok().out, "start\n");
    assert_eq!(world.stencil(&["dirty", &first, "--mark"]).ok().out, "e1\n");
    world.stencil(&["dirty", &first, "--mark", "start"]).exits(2).says("has an epoch 'start' already");
    world.stencil(&["dirty", &first, "--mark", "../x"]).exits(2).says("invalid name");
    world.stencil(&["dirty", &first, "--since", "start"]).ok();
    world.stencil(&["dirty", &first, "--since", "end"]).exits(4).says("start, e1");
    assert_eq!(records(&world).len(), 1);
    let (record, aside) = (records(&world).remove(0), world.dir().join("aside"));
    fs::rename(&record, &aside).unwrap();
    world.stencil(&["stop", "--all"]).ok();

    // A clone of the same template is another process, also with the same process id.
    world.stencil(&["clone", "web:1", "-n", "1", "--simulate", "write=10p"]).ok();
    let second = id();
    world.stencil(&["dirty", &second, "--since", "start"]).exits(4).says("has no epoch 'start'");
    let pid = world.json(&["ps"])["clones"][0]["pid"].as_u64().unwrap();
    let name = record.file_name().unwrap().to_str().unwrap();
    let reused = record.with_file_name(format!("{pid}-{}", name.split_once('-').unwrap().1));
    fs::rename(&aside, &reused).unwrap();
    world.stencil(&["dirty", &second, "--since", "start"]).exits(4).says("has no epoch 'start'");
    world.stencil(&["ps"]).ok();
    assert_eq!(records(&world), Vec::<PathBuf>::new(), "the record of a process that has ended is removed");
    let other = Actor::start();
    world.stencil(&["dirty", &other.pid().to_string(), "--mark"]).exits(4).says("maps no template");
    world.stencil(&["dirty", &other.pid().to_string(), "--mark", "a b"]).exits(2).says("invalid name");
    assert_eq!(records(&world), Vec::<PathBuf>::new());
}

#[test]
fn records_that_another_user_could_have_written_are_refused_by_name() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let mut actor = Actor::start();
    map(&mut actor, &world.file(&digest, "memory"));
    let pid = actor.pid().to_string();
    let since = || -> Run { world.stencil(&["dirty", &pid, "--since", "e1"]) };
    world.stencil(&["dirty", &pid, "--mark"]).ok();
    let folder = records(&world).remove(0);
    let file = folder.join("epochs.json");
    let text = fs::read(&file).unwrap();
    let mode = |path: &PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    since().ok();
    for path in [&file, &folder] {
        mode(path, 0o777);
        since().exits(1).says("writable by other users").says(folder.to_str().unwrap());
        mode(path, 0o700);
    }
    let bad_name = r#"[{"name":"../e1","at":0,"tracked":false,"copied":[],"written":[]}]"#;
    for contents in ["", "{", r#"["copied"]"#, bad_name] {
        fs::write(&file, contents).unwrap();
        since().exits(1).says("cannot use the epochs of a process").says(folder.to_str().unwrap());
        world.stencil(&["dirty", &pid, "--mark"]).exits(1).says("cannot use the epochs of a process");
    }
    fs::remove_file(&file).unwrap();
    crate::support::mount::run("mkfifo", &[&file]);
    since().exits(1).says("cannot use the epochs of a process");
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
    since().exits(1).says("cannot use the epochs of a process");
    fs::remove_file(&file).unwrap();
    fs::write(&file, text).unwrap();
    mode(&file, 0o600);
    since().ok();
}
