//! Mounts whose store, cache or runtime directory would lie inside the mount: rejected before the mount exists.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use stencilfs::sys::files::mount;

use crate::support::mount::{Run, STENCIL, TestMount, run};

/// A bind mount of a directory, unmounted when dropped.
struct Bind(PathBuf);

impl Bind {
    fn new(from: &Path, to: PathBuf) -> Bind {
        fs::create_dir(&to).unwrap();
        run("mount", &[Path::new("--bind"), from, &to]);
        Bind(to)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        mount::unmount(&self.0, true).unwrap();
    }
}

fn mount_command(world: &TestMount, mountpoint: &Path, cache: Option<&Path>) -> Command {
    let mut command = world.command_in("timeout");
    command.args(["-s", "KILL", "20", STENCIL, "mount"]).arg(mountpoint);
    if let Some(cache) = cache {
        command.arg("--cache-dir").arg(cache);
    }
    command
}

#[track_caller]
fn assert_rejected(world: &TestMount, command: &mut Command, message: &str) {
    Run::of(format!("{command:?}"), &command.output().unwrap()).exits(2).says(message);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let below = world.dir().to_str().unwrap();
    let ours = mounts.lines().filter(|line| line.contains(below) && line.contains(mount::FS_TYPE));
    assert_eq!(ours.collect::<Vec<_>>(), Vec::<&str>::new(), "{command:?}");
    assert!(world.processes().is_empty(), "{command:?}");
    assert_eq!(fs::read_dir(world.mountpoint()).unwrap().count(), 0, "{command:?}");
}

#[test]
fn rejects_mounts_whose_own_files_would_lie_inside() {
    let world = TestMount::unmounted();
    let mnt = world.mountpoint();
    let inside = "lies in the mountpoint";
    assert_rejected(&world, &mut mount_command(&world, mnt, Some(mnt)), inside);
    assert_rejected(&world, &mut mount_command(&world, mnt, Some(&mnt.join("below"))), inside);
    assert_rejected(&world, &mut mount_command(&world, mnt, Some(Path::new("mnt/../mnt/."))), inside);
    symlink(mnt, world.dir().join("link")).unwrap();
    assert_rejected(&world, &mut mount_command(&world, mnt, Some(&world.dir().join("link"))), inside);
    assert_rejected(&world, &mut mount_command(&world, &world.dir().join("link"), Some(mnt)), inside);
    let bind = Bind::new(world.dir(), world.dir().with_extension("bind"));
    assert_rejected(&world, &mut mount_command(&world, mnt, Some(&bind.0.join("mnt"))), inside);
    let mut elsewhere = mount_command(&world, mnt, None);
    assert_rejected(&world, elsewhere.env("STENCIL_RUNTIME_DIR", bind.0.join("mnt/run")), inside);
    drop(bind);
    fs::remove_dir(world.dir().with_extension("bind")).unwrap();
    for runtime in [mnt.to_owned(), mnt.join("run"), world.dir().join("link/a/b")] {
        let mut command = mount_command(&world, mnt, None);
        assert_rejected(&world, command.env("STENCIL_RUNTIME_DIR", &runtime), inside);
    }
    // Relative to the working directory of the caller.
    let mut here = mount_command(&world, Path::new("."), Some(Path::new(".")));
    assert_rejected(&world, here.current_dir(mnt), inside);
    let in_store = world.store_dir().join("mnt");
    fs::create_dir(&in_store).unwrap();
    assert_rejected(&world, &mut mount_command(&world, &in_store, None), "lies in the store");
    fs::remove_dir(&in_store).unwrap();
    // Through the helper of mount(8), also with -f, which mounts nothing.
    for more in [&[][..], &["-f"]] {
        let helper = world.dir().join("mount.fuse.stencil");
        let _ = symlink(STENCIL, &helper);
        let mut command = world.command_in("timeout");
        command.args(["-s", "KILL", "20"]).arg(&helper).arg(world.store_dir()).arg(mnt).args(more);
        command.arg("-o").arg(format!("cache-dir={}", mnt.display()));
        let run = Run::of(format!("helper {more:?}"), &command.output().unwrap());
        assert!(run.code == 1 && run.err.contains(inside), "{more:?}: {} {}", run.code, run.err);
    }
    // Accepted: a cache directory beside the mountpoint, and a mountpoint that is the caller's working directory.
    let cache = world.dir().join("cache");
    fs::create_dir(&cache).unwrap();
    let mut beside = mount_command(&world, Path::new("."), Some(&cache));
    Run::of("beside".into(), &beside.current_dir(mnt).output().unwrap()).ok();
    world.stencil(&["restart", mnt.to_str().unwrap()]).ok();
    // A cache directory on the mount that exists now.
    let second = world.dir().join("second");
    fs::create_dir(&second).unwrap();
    for dir in [mnt.to_owned(), mnt.join("by-id"), world.dir().join("link")] {
        let mut command = mount_command(&world, &second, Some(&dir));
        let run = Run::of(format!("{command:?}"), &command.output().unwrap());
        run.exits(2).says("lies on the Stencil mount");
        assert!(mount::at(&second).unwrap().is_none());
    }
}
