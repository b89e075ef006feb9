//! Whatever is in a mount's way gets one clear line, a remedy and the right exit code, and nothing is lost.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, run, temporary, wait_for};

/// No process, mount or record came of it.
fn assert_untouched(world: &TestMount) {
    assert!(world.json(&["status"])["mounts"].as_array().unwrap().is_empty());
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(world.mountpoint().to_str().unwrap()), "{mounted}");
    let records = fs::read_dir(world.runtime_dir().join("mounts")).into_iter().flatten().count();
    assert_eq!(records, 0, "a record was left");
}

#[test]
fn mountpoints_that_cannot_be() {
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
    assert_eq!(world.status()["restarts"], 0, "the first one is unharmed");
    world.stencil(&["umount", &mnt]).ok();
    world.stencil(&["umount", &mnt]).exits(4).says("nothing is mounted there");
    world.stencil(&["umount", "/proc"]).exits(2).says("none of Stencil");
    world.stencil(&["umount", "/no/such/place"]).exits(4).says("No such file");
    assert_untouched(&world);
}

#[test]
fn a_dead_mount_is_recovered_or_taken_away() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mnt = world.mountpoint().to_str().unwrap().to_owned();
    let kill_both = || {
        let processes = world.processes();
        for process in &processes {
            process.signal(rustix::process::Signal::KILL).unwrap();
        }
        wait_for("their end", || processes.iter().all(|p| !p.is_alive()).then_some(()));
        // Their last threads close the connection a moment later.
        let dead = || fs::read_dir(&mnt).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
        wait_for("the end of the connection", || dead().then_some(()));
    };
    kill_both();
    world.mount(&["--serve", "decode"]).ok();
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 2, "mounting again takes the dead one away");
    kill_both();
    assert!(world.stencil(&["status"]).exits(6).out.contains("the mount is dead"));
    world.stencil(&["umount", &mnt]).ok();
    assert_untouched(&world);
    world.mount(&[]).ok();
    assert_eq!(fs::read_dir(&mnt).unwrap().count(), 2);
}

#[test]
fn stores_that_cannot_be_mounted() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    let with = |store: &Path| world.stencil(&["--store", store.to_str().unwrap(), "mount", mnt]);
    with(&world.dir().join("nothing")).exits(4).says("no template store here");
    let foreign = world.dir().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    with(&foreign).exits(2).says("no template store");
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
fn options_that_are_none() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    for (list, words) in [
        ("frobnicate", "unknown mount option 'frobnicate'"),
        ("cache-dir", "unknown mount option 'cache-dir'"),
        ("serve=fast", "invalid serve mode 'fast'"),
        ("cache-size=much", "'much' is not a size"),
        ("hydrate-timeout=soon", "invalid time 'soon'"),
        ("suid", "'suid' is refused"),
        ("ro,dev", "'dev' is refused"),
    ] {
        world.mount(&["-o", list]).exits(2).says(words);
    }
    for words in [["--serve", "fast"], ["--cache-size", "much"], ["--hydrate-timeout", "-1"]] {
        world.mount(&words).exits(2);
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
fn caches_that_cannot_be() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let dir = |name: &str| {
        let dir = world.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir.to_str().unwrap().to_owned()
    };
    let cannot = "the cache directory cannot hold backings";
    world.mount(&["--cache-dir", "/no/such/cache"]).exits(4).says(cannot);
    world.mount(&["--cache-dir", "/proc"]).exits(1).says(cannot);
    let (lower, upper, work, merged) = (dir("lower"), dir("upper"), dir("work"), dir("merged"));
    let layers = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    run("mount", &["-t", "overlay", "overlay", "-o", &layers, &merged]);
    let overlay = world.mount(&["--cache-dir", &merged]);
    run("umount", &[&merged]);
    overlay.exits(1).says("overlayfs");
    let tmpfs = dir("tmpfs");
    run("mount", &["-t", "tmpfs", "none", &tmpfs]);
    let on_tmpfs = world.mount(&["--cache-dir", &tmpfs]);
    run("umount", &[&tmpfs]);
    on_tmpfs.exits(1).says(cannot);
    assert_untouched(&world);
}

#[test]
fn a_store_where_no_backing_can_be_has_them_in_memory() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i / 4096) as u8).collect();
    let source = world.dir().join("source");
    fs::write(&source, &bytes).unwrap();
    let store = world.dir().join("tmpfs");
    fs::create_dir(&store).unwrap();
    run("mount", &["-t", "tmpfs", "none", store.to_str().unwrap()]);
    let words = |words: &[&str]| world.stencil(&[&["--store", store.to_str().unwrap()], words].concat());
    words(&["import", source.to_str().unwrap(), "web:1"]).ok();
    run("mount", &["-o", "remount,ro", store.to_str().unwrap()]);
    let mounted = words(&["mount", "--serve", "passthrough", world.mountpoint().to_str().unwrap()]);
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
fn without_the_device_or_the_right_to_it() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mnt = world.mountpoint().to_str().unwrap();
    // A place without /dev/fuse.
    let script = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$@\"";
    let without_device = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", STENCIL]).args(words);
        let output = command
            .env("STENCIL_STORE", world.store_dir())
            .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = without_device(&["mount", mnt]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("/dev/fuse") && said.contains("modprobe fuse"), "{said}");

    // Root without the capability to mount.
    let output = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", STENCIL, "mount", mnt])
        .env("STENCIL_STORE", world.store_dir())
        .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot mount") && said.contains("CAP_SYS_ADMIN"), "{said}");

    // A runtime directory that is a file.
    let file = world.dir().join("file");
    fs::write(&file, "x").unwrap();
    let output = world.command().args(["mount", mnt]).env("STENCIL_RUNTIME_DIR", &file).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("runtime directory") && said.contains("STENCIL_RUNTIME_DIR"), "{said}");
    assert_eq!(output.status.code(), Some(1));
    assert_untouched(&world);
}

#[test]
fn without_the_daemon() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let alone = temporary("alone-");
    let stencil = alone.path().join("stencil");
    // By other processes: a child of another scenario that inherits a descriptor open for writing makes it ETXTBSY.
    let make = |script: &str| assert!(Command::new("sh").args(["-c", script]).status().unwrap().success());
    make(&format!("cp {STENCIL} {0} && chmod 755 {0}", stencil.display()));
    let output = Command::new(&stencil)
        .args(["mount", world.mountpoint().to_str().unwrap()])
        .env("STENCIL_STORE", world.store_dir())
        .env("STENCIL_RUNTIME_DIR", world.runtime_dir())
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("stencil-mountd is not installed"), "{said}");
    // A program in its place that is no daemon.
    let daemon = alone.path().join("stencil-mountd");
    make(&format!("printf '#!/bin/sh\\nexit 7\\n' >{0} && chmod 755 {0}", daemon.display()));
    let output = Command::new(&stencil)
        .args(["mount", world.mountpoint().to_str().unwrap()])
        .env("STENCIL_STORE", world.store_dir())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("the supervisor exited without a report"), "{said}");
    assert_untouched(&world);
}

/// A mount whose device number cannot be found is taken away again: nobody could say later which one it is.
#[test]
fn a_mount_that_is_not_in_mountinfo_is_taken_away() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mountpoint = world.mountpoint().display().to_string();
    // The daemon sees mounts as they were before it began; the shell around it sees them as they are.
    let inner = format!(
        "cat /proc/self/mountinfo >old && mount --bind old /proc/$$/mountinfo && exec {} supervise --store={} -- {mountpoint}",
        crate::support::mount::daemon().display(),
        world.store_dir().display(),
    );
    let outer = format!("bash -c '{inner}'; code=$?; echo; echo ended with $code; cat /proc/self/mountinfo");
    let output = world.command_in("unshare").args(["-m", "bash", "-c", &outer]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("ended with 1"), "{out}\n{err}");
    assert!(out.contains("the mount is missing in /proc/self/mountinfo"), "{out}\n{err}");
    assert!(!out.contains(&format!(" {mountpoint} ")), "the mount is left: {out}");
    assert_untouched(&world);
}
