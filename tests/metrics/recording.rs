//! `stencil record`: its samples, and what a crash leaves of them.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::recording::{Recording, Sample};
use stencilfs::units::PAGE_SIZE;

use crate::clones::accounting::{MIB, world};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// Reads all samples.
#[track_caller]
pub fn samples(file: &Path) -> Vec<Sample> {
    Recording::open(file).unwrap().samples().collect::<Result<_, _>>().unwrap()
}

fn start(world: &TestMount, options: &[&str]) -> Child {
    let mut command = world.command();
    command.args(["record", "web.rec"]).args(options).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn interrupt(child: Child) -> (i32, String) {
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn samples_have_the_figures_of_density_and_follow_the_clones() {
    let _host = host::shared();
    let (world, digest) = world("decode", 16 * MIB);
    let file = world.dir().join("web.rec");
    world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "read=50p,write=20p"]).ok();
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 16 * MIB));
    let one = |pages: u64| -> (Sample, Value) {
        world.stencil(&["record", "web.rec", "--count", "1"]).ok();
        let sample = samples(&file).pop().unwrap();
        assert_eq!(sample.totals.clones, 4, "{pages}");
        (sample, world.json(&["density"]))
    };
    let mut ages = Vec::new();
    for pages in [0, 8, 24, 100] {
        actor.write_pages(0, (0..pages).map(|page| page * 16));
        // Memory of the daemons may change between the two measurements.
        let sample = wait_for("the figures of density", || {
            let (sample, density) = one(pages);
            let ours = json!(sample.totals);
            let same = |(name, value): (&String, &Value)| density["totals"][name] == *value;
            ours.as_object().unwrap().iter().all(same).then_some(())?;
            for (clone, row) in sample.clones.iter().zip(density["clones"].as_array().unwrap()) {
                let mut ours = json!(clone);
                for extra in ["identity", "age_ms"] {
                    ours.as_object_mut().unwrap().remove(extra).unwrap();
                }
                let same = |(name, value): (&String, &Value)| row[name] == *value;
                ours.as_object().unwrap().iter().all(same).then_some(())?;
            }
            Some(sample)
        });
        let clone = sample.clones.iter().find(|clone| clone.pid == actor.pid()).unwrap();
        assert_eq!(clone.private_bytes.get(), pages * PAGE_SIZE);
        ages.push((sample.time, clone.age_ms.unwrap()));
        // 4096 pages in 256 buckets: one page of the actor in each bucket that it has written.
        let places = &sample.templates[0].places[0];
        assert_eq!(
            (places.file.as_str(), places.bucket_pages.get(), places.dirty_pages.len()),
            ("memory", 16, 256)
        );
        let dirty: u64 = sample.clones.iter().map(|clone| clone.dirty_pages.get()).sum();
        assert_eq!(places.dirty_pages.iter().sum::<u64>(), dirty);
        assert_eq!(dirty, 60 + pages);
        assert!(places.dirty_pages[..pages as usize].iter().all(|pages| *pages >= 1), "{places:?}");
        let total = sample.host.get("MemTotal").unwrap();
        assert!(sample.host.get("MemAvailable").unwrap() < total && total > sample.totals.host_bytes);
        assert!(sample.reasons.is_none());
    }
    // The age of a clone grows as the time of the samples does.
    for pair in ages.windows(2) {
        let passed = pair[1].0.since(pair[0].0).as_millis() as i64;
        let older = pair[1].1 as i64 - pair[0].1 as i64;
        assert!((passed - older).abs() < 500, "{passed} ms passed, {older} ms older");
    }
    world.stencil(&["record", "web.rec", "--count", "1", "--why"]).ok();
    assert!(samples(&file).pop().unwrap().reasons.is_some_and(|reasons| !reasons.is_empty()));
    world.stencil(&["working-set", "record", &actor.pid().to_string()]).ok();
    world.stencil(&["record", "web.rec", "--count", "1"]).ok();
    let template = samples(&file).pop().unwrap().templates.pop().unwrap();
    let pages = template.working_set.unwrap().pages.get();
    assert!(pages >= 100);
    assert_eq!(template.places[0].working_set_pages.iter().sum::<u64>(), pages);
}

#[test]
fn a_killed_recorder_loses_at_most_its_last_sample() {
    let _host = host::shared();
    let (world, _) = world("decode", MIB);
    let file = world.dir().join("web.rec");
    world.stencil(&["clone", "web:1", "-n", "2", "--simulate", "read=5p,write=5p"]).ok();
    for round in 0..host::rounds(12, 100) {
        let before = fs::metadata(&file).map_or(0, |meta| meta.len());
        let mut recorder = start(&world, &["--interval", "0.01"]);
        wait_for("samples", || (fs::metadata(&file).ok()?.len() > before + 4000).then_some(()));
        std::thread::sleep(Duration::from_millis(round * 7 % 50));
        let seen = samples(&file);
        recorder.kill().unwrap();
        recorder.wait().unwrap();
        let left = samples(&file);
        assert!(left.len() >= seen.len() && left[..seen.len()] == seen, "{} of {}", left.len(), seen.len());
    }
    // A recording that is thinned out meanwhile keeps its first sample, its order and its size.
    let first = samples(&file).remove(0);
    let max = fs::metadata(&file).unwrap().len();
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&file).unwrap());
    let mut thinned = 0;
    for round in 0..host::rounds(12, 100) {
        let before = inode();
        let mut recorder = start(&world, &["--interval", "0.001", "--max-size", &max.to_string()]);
        std::thread::sleep(Duration::from_millis(100 + round * 7 % 50));
        recorder.kill().unwrap();
        recorder.wait().unwrap();
        thinned += u32::from(inode() != before);
        let left = samples(&file);
        assert_eq!(left[0], first);
        assert!(left.is_sorted_by(|a, b| a.time <= b.time));
        assert!(fs::metadata(&file).unwrap().len() <= max);
    }
    // A thinned file has a new inode.
    assert!(thinned > 0);
    world.stencil(&["record", "web.rec", "--count", "1", "--max-size", &max.to_string()]).ok();
    assert!(!world.dir().join(".web.rec.thinned").exists());
}

#[test]
fn a_recorder_ends_by_count_time_and_signal() {
    let _host = host::shared();
    let (world, _) = world("decode", MIB);
    let file = world.dir().join("web.rec");
    let recorded = world.json(&["record", "web.rec", "--interval", "0.05", "--count", "3"]);
    assert_eq!(
        (&recorded["samples"], &recorded["failed"], &recorded["clones"]),
        (&json!(3), &json!(0), &json!(0))
    );
    assert_eq!(recorded["file_bytes"], fs::metadata(&file).unwrap().len());
    let found = samples(&file);
    assert!(found[1].time.since(found[0].time) >= Duration::from_millis(40));
    world.stencil(&["record", "web.rec", "--interval", "3600", "--for", "0"]).ok();
    assert_eq!(samples(&file).len(), 4);

    let recorder = start(&world, &["--interval", "3600"]);
    wait_for("a sample", || (samples(&file).len() == 5).then_some(()));
    let second = world.stencil(&["record", "web.rec", "--count", "1"]).exits(5);
    assert!(second.err.contains(&recorder.id().to_string()), "{}", second.err);
    let (code, out) = interrupt(recorder);
    assert!(code == 0 && out.contains("recorded 1 sample"), "{code}: {out}");
    assert_eq!(samples(&file).len(), 5);

    world.stencil(&["record", "web.rec", "--interval", "0"]).exits(2).says("longer than 0");
    fs::write(world.dir().join("text"), "a\nb\n").unwrap();
    world.stencil(&["record", "text", "--count", "1"]).exits(2).says("not a recording");
    let small =
        world.stencil(&["record", "small.rec", "--count", "3", "--interval", "0.01", "--max-size", "1k"]);
    small.exits(2).says("larger --max-size");
}
