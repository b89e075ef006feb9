//! Mounts that cannot succeed: each fails with one line, a hint and the documented exit code, and changes nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, run, temporary, wait_for};

/// Asserts that there is no process, mount or record.
fn assert_untouched(world: &TestMount) {
    assert!(world.json(&["status"])["mounts"].as_array().unwrap().is_empty());
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(world.mountpoint().to_str().unwrap()), "{mounted}");
    let records = fs::read_dir(world.runtime_dir().join("mounts")).into_iter().flatten().count();
    assert_eq!(records, 0, "no record may be left");
}

#[test]
fn rejects_unusable_mountpoints() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap().to_owned();
    let missing = world.dir().join("missing");
    world.stencil(&["mount", missing.to_str().unwrap()]).exits(4).says("the mountpoint does not exist");
    let file = world.dir().join("file");
    fs::write(&file, "x").unwrap();
    world.stencil(&["mount", file.to_str().unwrap()]).exits(2).says("the mountpoint is not a directory");
    let full = world.dir().join("full");
    fs::create_dir_all(full.join("folder")).unwrap();
    world.stencil(&["mount", full.to_str().unwrap()]).exits(2).says("the mountpoint is not empty");
    world
        .stencil(&["mount", world.dir().to_str().unwrap()])
        .exits(2)
        .says("the store lies in the mountpoint");
    world.stencil(&["mount", "/proc"]).exits(5).says("in use by a mount of type proc");
    assert_untouched(&world);

    world.mount(&[]).ok();
    world.stencil(&["mount", &mnt]).exits(5).says("in use by a Stencil mount");
    assert_eq!(world.status()["restarts"], 0, "the existing mount must be unaffected");
    world.stencil(&["umount", &mnt]).ok();
    world.stencil(&["umount", &mnt]).exits(4).says("nothing is mounted at this path");
    world.stencil(&["umount", "/proc"]).exits(2).says("not a Stencil mount");
    world.stencil(&["umount", "/no/such/place"]).exits(4).says("No such file");
    assert_untouched(&world);
}

#[test]
fn a_dead_mount_is_replaced_by_mount_and_removed_by_umount() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mnt = world.mountpoint().to_str().unwrap().to_owned();
    let kill_both = || {
        let processes = world.processes();
        for process in &processes {
            process.signal(rustix::process::Signal::KILL).unwrap();
        }
        wait_for("both processes to exit", || processes.iter().all(|p| !p.is_alive()).then_some(()));
        // The FUSE connection ends when the last thread of the server has exited, which may be later.
        let dead = || fs::read_dir(&mnt).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
        wait_for("the end of the FUSE connection", || dead().then_some(()));
    };
    kill_both();
    world.mount(&["--serve", "decode"]).ok();
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 2, "mount must replace the dead mount");
    kill_both();
    assert!(world.stencil(&["status"]).exits(6).out.contains("the mount is dead"));
    world.stencil(&["umount", &mnt]).ok();
    assert_untouched(&world);
    world.mount(&[]).ok();
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 2);
}

#[test]
fn rejects_unusable_stores() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    let with = |store: &Path| world.stencil(&["--store", store.to_str().unwrap(), "mount", mnt]);
    with(&world.dir().join("nothing")).exits(4).says("no template store found");
    let foreign = world.dir().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    with(&foreign).exits(2).says("not a template store");
    let damaged = world.dir().join("damaged");
    stencilfs::store::Store::open_or_create(&damaged).unwrap();
    for header in ["format", "format.copy"] {
        fs::write(damaged.join(header), "rubbish").unwrap();
    }
    let run = with(&damaged);
    assert!(run.code == 3 || run.code == 1, "{run:?}");
    assert_untouched(&world);
}

#[test]
fn rejects_invalid_mount_options() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    for (list, message) in [
        ("frobnicate", "unknown mount option 'frobnicate'"),
        ("cache-dir", "unknown mount option 'cache-dir'"),
        ("serve=fast", "invalid serve mode 'fast'"),
        ("cache-size=much", "invalid size 'much'"),
        ("hydrate-timeout=soon", "invalid time 'soon'"),
        ("on-damage=pause", "invalid reaction to damage 'pause'"),
        ("suid", "'suid' is refused"),
        ("ro,dev", "'dev' is refused"),
    ] {
        world.mount(&["-o", list]).exits(2).says(message);
    }
    for args in [
        ["--serve", "fast"],
        ["--cache-size", "much"],
        ["--hydrate-timeout", "-1"],
        ["--on-damage", "ignore"],
    ] {
        world.mount(&args).exits(2);
    }
    let json = world.stencil(&["--json", "mount", "/no/such/place"]).exits(4);
    let error: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(
        (&error["error"]["code"], &error["error"]["path"]),
        (&"not-found".into(), &"/no/such/place".into())
    );
    assert!(error["error"]["remedy"].is_string(), "{error}");
    assert_untouched(&world);
    world.mount(&["-o", "ro,nosuid,nodev,noatime,_netdev,x-systemd.automount,serve=decode,noexec"]).ok();
    assert_eq!(world.status()["serve"], "decode");
}

#[test]
fn rejects_unusable_cache_directories() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let dir = |name: &str| {
        let dir = world.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir.to_str().unwrap().to_owned()
    };
    let cannot = "the cache directory cannot hold backings";
    world.mount(&["--cache-dir", "/no/such/cache"]).exits(4).says("cannot resolve the cache directory");
    world.mount(&["--cache-dir", "/proc"]).exits(1).says(cannot);
    let (lower, upper, work, merged) = (dir("lower"), dir("upper"), dir("work"), dir("merged"));
    let layers = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    run("mount", &["-t", "overlay", "overlay", "-o", &layers, &merged]);
    let overlay = world.mount(&["--cache-dir", &merged]);
    run("umount", &[&merged]);
    overlay.exits(1).says("FUSE passthrough rejects overlayfs");
    let tmpfs = dir("tmpfs");
    run("mount", &["-t", "tmpfs", "none", &tmpfs]);
    let on_tmpfs = world.mount(&["--cache-dir", &tmpfs]);
    run("umount", &[&tmpfs]);
    on_tmpfs.exits(1).says(cannot);
    assert_untouched(&world);
}

#[test]
fn backings_are_in_memory_if_the_store_cannot_hold_them() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i / 4096) as u8).collect();
    let source = world.dir().join("source");
    fs::write(&source, &bytes).unwrap();
    let store = world.dir().join("tmpfs");
    fs::create_dir(&store).unwrap();
    run("mount", &["-t", "tmpfs", "none", store.to_str().unwrap()]);
    let stencil = |args: &[&str]| world.stencil(&[&["--store", store.to_str().unwrap()], args].concat());
    stencil(&["import", source.to_str().unwrap(), "web:1"]).ok();
    run("mount", &["-o", "remount,ro", store.to_str().unwrap()]);
    let mounted = stencil(&["mount", "--serve", "passthrough", world.mountpoint().to_str().unwrap()]);
    let read = fs::read(world.mountpoint().join("templates/web/1/memory"));
    let status = world.json(&["--store", store.to_str().unwrap(), "status"]);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    run("umount", &[store.to_str().unwrap()]);
    mounted.ok();
    assert!(read.unwrap() == bytes);
    let mount = &status["mounts"][0];
    assert_eq!(mount["cache"], "memory", "{mount:#}");
    assert!(mount["cache_why"].as_str().unwrap().contains("in memory"), "{mount:#}");
    assert_eq!(mount["counters"]["opens_passthrough"], 1, "{mount:#}");
}

#[test]
fn mount_fails_without_dev_fuse_or_cap_sys_admin() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    // A mount namespace without /dev/fuse.
    let script = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$@\"";
    let without_device = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", STENCIL]).args(args);
        let output = command
            .env("STENCIL_STORE", world.store_dir())
            .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = without_device(&["mount", mnt]);
    assert_eq!(code, Some(4), "{stderr}");
    assert!(stderr.contains("/dev/fuse") && stderr.contains("modprobe fuse"), "{stderr}");

    // Root without CAP_SYS_ADMIN.
    let output = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", STENCIL, "mount", mnt])
        .env("STENCIL_STORE", world.store_dir())
        .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot mount") && stderr.contains("CAP_SYS_ADMIN"), "{stderr}");

    // A runtime directory that is a file.
    let file = world.dir().join("file");
    fs::write(&file, "x").unwrap();
    let output = world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &file).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("runtime directory") && stderr.contains("STENCIL_RUNTIME_DIR"), "{stderr}");
    assert_eq!(output.status.code(), Some(1));
    assert_untouched(&world);
}

#[test]
fn mount_fails_without_a_working_daemon() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let alone = temporary("alone-");
    let stencil = alone.path().join("stencil");
    // Written by a child process: a descriptor open for writing in this process could be inherited by a child of
    // another scenario, and execve(2) would fail with ETXTBSY.
    let shell = |script: &str| assert!(Command::new("sh").args(["-c", script]).status().unwrap().success());
    shell(&format!("cp {STENCIL} {0} && chmod 755 {0}", stencil.display()));
    let output = Command::new(&stencil)
        .args(["mount", world.mountpoint().to_str().unwrap()])
        .env("STENCIL_STORE", world.store_dir())
        .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("stencil-mountd is not installed"), "{stderr}");
    // Another program with the name of the daemon.
    let daemon = alone.path().join("stencil-mountd");
    shell(&format!("printf '#!/bin/sh\\nexit 7\\n' >{0} && chmod 755 {0}", daemon.display()));
    let output = Command::new(&stencil)
        .args(["mount", world.mountpoint().to_str().unwrap()])
        .env("STENCIL_STORE", world.store_dir())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("the supervisor exited without a report"), "{stderr}");
    assert_untouched(&world);
}

/// A mount whose device number cannot be found is unmounted again: later commands could not identify the mount.
#[test]
fn a_mount_missing_in_mountinfo_is_unmounted() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mountpoint = world.mountpoint().display().to_string();
    // The daemon sees a mountinfo file from before its start; the outer shell sees the real one.
    let inner = format!(
        "cat /proc/self/mountinfo >old && mount --bind old /proc/$$/mountinfo && exec {} supervise --store={} -- {mountpoint}",
        crate::support::mount::daemon().display(),
        world.store_dir().display(),
    );
    let outer = format!("bash -c '{inner}'; code=$?; echo; echo ended with $code; cat /proc/self/mountinfo");
    let output = world.command_in("unshare").args(["-m", "bash", "-c", &outer]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("ended with 1"), "{out}\n{err}");
    assert!(out.contains("the mount is missing from /proc/self/mountinfo"), "{out}\n{err}");
    assert!(!out.contains(&format!(" {mountpoint} ")), "the mount must be gone: {out}");
    assert_untouched(&world);
}
