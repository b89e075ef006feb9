//! Every command that shows memory shows the same bytes of the same stopped clones.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::clones::accounting::{MIB, StoppedClones, number, world};
use crate::clones::density::{PARTS, Parts, sum};
use crate::support::actor::Actor;
use crate::support::exporter::{Exporter, Samples};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// Longest time until nothing else on the host changes the figures during a measurement.
const AGREEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Stopped clones of two templates. Two of them share copies by a fork.
struct Herd {
    world: TestMount,
    exporter: Exporter,
    _stopped: StoppedClones,
    _parent: Actor,
}

/// A command that shows the memory of the host, and the parts that it shows.
type Source = (&'static str, fn(&Herd) -> Parts);

const SOURCES: [Source; 10] = [
    ("density", |herd| sum([&herd.world.json(&["density"])["totals"]])),
    ("density --by template", |herd| by(herd, "template")),
    ("density --by user", |herd| by(herd, "user")),
    ("density --by cgroup", |herd| by(herd, "cgroup")),
    ("density --by label", |herd| by(herd, "label=team")),
    ("top", |herd| sum([&herd.world.json(&["top", "--once"])["totals"]])),
    ("report", report),
    ("exporter", exporter),
    ("audit by page frames", |herd| audit(herd, "_bytes")),
    ("audit, accounted", |herd| audit(herd, "_accounted")),
];

fn by(herd: &Herd, property: &str) -> Parts {
    sum(herd.world.json(&["density", "--by", property])["groups"].as_array().unwrap())
}

fn exporter(herd: &Herd) -> Parts {
    let collected = |all: &Samples| all["stencil_exporter_collections_total{collector=\"clones\"}"];
    let earlier = collected(&herd.exporter.samples());
    let samples = wait_for("another collection", || {
        Some(herd.exporter.samples())
            .filter(|all| collected(all) > earlier && all.contains_key("stencil_clones"))
    });
    let metric = |part: &str| format!("stencil_memory_bytes{{part=\"{}\"}}", part.trim_end_matches("_bytes"));
    PARTS.into_iter().map(|part| (part, samples[&metric(part)] as u64)).collect()
}

/// The page about a recording with one further sample.
fn report(herd: &Herd) -> Parts {
    herd.world.json(&["record", "all.rec", "--count", "1"]);
    sum([&herd.world.json(&["report", "all.rec"])["totals"]])
}

/// The audit counts the frames of four parts.
fn audit(herd: &Herd, suffix: &str) -> Parts {
    let density = herd.world.json(&["density", "--audit"]);
    let frames = &density["audit"]["frames"];
    let field = |part: &str| format!("{}{suffix}", part.trim_end_matches("_bytes"));
    let counted = |part: &&str| !["store_cache_bytes", "disk_bytes"].contains(part);
    PARTS.into_iter().filter(counted).map(|part| (part, number(frames, &field(part)))).collect()
}

/// Returns the first difference between the first source and another one.
fn difference(all: &[(&str, Parts)]) -> Option<String> {
    let first = &all[0].1;
    let mut parts =
        all.iter().flat_map(|(name, parts)| parts.iter().map(move |(part, bytes)| (name, part, bytes)));
    let (name, part, bytes) = parts.find(|(_, part, bytes)| first[*part] != **bytes)?;
    Some(format!("{name}: {part} is {bytes}, not {}", first[part]))
}

#[test]
fn every_view_of_stopped_clones_shows_the_same_bytes() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let (world, digest) = world(serve, 16 * MIB);
        world.import_bytes(&[9; 1 << 20], "db:1");
        for (tag, label) in [("web:1", "team=shop"), ("web:1", "team=ads"), ("db:1", "team=ads")] {
            let simulate = "read=150p,write=60p";
            world.stencil(&["clone", tag, "-n", "7", "--label", label, "--simulate", simulate]).ok();
        }
        let mut parent = Actor::start();
        parent.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 16 * MIB));
        parent.write_pages(0, 0..501);
        parent.tell("fork 0 3000 3001");
        let exporter = Exporter::start(&world, &["--max-age", "0"]);
        let stopped = StoppedClones::of(&world.json(&["ps"]));
        let herd = Herd { world, exporter, _stopped: stopped, _parent: parent };
        // The page cache of the store and the memory of its daemons may change meanwhile.
        let until = Instant::now() + AGREEMENT_TIMEOUT;
        let density = loop {
            let all: Vec<(&str, Parts)> = SOURCES.iter().map(|(name, show)| (*name, show(&herd))).collect();
            assert!(all.iter().all(|(_, parts)| parts.len() >= 4), "{all:#?}");
            match difference(&all) {
                None => break all[0].1.clone(),
                Some(difference) => assert!(Instant::now() < until, "{difference}\n{all:#?}"),
            }
        };
        println!("{density:#?}");
        assert!(density["private_bytes"] > 21 * 60 * 4096 && density["template_bytes"] > MIB, "{density:?}");
        let totals: Value = herd.world.json(&["density"])["totals"].clone();
        assert_eq!(number(&totals, "clones"), 23, "{totals:#}");
    }
}
