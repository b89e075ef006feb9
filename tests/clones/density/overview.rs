//! The default view of `stencil density`: three answers, in 30 lines of 100 columns at most.

use serde_json::Value;
use stencilfs::units::Bytes;

use crate::clones::accounting::{PAGE, StoppedClones, number};
use crate::support::host;
use crate::support::mount::TestMount;

const TEMPLATES: u64 = 20;
const CLONES: u64 = 1000;

/// Returns the line that begins with these words.
fn line<'a>(text: &'a str, words: &str) -> &'a str {
    let found = text.lines().find(|line| line.trim_start().starts_with(words));
    found.unwrap_or_else(|| panic!("no '{words}' in {text}"))
}

#[test]
fn the_default_view_of_1000_clones_of_20_templates_has_30_lines() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let (each, total) = ((CLONES / TEMPLATES).to_string(), CLONES as usize);
    for number in 0..TEMPLATES {
        let tag = format!("{}-{number}:1", "long".repeat(20));
        // Each template has zero pages behind its data, which a reader brings into the page cache.
        let bytes = [vec![number as u8 + 1; 32 << 10], vec![0; 32 << 10]].concat();
        let digest = world.import_bytes(&bytes, &tag);
        std::fs::read(world.file(&digest, "memory")).unwrap();
        world.stencil(&["-q", "clone", &tag, "-n", &each, "--simulate", "read=2p,write=3p"]).ok();
    }
    let stopped = StoppedClones::of(&world.json(&["ps"]));
    let density = world.json(&["density"]);
    let text = world.stencil(&["density"]).ok().out;
    println!("{text}");
    assert!(text.lines().count() <= 30, "{} lines", text.lines().count());
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");

    // What do these clones cost now?
    let totals = &density["totals"];
    let bytes = |value: &Value| Bytes::new(value.as_u64().unwrap()).to_string();
    assert_eq!(density["clones"].as_array().unwrap().len(), total);
    line(&text, "1000 clones of 20 templates take ");
    for (words, field) in [
        ("memory that the templates hold once", "template_bytes"),
        ("copied by clones", "private_bytes"),
        ("page tables", "page_table_bytes"),
        ("virtual machine monitor itself", "overhead_bytes"),
    ] {
        assert!(line(&text, words).ends_with(&bytes(&totals[field])), "{words}: {text}\n{totals:#}");
    }
    assert_eq!(number(totals, "private_bytes"), CLONES * 3 * PAGE);
    // What does one more cost, and how many more fit?
    let further = bytes(&totals["bytes_per_further_clone"]);
    assert!(line(&text, "one more clone takes").contains(&further), "{text}");
    let headroom = &density["headroom"];
    assert!(line(&text, "about ").contains("more fit (estimate;"), "{text}");
    let each = number(totals, "bytes_per_further_clone");
    if headroom["commit_left_bytes"].is_null() {
        assert_eq!(
            number(headroom, "further_clones"),
            number(headroom, "available_bytes") / each,
            "{headroom:#}"
        );
    }
    line(&text, "and 15 other templates");
    // Half of each template is zero and in the page cache.
    let zeros: Vec<u64> = density["templates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|template| number(template, "resident_zero_bytes"))
        .collect();
    assert_eq!(zeros, vec![32 << 10; TEMPLATES as usize]);
    assert!(line(&text, "at least 640 KiB of the templates' pages are zeros").contains("for nothing"));
    line(&text, "remedy: ");

    let wide = world.stencil(&["density", "--wide"]).ok().out;
    assert!(wide.lines().count() > total, "--wide has a line for each clone");
    assert!(wide.lines().all(|line| line.chars().count() <= 100), "{wide}");
    drop(stopped);
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn without_the_record_of_a_mount_the_sums_are_shown_as_incomplete() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let record = std::fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap();
    let record = record.path().join("mount.json");
    let text = std::fs::read(&record).unwrap();
    std::fs::write(&record, &text[..text.len() / 2]).unwrap();
    let run = world.stencil(&["density"]).exits(75).says("cannot read the record of a mount");
    assert!(run.out.starts_with("no clones"), "{run:?}");
    let run = world.stencil(&["--json", "density"]).exits(75);
    let density: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((&density["headroom"], &density["totals"]["clones"]), (&Value::Null, &Value::from(0)));
    std::fs::write(&record, &text).unwrap();
    world.stencil(&["density"]).ok();
}
