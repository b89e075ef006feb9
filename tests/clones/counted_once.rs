//! `stencil density` counts shared resources once: address spaces, templates, and the page cache of a store.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;

const PAGE: u64 = 4096;
pub const SIZE: u64 = 4 << 20;

/// Mounts a store with one template. Returns the mount and the digest of the template.
pub fn world() -> (TestMount, String) {
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE as usize), "web:1");
    (world, digest)
}

/// Starts a process that maps the template and writes its first pages.
pub fn writer(world: &TestMount, digest: &str, pages: u64) -> Actor {
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {SIZE} rw", world.file(digest, "memory").display()));
    actor.write_pages(0, 0..pages);
    actor
}

/// Returns `stencil density --audit` as JSON, and asserts that its count of page frames agrees.
pub fn audited(world: &TestMount) -> Value {
    let density = world.json(&["density", "--audit"]);
    let frames = &density["audit"]["frames"];
    assert_eq!(frames["verdict"], "ok", "{frames:#}");
    assert_eq!(frames["address_spaces"], density["totals"]["clones"], "{frames:#}");
    density
}

#[test]
fn processes_that_share_an_address_space_are_one_clone() {
    let _host = host::shared();
    let (world, digest) = world();
    let (mut parent, mut vforking) = (writer(&world, &digest, 100), writer(&world, &digest, 10));
    let before = audited(&world);
    let figures = |density: &Value| {
        let totals = &density["totals"];
        ["clones", "mapped_bytes", "private_bytes", "page_table_bytes"].map(|field| totals[field].clone())
    };
    assert_eq!(figures(&before)[..3], [json!(2), json!(2 * SIZE), json!(110 * PAGE)]);

    // One child is created by clone(CLONE_VM), the other one by vfork.
    let children = [parent.tell("share"), vforking.tell("vfork")];
    let density = audited(&world);
    assert_eq!(density["totals"]["clones"], 2, "{:#}", density["totals"]);
    assert_eq!(figures(&density)[..3], figures(&before)[..3]);
    let pids = [(u64::from(parent.pid()), children[0]), (u64::from(vforking.pid()), children[1])];
    for (pid, child) in pids {
        let rows: Vec<&Value> = density["clones"].as_array().unwrap().iter().collect();
        let row = rows.iter().find(|row| row["pid"] == pid).unwrap_or_else(|| panic!("{rows:#?}"));
        assert_eq!(row["pids"], json!([pid, child]));
    }
    assert_eq!(density["templates"][0]["clones"], 2);
    assert_eq!(world.status()["templates"][0]["clones"], 2);
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 2);
    // The error of `stencil rm` names every process.
    let refused = world.stencil(&["rm", "web:1"]).exits(5);
    assert!(children.iter().all(|pid| refused.err.contains(&pid.to_string())), "{refused:?}");

    // A forked child has a separate address space, although its mappings are the same.
    parent.tell("fork 0 3 200");
    let density = audited(&world);
    assert_eq!(figures(&density)[..3], [json!(3), json!(3 * SIZE), json!(112 * PAGE)]);

    // The frames are still shared if the mapping of one of both begins later. The child keeps its copy of the page.
    parent.tell("replace 0 0 1");
    assert_eq!(audited(&world)["totals"]["private_bytes"], 112 * PAGE);
}

#[test]
fn audit_accounts_for_two_mounts_of_one_store() {
    let _host = host::shared();
    for serve in [["decode", "passthrough"], ["decode", "decode"], ["passthrough", "passthrough"]] {
        two_mounts_of_one_store(serve);
    }
}

/// Two mounts serve one template: each has its own page cache.
fn two_mounts_of_one_store(serve: [&str; 2]) {
    let world = TestMount::new(serve[0]);
    let mut bytes = vec![0; SIZE as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let digest = world.import_bytes(&bytes, "web:1");
    let (link, second) = (world.dir().join("linked"), world.dir().join("second"));
    std::fs::create_dir_all(&link).unwrap();
    std::fs::create_dir_all(&second).unwrap();
    let run = |program: &str, paths: &[&std::path::Path], options: &[&str]| {
        let status = Command::new(program).args(options).args(paths).status().unwrap();
        assert!(status.success(), "{program} {paths:?}");
    };
    // The same store by another path.
    run("mount", &[&world.store_dir(), &link], &["--bind"]);
    let _bind_mount = UnmountOnDrop(&link);
    let mounted = world
        .command()
        .env("STENCIL_STORE", &link)
        .args(["mount", "--serve", serve[1]])
        .arg(&second)
        .status();
    assert!(mounted.unwrap().success());
    let second_mount = StencilUmountOnDrop(&world, &second);

    for entry in std::fs::read_dir(world.store_dir().join("packs")).unwrap() {
        std::fs::read(entry.unwrap().path()).unwrap();
    }
    let mut first = writer(&world, &digest, 20);
    first.read_pages(0, 0..SIZE / PAGE);
    let mut other = Actor::start();
    let file = second.join("by-id").join(&digest).join("memory");
    other.tell(&format!("map 0 {} 0 {SIZE} rw", file.display()));
    other.read_pages(0, 0..SIZE / PAGE);
    other.write_pages(0, 0..30);
    let density = audited(&world);
    let frames = &density["audit"]["frames"];
    assert_eq!(frames["template_bytes"], 2 * SIZE, "each mount has its own page cache: {frames:#}");
    assert_eq!(frames["private_bytes"], 50 * PAGE);
    let templates = density["templates"].as_array().unwrap();
    assert_eq!(templates.len(), 1, "{templates:#?}");
    let serving = if serve[0] == serve[1] { serve[0] } else { "both" };
    assert_eq!((&templates[0]["serving"], &templates[0]["clones"]), (&json!(serving), &json!(2)));
    let resident = &templates[0]["resident_bytes"];
    assert_eq!((resident, &density["totals"]["template_bytes"]), (&json!(2 * SIZE), resident));
    // Without --audit, the mounts of the store are the same, whichever of its paths is named.
    for store in [world.store_dir(), link.clone()] {
        let totals = &world.json(&["--store", store.to_str().unwrap(), "density"])["totals"];
        assert_eq!([&totals["template_bytes"], &totals["clones"]], [resident, &json!(2)], "{serve:?}");
    }

    // Both paths lead to the same files of the store: their page cache counts once.
    let daemons: u64 =
        pids_of(&world.json(&["status"])).iter().map(|pid| anon_and_page_tables_of(*pid)).sum();
    let cached = density["totals"]["store_cache_bytes"].as_u64().unwrap();
    let store_cache = templates[0]["store_cache_bytes"].as_u64().unwrap();
    assert!(store_cache > SIZE / 4, "{store_cache} bytes of the packs are cached");
    assert!(
        cached < daemons + store_cache * 3 / 2,
        "total {cached}, template {store_cache}, daemons {daemons}"
    );
    drop((first, other));
    drop(second_mount);
}

struct UnmountOnDrop<'a>(&'a std::path::Path);

impl Drop for UnmountOnDrop<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

struct StencilUmountOnDrop<'a>(&'a TestMount, &'a std::path::Path);

impl Drop for StencilUmountOnDrop<'_> {
    fn drop(&mut self) {
        let _ = self.0.command().arg("umount").arg(self.1).status();
    }
}

fn pids_of(status: &Value) -> Vec<u64> {
    let mounts = status["mounts"].as_array().unwrap().iter();
    mounts.flat_map(|m| [m["supervisor_pid"].as_u64().unwrap(), m["server_pid"].as_u64().unwrap()]).collect()
}

/// Returns the anonymous memory and the page tables of a process, in bytes.
fn anon_and_page_tables_of(pid: u64) -> u64 {
    let status = stencilfs::sys::process::procfs::status(pid as u32).unwrap().unwrap();
    (status.rss_anon + status.page_tables).get()
}

#[test]
fn density_shows_a_template_once_with_all_its_tags() {
    let _host = host::shared();
    let (world, digest) = world();
    let rows = || world.json(&["density"])["templates"].clone();
    assert_eq!((rows().as_array().unwrap().len(), &rows()[0]["tags"]), (1, &json!(["web:1"])));
    world.stencil(&["tag", "web:1", "acme:v1"]).ok();
    world.stencil(&["tag", "web:1", "web:prod"]).ok();
    assert_eq!((rows().as_array().unwrap().len(), &rows()[0]["digest"]), (1, &json!(digest)));
    assert_eq!(rows()[0]["tags"], json!(["acme:v1", "web:1", "web:prod"]));
    let text = world.stencil(&["density", "--wide"]).ok().out;
    assert!(text.lines().any(|line| line.ends_with("acme:v1, web:1, web:prod")), "{text}");
}
