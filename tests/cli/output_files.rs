//! Files that a command writes where the user names them: never replaced by accident, and readable for the owner alone.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use stencilfs::store::Target;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount};
use crate::support::store::guest_like;

/// A mounted store with a template of two files and one clone. Returns the id of the clone.
fn world() -> (TestMount, String) {
    let world = TestMount::new("decode");
    fs::write(world.dir().join("state"), "device state").unwrap();
    fs::write(world.dir().join("memory"), guest_like(1, 1 << 20)).unwrap();
    world.stencil(&["import", "memory", "web:1", "--state", "state"]).ok();
    let launched = world.json(&["clone", "web:1", "--simulate", "read=5%,write=5%"]);
    let id = launched["clones"][0]["id"].as_str().unwrap().to_owned();
    (world, id)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_file_is_replaced_only_with_force_and_is_for_its_owner_alone() {
    let _host = host::shared();
    let (world, id) = world();
    for command in [
        &["export", "web:1", "out"][..],
        &["export", "web:1/state", "out"],
        &["save", "web:1", "--output", "out"],
        &["dirty", &id, "--bitmap", "out"],
    ] {
        let out = world.dir().join("out");
        // A umask of 0 takes no permission away.
        let run = |more: &[&str]| {
            let mut shell = world.command_in("sh");
            shell.args(["-c", "umask 0; exec \"$@\"", "sh", STENCIL]).args(command).args(more);
            shell.output().unwrap()
        };
        assert!(run(&[]).status.success(), "{command:?}");
        assert_eq!(mode(&out), 0o600, "{command:?}");
        let written = fs::read(&out).unwrap();

        fs::write(&out, "precious").unwrap();
        fs::set_permissions(&out, PermissionsExt::from_mode(0o644)).unwrap();
        let refused = run(&[]);
        let err = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{command:?}: {err}");
        assert!(err.contains("refusing to replace an existing file") && err.contains("out"), "{err}");
        assert!(err.contains("hint: ") && err.contains("--force"), "{err}");
        assert_eq!((fs::read(&out).unwrap(), mode(&out)), (b"precious".to_vec(), 0o644), "{command:?}");

        // If OUT is a symbolic link, the command refuses or replaces the target of the link and keeps the link.
        let target = world.dir().join("target");
        fs::rename(&out, &target).unwrap();
        symlink("target", &out).unwrap();
        assert_eq!(run(&[]).status.code(), Some(1), "{command:?}");
        assert!(run(&["--force"]).status.success(), "{command:?}");
        assert!(fs::symlink_metadata(&out).unwrap().is_symlink());
        assert_eq!((fs::read(&target).unwrap() == written, mode(&target)), (true, 0o600), "{command:?}");
        fs::remove_file(&target).unwrap();
        // A dangling link is refused too.
        assert_eq!(run(&[]).status.code(), Some(1), "{command:?}");
        assert!(fs::symlink_metadata(&out).unwrap().is_symlink() && !target.exists());
        fs::remove_file(&out).unwrap();
        // A device needs no `--force`.
        fs::remove_file(&target).unwrap_or_default();
        symlink("/dev/null", &out).unwrap();
        assert!(run(&[]).status.success(), "{command:?}");
        fs::remove_file(&out).unwrap();
    }
    let left: Vec<_> = fs::read_dir(world.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".stencil-")), "{left:?}");
}

#[test]
fn an_export_of_several_files_replaces_none_if_one_exists() {
    let _host = host::shared();
    let (world, _) = world();
    let out = world.dir().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("state"), "precious").unwrap();
    world.stencil(&["export", "web:1", "out"]).exits(1).says("out/state");
    assert!(!out.join("memory").exists());
    assert_eq!(fs::read(out.join("state")).unwrap(), b"precious");
    world.stencil(&["export", "web:1", "out", "--force"]).ok();
    assert_eq!(fs::read(out.join("state")).unwrap(), b"device state");
    assert!(fs::read(out.join("memory")).unwrap() == guest_like(1, 1 << 20));
}

#[test]
fn a_file_created_during_the_write_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let target = Target::create(&out, false).unwrap();
    fs::write(&out, "precious").unwrap();
    let error = target.publish().unwrap_err();
    assert!(error.to_string().contains("refusing to replace an existing file"), "{error}");
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
