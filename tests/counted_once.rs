//! What exists once is counted once: address spaces, templates, stores, and the memory that was free before a launch.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;

const PAGE: u64 = 4096;
const SIZE: u64 = 4 << 20;

pub fn world() -> (TestMount, String) {
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE as usize), "web:1");
    (world, digest)
}

/// A process that has written these pages of the template.
pub fn writer(world: &TestMount, digest: &str, pages: u64) -> Actor {
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {SIZE} rw", world.file(digest, "memory").display()));
    actor.write_pages(0, 0..pages);
    actor
}

pub fn audited(world: &TestMount) -> Value {
    let density = world.json(&["density", "--audit"]);
    let frames = &density["audit"]["frames"];
    assert_eq!(frames["verdict"], "ok", "{frames:#}");
    assert_eq!(frames["address_spaces"], density["totals"]["clones"], "{frames:#}");
    density
}

#[test]
fn processes_with_one_address_space_are_one_clone() {
    let _host = host::shared();
    let (world, digest) = world();
    let (mut parent, mut waiting) = (writer(&world, &digest, 100), writer(&world, &digest, 10));
    let before = audited(&world);
    let figures = |density: &Value| {
        let totals = &density["totals"];
        ["clones", "mapped_bytes", "private_bytes", "page_table_bytes"].map(|field| totals[field].clone())
    };
    assert_eq!(figures(&before)[..3], [json!(2), json!(2 * SIZE), json!(110 * PAGE)]);

    // One is made by clone(CLONE_VM), the other one by vfork.
    let children = [parent.tell("share"), waiting.tell("vfork")];
    let density = audited(&world);
    assert_eq!(density["totals"]["clones"], 2, "{:#}", density["totals"]);
    assert_eq!(figures(&density)[..3], figures(&before)[..3]);
    let pids = [(u64::from(parent.pid()), children[0]), (u64::from(waiting.pid()), children[1])];
    for (pid, child) in pids {
        let rows: Vec<&Value> = density["clones"].as_array().unwrap().iter().collect();
        let row = rows.iter().find(|row| row["pid"] == pid).unwrap_or_else(|| panic!("{rows:#?}"));
        assert_eq!(row["pids"], json!([pid, child]));
    }
    assert_eq!(density["templates"][0]["clones"], 2);
    assert_eq!(world.status()["templates"][0]["clones"], 2);
    assert_eq!(world.json(&["ps"])["clones"].as_array().unwrap().len(), 2);
    // Who removes the template must know of all of them.
    let refused = world.stencil(&["rm", "web:1"]).exits(5);
    assert!(children.iter().all(|pid| refused.err.contains(&pid.to_string())), "{refused:?}");

    // A fork has an address space of its own, though all of its mappings are alike.
    parent.tell("fork 0 3 200");
    let density = audited(&world);
    assert_eq!(figures(&density)[..3], [json!(3), json!(3 * SIZE), json!(112 * PAGE)]);
}

/// One template by two mounts: each has page cache of its own, and only one has a backing.
#[test]
fn two_mounts_of_a_store_are_audited() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mut bytes = vec![0; SIZE as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let digest = world.import_bytes(&bytes, "web:1");
    let (link, second) = (world.dir().join("linked"), world.dir().join("second"));
    std::fs::create_dir_all(&link).unwrap();
    std::fs::create_dir_all(&second).unwrap();
    let run = |program: &str, words: &[&std::path::Path], more: &[&str]| {
        let status = Command::new(program).args(more).args(words).status().unwrap();
        assert!(status.success(), "{program} {words:?}");
    };
    // The same store, by another path.
    run("mount", &[&world.store_dir(), &link], &["--bind"]);
    let _bound = Unmounts(&link);
    let mounted = world
        .command()
        .env("STENCIL_STORE", &link)
        .args(["mount", "--serve", "passthrough"])
        .arg(&second)
        .status();
    assert!(mounted.unwrap().success());
    let unmounts = UnmountsStencil(&world, &second);

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
    assert_eq!(frames["template_bytes"], 2 * SIZE, "each has its own: {frames:#}");
    assert_eq!(frames["private_bytes"], 50 * PAGE);
    let templates = density["templates"].as_array().unwrap();
    assert_eq!(templates.len(), 1, "{templates:#?}");
    assert_eq!((&templates[0]["serving"], &templates[0]["clones"]), (&json!("both"), &json!(2)));

    // The store's files are the same ones by both paths: their page cache counts once.
    let daemons: u64 = pids_of(&world.json(&["status"])).iter().map(|pid| rss_of(*pid)).sum();
    let cached = density["totals"]["store_cache_bytes"].as_u64().unwrap();
    let of_template = templates[0]["store_cache_bytes"].as_u64().unwrap();
    assert!(of_template > SIZE / 4, "they were read: {of_template}");
    assert!(cached < daemons + of_template * 3 / 2, "{cached}: {of_template} and {daemons} of processes");
    drop((first, other));
    drop(unmounts);
}

struct Unmounts<'a>(&'a std::path::Path);

impl Drop for Unmounts<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

struct UnmountsStencil<'a>(&'a TestMount, &'a std::path::Path);

impl Drop for UnmountsStencil<'_> {
    fn drop(&mut self) {
        let _ = self.0.command().arg("umount").arg(self.1).status();
    }
}

fn pids_of(status: &Value) -> Vec<u64> {
    let mounts = status["mounts"].as_array().unwrap().iter();
    mounts.flat_map(|m| [m["supervisor_pid"].as_u64().unwrap(), m["server_pid"].as_u64().unwrap()]).collect()
}

/// Anonymous memory and page tables of a process.
fn rss_of(pid: u64) -> u64 {
    let status = stencilfs::sys::process::procfs::status(pid as u32).unwrap().unwrap();
    (status.rss_anon + status.page_tables).get()
}

#[test]
fn a_template_is_one_row_with_all_its_tags() {
    let _host = host::shared();
    let (world, digest) = world();
    let rows = || world.json(&["density"])["templates"].clone();
    assert_eq!((rows().as_array().unwrap().len(), &rows()[0]["tags"]), (1, &json!(["web:1"])));
    world.stencil(&["tag", "web:1", "acme:v1"]).ok();
    world.stencil(&["tag", "web:1", "web:prod"]).ok();
    assert_eq!((rows().as_array().unwrap().len(), &rows()[0]["digest"]), (1, &json!(digest)));
    assert_eq!(rows()[0]["tags"], json!(["acme:v1", "web:1", "web:prod"]));
    let text = world.stencil(&["density"]).ok().out;
    assert!(text.lines().any(|line| line.ends_with("acme:v1, web:1, web:prod")), "{text}");
}
