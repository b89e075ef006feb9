//! The cost of looking up one tag does not depend on the number of tags in the store.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::random;

const TAGS: usize = 3000;

/// Number of read system calls of the server since its start.
fn reads(world: &TestMount) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/io", world.server())).unwrap();
    text.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap().parse().unwrap()
}

fn names(path: &Path) -> BTreeSet<String> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn listing_one_name_reads_no_tags_of_other_names() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&random(1, 4096), "one:1");
    world.stencil(&["tag", "one:1", "many:0"]).ok();
    let many = world.store_dir().join("tags/many");
    let tag = fs::read(many.join("0")).unwrap();
    (1..TAGS).for_each(|number| fs::write(many.join(number.to_string()), &tag).unwrap());
    // A damaged tag is listed like the others, and does not hide them.
    fs::write(many.join("damaged"), "rubbish").unwrap();
    let templates = world.mountpoint().join("templates");
    let cost = |act: &dyn Fn()| {
        let before = reads(&world);
        act();
        reads(&world) - before
    };
    let few = [
        ("list one", cost(&|| assert_eq!(names(&templates.join("one")), BTreeSet::from(["1".to_owned()])))),
        ("list names", cost(&|| assert_eq!(names(&templates).len(), 2))),
        (
            "read one of many",
            cost(&|| {
                let target = fs::read_link(templates.join("many/17")).unwrap();
                assert!(target.ends_with(&digest));
            }),
        ),
        ("lstat one of many", cost(&|| assert!(fs::symlink_metadata(templates.join("many/18")).is_ok()))),
    ];
    for (operation, reads) in few {
        assert!(reads < 60, "{operation}: {reads} reads");
    }
    let reads = cost(&|| assert_eq!(names(&templates.join("many")).len(), TAGS + 1));
    assert!(reads < TAGS as u64 / 4, "{reads} reads to list {TAGS} tags");
    assert!(fs::read_link(templates.join("many/damaged")).is_err());
}
