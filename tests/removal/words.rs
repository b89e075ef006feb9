//! Arguments and output of `rm`: an unknown name is an error before anything is removed, and each removal is reported.

use std::fs::{self, File};

use serde_json::Value;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::{Fixture, random};

#[test]
fn rm_checks_all_names_before_it_removes_anything() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, 4096));
    for args in [["rm", "a", "nobody"], ["rm", "nobody", "a"]] {
        let refused = fixture.run(&args);
        assert_eq!((refused.code, refused.stdout.as_str()), (4, ""), "{refused:?}");
        assert!(refused.stderr.contains("nobody"), "{refused:?}");
    }
    let refused = fixture.run(&["--json", "rm", "a", "deadbeef"]);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.json().get("removed").is_none(), "{refused:?}");
    fixture.run(&["inspect", "a"]).ok();
    // A damaged tag can be removed, together with others.
    fixture.import("b", &random(2, 4096));
    fs::write(fixture.path("store/tags/b/latest"), "x").unwrap();
    let removed = fixture.run(&["rm", "b", "a"]).ok();
    assert!(removed.stdout.contains("removed b:latest\nremoved a:latest\nremoved template "), "{removed:?}");
}

#[test]
fn rm_reports_what_it_removed_before_an_error() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let names = ["a", "b", "used", "c"];
    let digests: Vec<String> =
        (0..4).map(|i| world.import_bytes(&random(i, 4096), names[i as usize])).collect();
    let _open = File::open(world.file(&digests[2], "memory")).unwrap();
    let refused = world.stencil(&["rm", "a", "used", "c"]).exits(5).says("in use");
    assert_eq!(refused.out, format!("removed a:latest\nremoved template {}\n", digests[0]));
    let refused = world.stencil(&["--json", "rm", "b", "used", "c"]).exits(5);
    let report: Value = serde_json::from_str(&refused.out).unwrap();
    assert_eq!(report["removed"].as_array().unwrap().len(), 1, "{report:#}");
    assert_eq!(report["removed"][0]["digest"], digests[1].as_str(), "{report:#}");
    assert_eq!((&report["schema"], &report["error"]["code"]), (&1.into(), &"in-use".into()), "{report:#}");
    assert!(report["error"]["remedy"].as_str().is_some_and(|r| !r.is_empty()), "{report:#}");
    let left: Vec<Value> = world.json(&["ls"])["templates"].as_array().unwrap().clone();
    assert_eq!(left.len(), 2, "{left:#?}");
}
