//! Reasons from the page cache, beside the kernel's own counters.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use stencilfs::sys::memory::cachestat;

use super::{none, pages, reasons};
use crate::clones::accounting::number;
use crate::clones::dirty_exact::{SIZE, map, world, world_with};
use crate::support::actor::{Actor, program};
use crate::support::host;
use crate::support::mount::wait_for;

/// Opens the file that an actor has mapped at its first mapping of this mount.
fn mapped_file(actor: &Actor, mountpoint: &Path) -> File {
    let maps = fs::read_to_string(format!("/proc/{}/maps", actor.pid())).unwrap();
    let line = maps.lines().find(|line| line.contains(mountpoint.to_str().unwrap())).unwrap();
    let addresses = line.split(' ').next().unwrap();
    File::open(format!("/proc/{}/map_files/{addresses}", actor.pid())).unwrap()
}

#[test]
fn pages_that_two_ways_of_serving_have_cached_are_named() {
    let _host = host::shared();
    let (world, digest) = world_with(&["--serve", "auto", "--hydrate-timeout", "0.001"]);
    let mut by_decode = Actor::start();
    map(&mut by_decode, &world.file(&digest, "memory"));
    by_decode.read_pages(0, 0..500);
    let decode = mapped_file(&by_decode, world.mountpoint());
    wait_for("the promotion", || {
        (world.status()["templates"][0]["files"][0]["hydrated"] == true).then_some(())
    });
    let mut by_passthrough = Actor::start();
    map(&mut by_passthrough, &world.file(&digest, "memory"));
    by_passthrough.read_pages(0, 300..700);
    // The backing was written through the page cache, so it has each page that decode has.
    let cached = cachestat::cached(&decode).unwrap().get();
    assert!(cached >= 500);
    let density = world.json(&["density", "--why"]);
    let row = |actor: &Actor| {
        let rows = density["clones"].as_array().unwrap();
        rows.iter().find(|row| row["pid"] == actor.pid()).unwrap()
    };
    assert_eq!(reasons(&density["templates"][0]), pages(&[("cached-twice", cached)]));
    let clean = number(row(&by_decode), "mapped_clean_bytes");
    assert!(reasons(row(&by_decode)).get("decode") == Some(&clean), "{:#}", row(&by_decode));
    assert_eq!(reasons(row(&by_passthrough)).get("decode"), None);
}

/// A memory cgroup, removed on drop.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Cgroup {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.split_once(":memory:")).map(|(_, path)| path);
        let directory = PathBuf::from(format!(
            "/sys/fs/cgroup{}{}/{name}-{}",
            if own.is_some() { "/memory" } else { "" },
            own.unwrap_or_default(),
            std::process::id()
        ));
        fs::create_dir(&directory).unwrap();
        Cgroup(directory)
    }

    fn actor(&self) -> Actor {
        let mut command = Command::new("sh");
        let script = format!("echo $$ >{}/cgroup.procs && exec {}", self.0.display(), program().display());
        command.args(["-c", &script]);
        Actor::through(command)
    }

    /// Bytes of files that the kernel has charged to the cgroup.
    fn cache_bytes(&self) -> u64 {
        let stat = fs::read_to_string(self.0.join("memory.stat")).unwrap();
        let field = |line: &str| line.strip_prefix("cache ").or(line.strip_prefix("file "))?.parse().ok();
        stat.lines().find_map(field).unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("cannot remove {}", self.0.display());
    }
}

#[test]
fn pages_that_are_charged_to_the_cgroup_of_one_clone_are_named() {
    let _host = host::shared();
    let (world, digest) = world("decode");
    let memory = world.file(&digest, "memory");
    let [first, second] = ["stencil-first", "stencil-second"].map(Cgroup::new);
    let mut clones = [first.actor(), second.actor()];
    // The first clone needs 2000 pages first, and the second one 500 others.
    for (clone, pages) in clones.iter_mut().zip([0..2000, 6000..6500]) {
        map(clone, &memory);
        clone.read_pages(0, pages);
    }
    for (clone, pages) in clones.iter_mut().zip([6000..6500, 0..2000]) {
        clone.read_pages(0, pages);
    }
    let cached = cachestat::cached(mapped_file(&clones[0], world.mountpoint())).unwrap().bytes().get();
    let density = world.json(&["density", "--why"]);
    let charged: Vec<u64> = clones
        .iter()
        .map(|clone| {
            let rows = density["clones"].as_array().unwrap();
            let row = rows.iter().find(|row| row["pid"] == clone.pid()).unwrap();
            reasons(row)["charged"]
        })
        .collect();
    assert_eq!(charged.iter().sum::<u64>(), cached, "each page is charged to one of both: {charged:?}");
    // The kernel adds its counters of all processors up after some time, and has charged pages of programs too.
    let counted = [&first, &second].map(Cgroup::cache_bytes);
    assert_eq!(
        charged[0] > charged[1],
        counted[0] > counted[1],
        "memory.stat: {counted:?}, frames: {charged:?}"
    );
    assert!(charged[0] >= 2000 * 4096 && charged[1] >= 500 * 4096, "{charged:?}");

    // Clones of one cgroup share its charge.
    drop(clones);
    let mut clones = [first.actor(), first.actor()];
    for clone in &mut clones {
        map(clone, &memory);
        clone.read_pages(0, 0..2000);
    }
    let density = world.json(&["density", "--why"]);
    for row in density["clones"].as_array().unwrap() {
        assert_eq!(reasons(row).get("charged"), None);
        assert_eq!(row["mapped_bytes"], SIZE);
    }
    assert_eq!(reasons(&density["templates"][0]), none());

    // With a clone outside of the cgroup, the charge is split between the clones of the cgroup.
    let mut other = second.actor();
    map(&mut other, &memory);
    let density = world.json(&["density", "--why"]);
    let charge = |clone: &Actor| {
        let rows = density["clones"].as_array().unwrap();
        reasons(rows.iter().find(|row| row["pid"] == clone.pid()).unwrap())["charged"]
    };
    let (one, two) = (charge(&clones[0]), charge(&clones[1]));
    let resident = number(&density["templates"][0], "resident_bytes");
    assert!(one.abs_diff(two) <= 1 && one >= 1000 * 4096 && one + two <= resident, "{one} {two} {resident}");
    drop((clones, other));
    drop(world);
}
