//! What a removal says of its words: nothing goes for a name that is mistyped, and what went is told.

use std::fs::{self, File};

use serde_json::Value;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::{Fixture, random};

#[test]
fn a_name_that_is_mistyped_is_found_before_anything_goes() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, 4096));
    for words in [["rm", "a", "nobody"], ["rm", "nobody", "a"]] {
        let refused = fixture.run(&words);
        assert_eq!((refused.code, refused.stdout.as_str()), (4, ""), "{refused:?}");
        assert!(refused.stderr.contains("nobody"), "{refused:?}");
    }
    let refused = fixture.run(&["--json", "rm", "a", "deadbeef"]);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.json().get("removed").is_none(), "{refused:?}");
    fixture.run(&["inspect", "a"]).ok();
    // A tag that is damaged can be removed, beside others.
    fixture.import("b", &random(2, 4096));
    fs::write(fixture.path("store/tags/b/latest"), "x").unwrap();
    let removed = fixture.run(&["rm", "b", "a"]).ok();
    assert!(removed.stdout.contains("removed b:latest\nremoved a:latest\nremoved template "), "{removed:?}");
}

#[test]
fn what_was_removed_before_an_error_is_told() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let names = ["a", "b", "used", "c"];
    let digests: Vec<String> =
        (0..4).map(|i| world.import_bytes(&random(i, 4096), names[i as usize])).collect();
    let _open = File::open(world.file(&digests[2], "memory")).unwrap();
    let refused = world.stencil(&["rm", "a", "used", "c"]).exits(5).says("in use");
    assert_eq!(refused.out, format!("removed a:latest\nremoved template {}\n", digests[0]));
    let refused = world.stencil(&["--json", "rm", "b", "used", "c"]).exits(5);
    let answer: Value = serde_json::from_str(&refused.out).unwrap();
    assert_eq!(answer["removed"].as_array().unwrap().len(), 1, "{answer:#}");
    assert_eq!(answer["removed"][0]["template"], digests[1].as_str(), "{answer:#}");
    assert_eq!((&answer["schema"], &answer["error"]["code"]), (&1.into(), &"in-use".into()), "{answer:#}");
    assert!(answer["error"]["remedy"].as_str().is_some_and(|r| !r.is_empty()), "{answer:#}");
    let left: Vec<Value> = world.json(&["ls"])["templates"].as_array().unwrap().clone();
    assert_eq!(left.len(), 2, "{left:#?}");
}
