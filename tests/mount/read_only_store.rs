//! A store on a read-only file system is served; commands that would modify the store fail with that reason.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::support::host;
use crate::support::mount::{Run, TestMount, run};
use crate::support::store::guest_like;

/// A small ext4 file system mounted over the store's directory, with a copy of its contents; unmounted when dropped.
struct Disk(String);

impl Disk {
    fn under(store: &Path) -> Disk {
        let image = store.with_file_name("store.ext4");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let store = store.to_str().unwrap().to_owned();
        run("mkfs.ext4", &["-q", "-d", &store, image.to_str().unwrap()]);
        run("mount", &["-o", "loop", image.to_str().unwrap(), &store]);
        Disk(store)
    }

    /// Remounts the superblock, not only this mount of it.
    fn remount(&self, how: &str) {
        run("mount", &["-o", &format!("remount,{how}"), &self.0]);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(&self.0)).unwrap();
        let options = line.split(' ').next_back().unwrap();
        assert!(options.split(',').any(|option| option == how), "{line}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}

#[test]
fn a_store_on_a_read_only_file_system_is_served() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = Disk::under(&world.store_dir());
    let bytes = guest_like(1, 4 << 20);
    let digest = world.import_bytes(&bytes, "web");
    run("chown", &["-R", "65534:65534", world.store_dir().to_str().unwrap()]);
    disk.remount("ro");
    assert_eq!(world.json(&["ls"])["templates"][0]["digest"], digest);
    world.stencil(&["verify"]).ok();
    world.mount(&[]).ok();
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    assert_eq!(world.status()["templates"][0]["serving"], "passthrough", "the backing must be in memory");
    world.stencil(&["clone", "web", "-n", "3", "--simulate", "read=50%,write=5%"]).ok();
    assert_eq!(world.json(&["density"])["totals"]["clones"], 3);
    let out = world.dir().join("out");
    world.stencil(&["export", "web", out.to_str().unwrap()]).ok();
    assert!(fs::read(out).unwrap() == bytes);
    assert_eq!(world.json(&["du"])["templates"][0]["digest"], digest);
    world.stencil(&["gc", "--dry-run"]).ok();
    // The owner of the store can read it, without write access to the store and to the runtime directory.
    world.open_to_others();
    let out = world.dir().join("theirs");
    run("install", &["-d", "-o", "65534", out.to_str().unwrap()]);
    let mut theirs = world.command();
    theirs.args(["export", "web", out.join("memory").to_str().unwrap()]).uid(65534).gid(65534);
    Run::of("export".into(), &theirs.output().unwrap()).ok();
    assert!(fs::read(out.join("memory")).unwrap() == bytes);

    let source = world.dir().join("source");
    fs::write(&source, guest_like(2, 1 << 20)).unwrap();
    for args in [
        &["import", source.to_str().unwrap(), "other"][..],
        &["tag", "web", "web:2"],
        &["chmod", "0440", "web"],
        &["gc"],
    ] {
        world.stencil(args).exits(1).says("read-only");
    }
    world.stencil(&["stop", "--all"]).ok();
    world.stencil(&["rm", "web"]).exits(1).says("read-only");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    disk.remount("rw");
    world.stencil(&["rm", "web"]).ok();
}
