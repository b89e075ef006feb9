//! `stencil dirty` and `stencil density` report exactly the pages that a process has copied, for decode and
//! passthrough, checked against scripts of which every copied page is known.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::actor::{Actor, program};
use crate::support::host;
use crate::support::mount::{TestMount, copy_program};

pub const PAGE: u64 = 4096;
pub const SIZE: u64 = 64 << 20;
const SERVINGS: [&str; 2] = ["decode", "passthrough"];

/// A mount with one template of 64 MiB, its first half data, its second half zero.
pub fn world(serve: &str) -> (TestMount, String) {
    world_with(&["--serve", serve])
}

/// The same, with these options of the mount.
pub fn world_with(options: &[&str]) -> (TestMount, String) {
    let world = TestMount::with(options);
    // Actors of other users must be able to traverse this directory.
    fs::set_permissions(world.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let source = world.dir().join("source");
    let mut bytes = vec![0u8; SIZE as usize];
    for (index, page) in bytes[..SIZE as usize / 2].chunks_exact_mut(PAGE as usize).enumerate() {
        page[..8].copy_from_slice(&(index as u64 + 1).to_le_bytes());
        page[2048] = 7;
    }
    fs::write(&source, bytes).unwrap();
    let digest = world.import(&source, "web:1");
    (world, digest)
}

/// Dirty pages that `stencil dirty --ranges` reports for a process, as page numbers in the file: present, swapped.
pub fn dirty(world: &TestMount, pid: u32) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let report = world.json(&["dirty", &pid.to_string(), "--ranges"]);
    let mut sets = (BTreeSet::new(), BTreeSet::new());
    for range in report["ranges"].as_array().unwrap() {
        let (first, pages) = (range["first_page"].as_u64().unwrap(), range["pages"].as_u64().unwrap());
        let set = if range["swapped"] == true { &mut sets.1 } else { &mut sets.0 };
        set.extend(first..first + pages);
    }
    let count = (sets.0.len() + sets.1.len()) as u64;
    assert_eq!(report["dirty_pages"].as_u64().unwrap(), count, "{report}");
    sets
}

/// The row of a process in `stencil density`.
pub fn row(world: &TestMount, pid: u32) -> Value {
    let density = world.json(&["density"]);
    let clones = density["clones"].as_array().unwrap();
    clones.iter().find(|c| c["pid"] == pid).unwrap_or_else(|| panic!("no {pid} in {density:#}")).clone()
}

pub fn private_pages(row: &Value) -> u64 {
    row["private_bytes"].as_u64().unwrap() / PAGE
}

pub fn total(world: &TestMount, field: &str) -> u64 {
    world.json(&["density"])["totals"][field].as_u64().unwrap()
}

/// Returns `count` different pages, spread over the whole file by a fixed rule.
fn scattered(count: u64, seed: u64) -> BTreeSet<u64> {
    let pages = SIZE / PAGE;
    (0..count).map(|i| (i * 2_654_435_761 + seed * 97) % pages).collect()
}

pub fn for_both(scenario: impl Fn(&TestMount, &str, &Path)) {
    for serve in SERVINGS {
        let (world, digest) = world(serve);
        let memory = world.file(&digest, "memory");
        scenario(&world, &digest, &memory);
    }
}

pub fn map(actor: &mut Actor, memory: &Path) {
    actor.tell(&format!("map 0 {} 0 {SIZE} rw", memory.display()));
}

#[test]
fn writes_dirty_exactly_their_pages_and_reads_none() {
    let _host = host::shared();
    for_both(|world, digest, memory| {
        let mut actor = Actor::start();
        map(&mut actor, memory);
        assert_eq!(dirty(world, actor.pid()), Default::default(), "mapping a file copies no page");
        let pages = scattered(1000, 1);
        for (n, &page) in pages.iter().enumerate() {
            actor.tell(&format!("read 0 {}", (page + 31) % (SIZE / PAGE)));
            actor.tell(&format!("write 0 {page}"));
            if n % 3 == 0 {
                actor.tell(&format!("read 0 {page}"));
            }
        }
        // Writing the byte that the page already has copies the page too: page 5 has a 7 there.
        actor.tell("write 0 5 7");
        let expected: BTreeSet<u64> = pages.iter().copied().chain([5]).collect();
        assert_eq!(dirty(world, actor.pid()), (expected.clone(), BTreeSet::new()));
        let row = row(world, actor.pid());
        assert_eq!(private_pages(&row), expected.len() as u64);
        assert_eq!(row["kind"], "other");
        assert_eq!(row["digest"], digest);
        assert_eq!(row["mapped_bytes"], SIZE);
        assert_eq!(total(world, "private_bytes"), expected.len() as u64 * PAGE);
    });
}

#[test]
fn unmapped_and_guarded_pages_of_offset_mappings_are_clean() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        let path = memory.display();
        actor.tell(&format!("map 0 {path} 0 {} rw", 8 << 20));
        actor.tell(&format!("map 1 {path} {} {} rw", 4 << 20, 8 << 20));
        actor.tell(&format!("map 2 {path} {} {} ro", 32 << 20, 4 << 20));
        actor.tell(&format!("shared 3 {path} 0 {}", 2 << 20));
        actor.write_pages(0, [0, 1, 2, 100, 2047]);
        // Pages 4, 5 and 1024.. of the second mapping are pages 1028, 1029 and 2048.. of the file.
        actor.write_pages(1, [4, 5, 1024, 1025, 1026]);
        actor.read_pages(2, 0..50);
        actor.read_pages(3, 0..50);
        let all = BTreeSet::from([0, 1, 2, 100, 2047, 1028, 1029, 2048, 2049, 2050]);
        assert_eq!(dirty(world, actor.pid()).0, all);
        // Unmapping a page in the middle discards its copy and splits the mapping in two.
        actor.tell("unmap 1 1025 1");
        // A guard region (MADV_GUARD_INSTALL) discards the copies in its range and is not a copy itself.
        actor.tell("guard 0 1 64");
        let left = BTreeSet::from([0, 100, 2047, 1028, 1029, 2048, 2050]);
        assert_eq!(dirty(world, actor.pid()), (left, BTreeSet::new()));
        let row = row(world, actor.pid());
        assert_eq!(row["maps"].as_array().unwrap().len(), 5);
        assert_eq!(
            row["mapped_bytes"].as_u64().unwrap(),
            (8 << 20) + (8 << 20) - PAGE + (4 << 20) + (2 << 20)
        );
        assert_eq!(private_pages(&row), 7);
    });
}

#[test]
fn a_page_copied_by_two_mappings_counts_twice() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        let path = memory.display();
        actor.tell(&format!("map 0 {path} 0 {} rw", 1 << 20));
        actor.tell(&format!("map 1 {path} 0 {} rw", 1 << 20));
        actor.write_pages(0, [7, 8]);
        actor.write_pages(1, [8, 9]);
        assert_eq!(private_pages(&row(world, actor.pid())), 4);
        assert_eq!(total(world, "private_bytes"), 4 * PAGE);
    });
}

#[test]
fn pages_that_forked_processes_still_share_count_once() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut parent = Actor::start();
        map(&mut parent, memory);
        parent.write_pages(0, 0..1000);
        // The child writes 50 of its parent's pages and 20 new ones.
        let list: Vec<String> = (0..50).chain(5000..5020).map(|p: u64| p.to_string()).collect();
        let child = parent.tell(&format!("fork 0 {}", list.join(" "))) as u32;
        // The parent writes 30 of the shared pages again, which copies them for the parent.
        parent.write_pages(0, 100..130);
        assert_eq!(private_pages(&row(world, parent.pid())), 1000);
        assert_eq!(private_pages(&row(world, child)), 1020);
        assert_eq!(total(world, "private_bytes"), (1000 + 50 + 20 + 30) * PAGE);
        assert_eq!(total(world, "clones"), 2);
    });
}

#[test]
fn clones_of_other_users_chroots_and_namespaces_are_counted() {
    let _host = host::shared();
    for_both(|world, digest, memory| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(program());
        let mut user = Actor::through(setpriv);
        map(&mut user, memory);
        user.write_pages(0, 0..11);
        let user_row = row(world, user.pid());
        assert_eq!((private_pages(&user_row), user_row["uid"].as_u64()), (11, Some(12345)));

        // A chroot with the actor and one bind-mounted template, in separate mount and PID namespaces.
        let jail = world.dir().join("jail");
        fs::create_dir_all(jail.join("template")).unwrap();
        copy_program(program(), jail.join("actor"));
        let by_id = world.mountpoint().join("by-id").join(digest);
        let script = "mount --bind \"$1\" \"$2/template\" && exec chroot \"$2\" /actor";
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"]);
        let mut jailed = Actor::through({
            unshare.arg(&by_id).arg(&jail);
            unshare
        });
        jailed.tell(&format!("map 0 /template/memory 0 {SIZE} rw"));
        jailed.write_pages(0, 20..33);
        let jailed_row = row(world, jailed.pid());
        assert_eq!(private_pages(&jailed_row), 13);
        assert_eq!(jailed_row["digest"], digest);
        assert_eq!(dirty(world, jailed.pid()).0, (20..33).collect());
        assert_eq!(total(world, "private_bytes"), 24 * PAGE);
    });
}

#[test]
fn moving_or_removing_a_tag_keeps_dirty_counts_of_its_clones() {
    let _host = host::shared();
    for_both(|world, digest, _| {
        let through_tag = world.mountpoint().join("templates/web/1/memory");
        let mut actor = Actor::start();
        map(&mut actor, &through_tag);
        actor.write_pages(0, 40..60);
        let other = world.dir().join("other");
        fs::write(&other, vec![9u8; 1 << 20]).unwrap();
        let moved = world.import(&other, "web:1");
        assert_ne!(&moved, digest);
        assert_eq!(dirty(world, actor.pid()).0, (40..60).collect());
        world.stencil(&["tag", &format!("web@blake3:{moved}"), "gone:1"]).ok();
        world.stencil(&["rm", "gone:1"]).ok();
        world.stencil(&["rm", "web:1"]).ok();
        let row = row(world, actor.pid());
        assert_eq!((private_pages(&row), row["digest"].as_str().unwrap()), (20, digest));
        // A write after these changes is counted too.
        actor.tell("write 0 61");
        assert_eq!(dirty(world, actor.pid()).0.len(), 21);
    });
}

#[test]
fn bitmap_has_one_bit_per_copied_page() {
    let _host = host::shared();
    for_both(|world, _, memory| {
        let mut actor = Actor::start();
        map(&mut actor, memory);
        let pages = scattered(300, 9);
        actor.write_pages(0, pages.iter().copied());
        let out = world.dir().join("bitmap");
        world.stencil(&["dirty", &actor.pid().to_string(), "--bitmap", out.to_str().unwrap()]).ok();
        let bits = fs::read(&out).unwrap();
        assert_eq!(bits.len() as u64, SIZE / PAGE / 8);
        let set: BTreeSet<u64> =
            (0..SIZE / PAGE).filter(|p| bits[(p / 8) as usize] >> (p % 8) & 1 == 1).collect();
        assert_eq!(set, pages);
    });
}
