//! Copying a store in use with rsync, in the order that docs/how-to/move-templates.md gives.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use stencilfs::store::Store;
use stencilfs::sys::process::procfs;

use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::hosts::Hosts;
use crate::support::mount::{STENCIL, wait_for};
use crate::support::store::{guest_like, random, read_all};

/// Returns the commands exactly as documented.
fn documented() -> String {
    let page =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/how-to/move-templates.md")).unwrap();
    let blocks = page.split("```sh,file=copy-store\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let mut found: Vec<&str> = blocks.filter(|block| block.contains("rsync ")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0).to_owned()
}

/// Returns the content of template `number`; neighbours share their first part.
fn content(number: u64) -> Vec<u8> {
    [guest_like(number / 4, 1 << 20), random(number, 512 << 10)].concat()
}

struct World {
    hosts: Hosts,
    script: String,
    copies: AtomicU64,
}

impl World {
    fn new() -> World {
        let world = World { hosts: Hosts::new(1), script: documented(), copies: AtomicU64::new(0) };
        world.import(0);
        // The destination must already be a store.
        let mut save =
            world.hosts.here.command(STENCIL).args(["save", "t:0"]).stdout(Stdio::piped()).spawn().unwrap();
        let load = format!("{STENCIL} load");
        let loaded = world.hosts.ssh(0, &load).stdin(save.stdout.take().unwrap()).output().unwrap();
        assert!(loaded.status.success() && save.wait().unwrap().success(), "{loaded:?}");
        world
    }

    fn import(&self, number: u64) {
        let source = self.hosts.here.path(&format!("source-{number}"));
        fs::write(&source, content(number)).unwrap();
        self.hosts.here.stencil(&["import", source.to_str().unwrap(), &format!("t:{number}")]).ok();
        fs::remove_file(source).unwrap();
    }

    /// Returns a command that runs the documented commands, and its staging directory.
    fn copy(&self) -> (Command, PathBuf) {
        let stage = self.hosts.here.path(&format!("stage-{}", self.copies.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&stage).unwrap();
        let mut command = self.hosts.here.command("sh");
        command
            .args(["-c", &self.script])
            .env("STORE", self.hosts.here.store())
            .env("STAGE", &stage)
            .env("DEST", format!("root@10.77.0.2:{}", self.hosts.there.store().display()))
            .env("RSYNC_RSH", self.hosts.ssh_words().join(" "))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        (command, stage)
    }

    /// Panics unless every tag in the destination names a complete template with the right bytes. Returns the number of
    /// tags.
    fn assert_complete(&self) -> usize {
        let store = Store::open(&self.hosts.there.store()).unwrap();
        let tags = store.tags().unwrap();
        for tag in &tags {
            let bytes = read_all(&store, &tag.digest, 0).unwrap_or_else(|e| panic!("{tag:?}: {e}"));
            assert!(bytes == content(tag.tag.parse().unwrap()), "{tag:?}");
        }
        tags.len()
    }

    /// Returns the rsync processes that write to the destination.
    fn receivers(&self) -> Vec<u32> {
        let store = self.hosts.there.store().into_os_string().into_string().unwrap();
        let pids =
            fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        let words = |pid: &u32| procfs::cmdline(*pid).ok().flatten().unwrap_or_default();
        pids.filter(|pid| {
            let words = words(pid);
            words.first().is_some_and(|w| w == "rsync") && words.iter().any(|w| w.starts_with(&store))
        })
        .collect()
    }

    fn copy_all(&self) {
        let (mut command, stage) = self.copy();
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(self.assert_complete() > 0);
        self.hosts.there.stencil(&["verify"]).ok();
        // Every staged tag exists in the destination.
        for tag in fs::read_dir(stage.join("tags/t")).unwrap().flatten() {
            assert!(self.hosts.there.store().join("tags/t").join(tag.file_name()).exists(), "{tag:?}");
        }
        fs::remove_dir_all(stage).unwrap();
    }
}

#[test]
fn soak_the_documented_commands_copy_a_store_in_use() {
    let _host = host::shared();
    let world = World::new();
    let (stop, next) = (AtomicBool::new(false), AtomicU64::new(1));
    let running = || !stop.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let _stop_on_drop = SetOnDrop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                while running() {
                    world.import(next.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        scope.spawn(|| {
            // Remove all but the newest templates, and their blocks.
            while running() {
                let tags = Store::open(&world.hosts.here.store()).unwrap().tags().unwrap();
                let mut numbers: Vec<u64> = tags.iter().map(|t| t.tag.parse().unwrap()).collect();
                numbers.sort_unstable();
                for number in numbers.iter().rev().skip(6) {
                    let ran = world.hosts.here.stencil(&["rm", &format!("t:{number}")]);
                    assert!([0, 4].contains(&ran.code), "{ran:?}");
                }
                world.hosts.here.stencil(&["gc"]).ok();
                thread::sleep(Duration::from_millis(50));
            }
        });
        for _ in 0..host::rounds(2, 10) {
            world.copy_all();
        }
    });
    assert!(next.load(Ordering::Relaxed) > 4, "the store was not in use");
    world.hosts.here.stencil(&["verify"]).ok();
}

#[test]
fn soak_an_interrupted_copy_has_only_complete_tags() {
    let _host = host::shared();
    let world = World::new();
    let mut number = 1;
    let mut import_some = || {
        for _ in 0..6 {
            world.import(number);
            number += 1;
        }
    };
    import_some();
    let start = Instant::now();
    world.copy_all();
    let duration = start.elapsed();
    let (cuts, mut cut_off) = (host::rounds(2, 8), 0);
    for cut in 0..cuts {
        import_some();
        let (mut command, stage) = world.copy();
        let mut running = command.spawn().unwrap();
        thread::sleep(duration.mul_f64(f64::from(cut) / f64::from(cuts)));
        world.hosts.set_link(0, false);
        cut_off += u32::from(!running.wait().unwrap().success());
        world.hosts.set_link(0, true);
        wait_for("the link", || world.hosts.ssh(0, "true").status().is_ok_and(|s| s.success()).then_some(()));
        wait_for("the exit of the receiving rsync", || world.receivers().is_empty().then_some(()));
        world.assert_complete();
        fs::remove_dir_all(stage).unwrap();
        world.copy_all();
    }
    assert!(cut_off > 0, "all {cuts} copies finished before the link went down");
}
