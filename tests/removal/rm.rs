//! Two-phase removal: lookups of a condemned template fail, its users are found, and no user loses a template that it
//! uses.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use stencilfs::control::{Channel, Request, Response};
use stencilfs::sys::process::ProcessId;

use crate::support::daemon::passing::{Mounted, Running};
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::store::guest_like;

const SIZE: usize = 4 << 20;

/// A caller of the mount's supervisor, like `rm`.
struct Caller(Channel);

impl Caller {
    fn of(world: &TestMount) -> Caller {
        Caller(world.control())
    }

    fn request(&self, request: &Request) -> Response {
        self.0.send(request, None).unwrap();
        self.0.receive::<Response>().unwrap().expect("the supervisor closed the connection").0
    }

    fn succeed(&self, request: &Request) {
        let response = self.request(request);
        assert!(matches!(response, Response::Done | Response::Settled { .. }), "{response:?}");
    }
}

/// A process that has a file open; killed when dropped.
fn holder(file: File) -> Running {
    let mut sleep = Command::new("sleep");
    Running(sleep.arg("600").stdin(file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

/// Opens the memory of a template; returns the errno of a failed open.
fn open(world: &TestMount, digest: &str) -> Option<i32> {
    File::open(world.file(digest, "memory")).err().and_then(|e| e.raw_os_error())
}

#[test]
fn lookups_of_a_condemned_template_fail_until_its_release() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&guest_like(1, SIZE), "web");
        let other = world.import_bytes(&guest_like(2, SIZE), "other");
        assert_eq!(open(&world, &digest), None, "the kernel must have the name in its dentry cache");
        let caller = Caller::of(&world);
        let id = digest.parse().unwrap();
        caller.succeed(&Request::Condemn { digests: vec![id] });
        assert_eq!(open(&world, &digest), Some(libc::ENOENT), "{serve}");
        let by_tag = world.mountpoint().join("templates/web/latest/memory");
        assert_eq!(File::open(by_tag).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(open(&world, &other), None);
        // The next server hides the template too.
        let server = world.server();
        assert!(Command::new("kill").args(["-KILL", &server.to_string()]).status().unwrap().success());
        wait_for("another server", || (world.server() != server).then_some(()));
        assert_eq!(open(&world, &digest), Some(libc::ENOENT), "{serve}, the next server");
        caller.succeed(&Request::Confirm { digests: vec![id] });
        caller.succeed(&Request::Release { digests: vec![id], removed: false });
        assert_eq!(open(&world, &digest), None, "{serve}, released");
        assert!(matches!(caller.request(&Request::Confirm { digests: vec![id] }), Response::Failed(_)));
        // The end of the caller releases the template.
        caller.succeed(&Request::Condemn { digests: vec![id] });
        assert_eq!(open(&world, &digest), Some(libc::ENOENT));
        drop(caller);
        wait_for("the template to be released", || open(&world, &digest).is_none().then_some(()));
    }
}

#[test]
fn condemning_a_template_ends_opens_that_wait_for_a_backing() {
    let _host = host::shared();
    // If the backing is ready before the template is condemned, no open waits: try again.
    let waited = (0..8).any(|_| condemned_while_an_open_waits());
    assert!(waited, "all backings were ready before the template was condemned");
}

/// Condemns a template while an open waits for its backing. Returns false if the backing was ready before.
fn condemned_while_an_open_waits() -> bool {
    let world = TestMount::new("passthrough");
    let bytes = guest_like(1, 192 << 20);
    let digest = world.import_bytes(&bytes, "big");
    let id = digest.parse().unwrap();
    let path = world.file(&digest, "memory");
    fs::metadata(&path).unwrap();
    let caller = Caller::of(&world);
    let opener = thread::spawn(move || File::open(path).map(drop).map_err(|e| e.raw_os_error()));
    wait_for("the hydration", || (world.counter("hydrations_started") > 0).then_some(()));
    caller.succeed(&Request::Condemn { digests: vec![id] });
    let started = Instant::now();
    let opened = opener.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "the open must end before the response to Condemn");
    let waited = world.counter("hydrations_done") == 0;
    if waited {
        assert_eq!(opened, Err(Some(libc::ENOENT)));
        let reserved = world.json(&["du"])["totals"]["cache_bytes"].as_u64().unwrap();
        assert_eq!(reserved, 0, "the reserved cache space must be released");
    }
    caller.succeed(&Request::Release { digests: vec![id], removed: false });
    assert_eq!(open(&world, &digest), None, "the next open must create the backing");
    waited
}

#[test]
fn rm_names_processes_with_open_files_and_frees_the_cache() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&guest_like(1, SIZE), "web");
        let file = File::open(world.file(&digest, "memory")).unwrap();
        // The holder has the file open without a mapping.
        let holder = holder(file);
        let refused = world.stencil(&["rm", "web"]).exits(5).says("1 process has it open");
        assert!(refused.err.contains(&holder.0.id().to_string()), "{refused:?}");
        assert_eq!(open(&world, &digest), None, "the template must be released at once");
        let cache = || world.json(&["du"])["totals"]["cache_bytes"].as_u64().unwrap();
        assert_eq!(cache() > 0, serve == "passthrough");
        drop(holder);
        world.stencil(&["rm", "web"]).ok();
        assert_eq!(open(&world, &digest), Some(libc::ENOENT));
        assert_eq!(cache(), 0);
        assert!(world.status()["templates"].as_array().unwrap().is_empty(), "{:#}", world.status());
        world.stencil(&["gc"]).ok();
        let open_packs = |pid: u32| {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            fds.filter_map(|fd| fs::read_link(fd.path()).ok())
                .filter(|to| to.to_string_lossy().contains(".pack"))
                .count()
        };
        assert_eq!(open_packs(world.server()), 0, "no pack of the removed template may be kept open");
        // The same content can be imported and served again.
        assert_eq!(world.import_bytes(&guest_like(1, SIZE), "web"), digest);
        assert!(fs::read(world.file(&digest, "memory")).unwrap() == guest_like(1, SIZE));
    }
}

#[test]
fn rm_names_an_unreachable_supervisor_and_removes_nothing() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let pid = world.status()["supervisor_pid"].as_u64().unwrap().to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    wait_for("the supervisor to exit", || {
        (!fs::exists(format!("/proc/{pid}/cmdline")).unwrap()).then_some(())
    });
    let refused = world.stencil(&["rm", "web"]).exits(75).says("supervisor");
    assert!(refused.err.contains(world.mountpoint().to_str().unwrap()), "{refused:?}");
    assert_eq!(open(&world, &digest), None);
    world.mount(&["--serve", "decode"]).ok();
    world.stencil(&["rm", "web"]).ok();
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
}

/// In another PID namespace a command can see neither the supervisor nor clones: such a command must not treat them as
/// dead.
#[test]
fn commands_in_another_pid_namespace_remove_nothing() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let holder = holder(file);
    let elsewhere = |args: &[&str]| {
        let mut command = world.command_in("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(STENCIL).args(args);
        Run::of(args.join(" "), &command.output().unwrap())
    };
    let listed = elsewhere(&["status"]).ok();
    assert!(listed.out.contains(world.mountpoint().to_str().unwrap()), "{listed:?}");
    elsewhere(&["rm", "web"]).exits(75).says("a PID namespace other than the host's");
    world.stencil(&["rm", "web"]).exits(5).says("1 process has it open");
    assert_eq!(open(&world, &digest), None);
    drop(holder);
    world.stencil(&["rm", "web"]).ok();
}

/// A mount whose record is unreadable or missing may still serve the template.
#[test]
fn rm_removes_nothing_if_a_mount_record_is_unreadable() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let record = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap();
    let record = record.path().join("mount.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    world.stencil(&["rm", "web"]).exits(75).says("cannot read the record of a mount");
    let again = world.mount(&[]).exits(75);
    assert!(
        again.err.contains("cannot read the record of a mount"),
        "the mount must not be treated as dead: {again:?}"
    );
    fs::write(&record, &text).unwrap();
    // Another runtime directory has no record of the mount, but the mount table shows it.
    let elsewhere = |args: &[&str]| {
        let mut command = world.command();
        command.args(args).env("STENCIL_RUNTIME_DIR", world.dir().join("elsewhere"));
        Run::of(args.join(" "), &command.output().unwrap())
    };
    let refused = elsewhere(&["rm", "web"]).exits(75).says("no record in this runtime directory");
    assert!(refused.err.contains(world.mountpoint().to_str().unwrap()), "{refused:?}");
    assert_eq!(open(&world, &digest), None);
    // The mount namespace of another scenario may keep the mount a little longer; this mount table no longer has it.
    let gone = world.stencil(&["umount", world.mountpoint().to_str().unwrap()]);
    assert!(gone.code == 0 || gone.err.contains("unmounted here"), "{gone:?}");
    elsewhere(&["rm", "web"]).ok();
}

/// A store is identified by its ID, not by its path.
#[test]
fn rm_finds_the_mount_of_a_moved_store() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let holder = holder(file);
    let moved = world.dir().join("moved");
    fs::rename(world.store_dir(), &moved).unwrap();
    let rm = || world.stencil(&["--store", moved.to_str().unwrap(), "rm", "web"]);
    rm().exits(5).says("1 process has it open");
    // Another directory, then another store, at the path in the record of the mount.
    fs::create_dir(world.store_dir()).unwrap();
    rm().exits(5).says("1 process has it open");
    world.import_bytes(&guest_like(2, SIZE), "other");
    rm().exits(5).says("1 process has it open");
    fs::remove_dir_all(world.store_dir()).unwrap();
    fs::rename(&moved, world.store_dir()).unwrap();
    drop(holder);
}

#[test]
fn gc_untagged_removes_only_unused_templates() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let used = world.import_bytes(&guest_like(1, SIZE), "web:1");
    let unused = world.import_bytes(&guest_like(2, SIZE), "web:2");
    let tagged = world.import_bytes(&guest_like(3, SIZE), "web:3");
    for tag in ["1", "2"] {
        fs::remove_file(world.store_dir().join("tags/web").join(tag)).unwrap();
    }
    let file = File::open(world.file(&used, "memory")).unwrap();
    let holder = holder(file);
    let dry = world.json(&["gc", "--untagged", "--dry-run"]);
    assert_eq!(dry["removed_digests"], serde_json::json!([unused]));
    assert_eq!(dry["kept_digests"], serde_json::json!([used]));
    let done = world.json(&["gc", "--untagged"]);
    assert_eq!(done["removed_digests"], serde_json::json!([unused]));
    assert_eq!(done["kept_digests"], serde_json::json!([used]));
    drop(holder);
    let done = world.json(&["gc", "--untagged"]);
    assert_eq!(done["removed_digests"], serde_json::json!([used]));
    assert_eq!(world.json(&["ls"])["templates"][0]["digest"], tagged);
    world.stencil(&["verify"]).ok();
}

/// Whatever the number of templates, gc scans all processes once, and each template in use stays.
#[test]
fn gc_untagged_scans_all_processes_once() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digests: Vec<String> =
        (0..40).map(|n| world.import_bytes(&guest_like(n, 128 << 10), &format!("web:{n}"))).collect();
    // All templates were read recently, two are in use, and one gets a tag again.
    digests.iter().for_each(|digest| assert!(fs::read(world.file(digest, "memory")).is_ok()));
    let in_use = [&digests[7], &digests[31]];
    let holders: Vec<_> =
        in_use.iter().map(|digest| holder(File::open(world.file(digest, "memory")).unwrap())).collect();
    fs::remove_dir_all(world.store_dir().join("tags/web")).unwrap();
    world.stencil(&["tag", &digests[3], "web:3"]).ok();
    let run =
        world.command().env("STENCIL_LOG", "debug").args(["--json", "gc", "--untagged"]).output().unwrap();
    let log = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{log}");
    assert_eq!(log.matches("searching all processes for users of mounts").count(), 1, "{log}");
    let done: Value = serde_json::from_slice(&run.stdout).unwrap();
    let sorted = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|digest| digest.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(sorted(&done["kept_digests"]), in_use.map(String::clone).into());
    assert_eq!(sorted(&done["removed_digests"]).len(), 40 - 3);
    let mut left = vec![&digests[3], &digests[7], &digests[31]];
    left.sort();
    let listed = world.json(&["ls"]);
    let mut listed: Vec<&str> =
        listed["templates"].as_array().unwrap().iter().map(|t| t["digest"].as_str().unwrap()).collect();
    listed.sort_unstable();
    assert_eq!(listed, left);
    drop(holders);
    world.json(&["gc", "--untagged"]);
    world.stencil(&["verify"]).ok();
    assert!(fs::read(world.file(&digests[3], "memory")).is_ok());
    assert!(!world.file(&digests[7], "memory").exists());
}

/// The owner of a store cannot write root's runtime directory, which has the records of root's mounts.
#[test]
fn an_unprivileged_owner_removes_templates_without_a_mount() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.open_to_others();
    let (source, runtime) = (world.dir().join("source"), world.dir().join("own"));
    fs::write(&source, guest_like(1, SIZE)).unwrap();
    fs::create_dir(&runtime).unwrap();
    run("chown", &["-R", "12345:12345", world.store_dir().to_str().unwrap(), runtime.to_str().unwrap()]);
    let owner = |runtime_dir: &std::path::Path, args: &[&str]| {
        let mut command = world.command_in("setpriv");
        let user = ["--reuid=12345", "--regid=12345", "--clear-groups", STENCIL];
        let output = command.args(user).args(args).env("STENCIL_RUNTIME_DIR", runtime_dir).output().unwrap();
        Run::of(args.join(" "), &output)
    };
    owner(&runtime, &["import", source.to_str().unwrap(), "web"]).ok();
    world.mount(&["--serve", "decode"]).ok();
    let digest = world.json(&["ls"])["templates"][0]["digest"].as_str().unwrap().to_owned();
    let file = File::open(world.file(&digest, "memory")).unwrap();
    owner(&world.runtime_dir(), &["rm", "web"]).exits(1).says("or set STENCIL_RUNTIME_DIR");
    // The mount table shows the mount, but the owner's runtime directory has no record of it.
    owner(&runtime, &["rm", "web"]).exits(75).says("has no record");
    let mut read = vec![0; SIZE];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == guest_like(1, SIZE));
    drop(file);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    owner(&runtime, &["rm", "web"]).ok();
    assert!(world.json(&["ls"])["templates"].as_array().unwrap().is_empty());
}

/// One batch of templates with each kind of user: a template in use stays and is reported once; the others are removed.
#[test]
fn gc_untagged_keeps_templates_with_any_kind_of_user() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let names = ["overlay", "leased", "unreadable", "loop", "free", "free-too"];
    let digests: Vec<String> = (0..names.len() as u64)
        .map(|n| world.import_bytes(&guest_like(n, SIZE), &format!("{}:1", names[n as usize])))
        .collect();
    let file = |n: usize| world.file(&digests[n], "memory");
    // A file that overlayfs has open does not appear in /proc/PID/fd as a file of the mount.
    let (over, empty) = (world.dir().join("over"), world.dir().join("empty"));
    [&over, &empty].iter().for_each(|directory| fs::create_dir(directory).unwrap());
    let options = format!("lowerdir={}:{}", file(0).parent().unwrap().display(), empty.display());
    run("mount", &["-t", "overlay", "overlay", "-o", &options, over.to_str().unwrap()]);
    let over = Mounted(over);
    let by_overlay = File::open(over.0.join("memory")).unwrap();
    let mut export = world.command();
    let mut export = export.args(["export", "leased:1/memory", "-"]).stdout(Stdio::piped()).spawn().unwrap();
    wait_for("a lease", || (!world.json(&["du"])["leases"].as_array().unwrap().is_empty()).then_some(()));
    let image = world.store_dir().join("images").join(&digests[2]).join("image");
    let mut bytes = fs::read(&image).unwrap();
    bytes[100] ^= 1;
    fs::write(&image, bytes).unwrap();
    // A template that both a loop device and a process use.
    let device = Loop(run("losetup", &["-r", "-f", "--show", file(3).to_str().unwrap()]).trim().to_owned());
    let holder = holder(File::open(file(3)).unwrap());
    for name in names {
        fs::remove_dir_all(world.store_dir().join("tags").join(name)).unwrap();
    }

    let sorted = |list: &Value| -> Vec<String> {
        let mut all: Vec<String> =
            list.as_array().unwrap().iter().map(|digest| digest.as_str().unwrap().to_owned()).collect();
        all.sort();
        all
    };
    let these = |which: &[usize]| {
        let mut these: Vec<String> = which.iter().map(|n| digests[*n].clone()).collect();
        these.sort();
        these
    };
    let gc = |args: &[&str]| {
        let run = world.stencil(&[&["--json", "gc", "--untagged"], args].concat());
        (serde_json::from_str::<Value>(&run.out).unwrap_or_default(), run)
    };
    // A dry run hides no template, so the kernel is not asked for inodes in use.
    let (dry, run) = gc(&["--dry-run"]);
    // The blocks of the damaged template are unknown, so no pack can be freed.
    assert_eq!(run.code, 3, "{run:?}");
    assert_eq!(dry["error"]["code"], "damage", "{dry}");
    let (done, run) = gc(&[]);
    assert_eq!(run.code, 3, "{run:?}");
    assert_eq!(sorted(&done["removed_digests"]), these(&[4, 5]), "{run:?}");
    assert_eq!(sorted(&done["kept_digests"]), these(&[0, 1, 2, 3]), "{run:?}");
    let mut read = vec![0; SIZE];
    by_overlay.read_exact_at(&mut read, 0).unwrap();
    assert!(read == guest_like(0, SIZE), "the bytes of a template in use must not change");

    world.import_bytes(&guest_like(2, SIZE), "repaired:1");
    export.kill().unwrap();
    export.wait().unwrap();
    let (dry, _) = gc(&["--dry-run"]);
    assert_eq!(
        (sorted(&dry["removed_digests"]), sorted(&dry["kept_digests"])),
        (these(&[0, 1]), these(&[3])),
        "{dry:#}"
    );
    drop((by_overlay, over, device, holder));
    let (dry, _) = gc(&["--dry-run"]);
    let (done, _) = gc(&[]);
    assert_eq!(sorted(&done["removed_digests"]), these(&[0, 1, 3]));
    for field in ["removed_digests", "removed_packs", "freed_bytes"] {
        assert_eq!(dry[field], done[field], "{field}: the dry run must report the same");
    }
    world.stencil(&["verify"]).ok();
}

/// A removal that is killed at any moment has removed the template or leaves it, and never leaves it hidden.
#[test]
fn a_killed_removal_leaves_no_template_hidden() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let bytes = guest_like(1, SIZE);
    let mut digest = world.import_bytes(&bytes, "web");
    let mut duration = Duration::ZERO;
    let (mut killed, mut hidden, mut gone) = (0, 0, 0);
    let rounds = host::rounds(12, 100);
    // More rounds, if necessary, until each case has occurred: the timing depends on the load of the host.
    for round in 0..rounds * 10 {
        if round > rounds && killed > hidden && hidden > 0 && gone > 0 {
            break;
        }
        drop(File::open(world.file(&digest, "memory")).unwrap());
        let started = Instant::now();
        let mut rm = world.command().args(["rm", "web"]).stdout(Stdio::null()).spawn().unwrap();
        if round == 0 {
            assert!(rm.wait().unwrap().success());
            duration = started.elapsed();
            digest = world.import_bytes(&bytes, "web");
            continue;
        }
        thread::sleep(duration.mul_f64(f64::from(round % 12) / 9.0));
        let images = world.store_dir().join("images").join(&digest);
        let process = ProcessId::of(rm.id()).unwrap().filter(|p| p.signal(Signal::STOP).is_ok());
        hidden += u32::from(process.is_some() && open(&world, &digest).is_some() && images.exists());
        rm.kill().unwrap();
        killed += u32::from(rm.wait().unwrap().code().is_none());
        if images.exists() {
            wait_for("the template to be released", || open(&world, &digest).is_none().then_some(()));
            assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes, "round {round}");
        } else {
            gone += 1;
        }
        digest = world.import_bytes(&bytes, "web");
    }
    world.stencil(&["rm", "web"]).ok();
    world.stencil(&["verify"]).ok();
    let cases = format!(
        "{killed} removals were killed, {hidden} of them while the template was hidden; {gone} had removed the template"
    );
    assert!(killed > hidden && hidden > 0 && gone > 0, "{cases}");
    host::soaking().then(|| println!("{cases}"));
}

/// A stopped removal loses its hold on the template after a timeout, and starts again when it is continued.
#[test]
fn a_stopped_removal_releases_its_template_after_a_timeout() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let image = world.store_dir().join("images").join(&digest);
    // The template is hidden for a few milliseconds only: try until a removal was stopped in that time.
    let stopped = (0..50).find_map(|_| {
        let mut rm = world.command().args(["rm", "web"]).stderr(Stdio::piped()).spawn().unwrap();
        let process = ProcessId::of(rm.id()).unwrap().unwrap();
        while open(&world, &digest).is_none() && rm.try_wait().unwrap().is_none() {}
        if process.signal(Signal::STOP).unwrap() && open(&world, &digest).is_some() && image.exists() {
            return Some((rm, process));
        }
        process.signal(Signal::CONT).unwrap();
        if rm.wait().unwrap().success() {
            world.import_bytes(&guest_like(1, SIZE), "web");
        }
        None
    });
    let (rm, process) = stopped.expect("no removal was stopped while its template was hidden");
    let started = Instant::now();
    let second = world.stencil(&["rm", "web"]).exits(75).says("which is removing template");
    assert!(second.err.contains(&process.pid.to_string()), "{second:?}");
    assert!(started.elapsed() < Duration::from_secs(60));
    assert_eq!(open(&world, &digest), None, "the template must be visible again");
    let holder = File::open(world.file(&digest, "memory")).unwrap();
    process.signal(Signal::CONT).unwrap();
    let ended = rm.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(5), "the new user must be found: {ended:?}");
    assert_eq!(open(&world, &digest), None);
    drop(holder);
    world.stencil(&["rm", "web"]).ok();
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
}

/// If a removal is killed after the template is gone, the supervisor frees the backing.
#[test]
fn backings_of_a_vanished_template_are_freed() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let kept = world.import_bytes(&guest_like(2, SIZE), "kept");
    for digest in [&digest, &kept] {
        assert_eq!(open(&world, digest), None);
    }
    let cache = || world.json(&["du"])["totals"]["cache_bytes"].as_u64().unwrap();
    let both = cache();
    let caller = Caller::of(&world);
    caller.succeed(&Request::Condemn { digests: vec![digest.parse().unwrap()] });
    fs::remove_dir_all(world.store_dir().join("images").join(&digest)).unwrap();
    fs::remove_file(world.store_dir().join("tags/web/latest")).unwrap();
    assert_eq!(cache(), both);
    drop(caller);
    wait_for("the cache space to be released", || (cache() == both / 2).then_some(()));
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
    assert!(fs::read(world.file(&kept, "memory")).unwrap() == guest_like(2, SIZE));
}

/// A reader that the first scan did not find: its READ waits, and returns the page after the second scan has found the
/// reader and the template is restored.
#[test]
fn reads_wait_while_a_removed_template_is_restored() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = guest_like(1, SIZE);
    let digest = world.import_bytes(&bytes, "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let caller = Caller::of(&world);
    let id = digest.parse().unwrap();
    caller.succeed(&Request::Condemn { digests: vec![id] });
    let images = world.store_dir().join("images");
    let (image, removed) = (images.join(&digest), images.join(format!(".{digest}")));
    fs::rename(&image, &removed).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut read = vec![0; SIZE];
            file.read_exact_at(&mut read, 0).map(|()| read)
        });
        wait_for("a waiting READ", || (world.counter("source_waits") > 0).then_some(()));
        fs::rename(&removed, &image).unwrap();
        caller.succeed(&Request::Release { digests: vec![id], removed: false });
        assert!(reader.join().unwrap().unwrap() == bytes);
    });
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn rm_refuses_a_template_that_a_loop_device_uses() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&guest_like(1, SIZE), "web");
        let file = world.file(&digest, "memory");
        let device = Loop(run("losetup", &["-r", "-f", "--show", file.to_str().unwrap()]).trim().to_owned());
        world.stencil(&["rm", "web"]).exits(5).says(device.0.trim_start_matches("/dev/"));
        assert!(fs::read(&device.0).unwrap() == guest_like(1, SIZE));
        // `rm` in another store with the same content ignores the device.
        let other = TestMount::new(serve);
        other.import_bytes(&guest_like(1, SIZE), "web");
        other.stencil(&["rm", "web"]).ok();
        drop(device);
        wait_for("the loop device to be detached", || {
            (world.stencil(&["rm", "web"]).code == 0).then_some(())
        });
    }
}

#[test]
fn mounts_are_found_through_every_path_of_a_store() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    world.import_bytes(&guest_like(3, 4 << 20), "web:1");
    let alias = Mounted(world.dir().join("alias"));
    fs::create_dir(&alias.0).unwrap();
    let bound = Command::new("mount").arg("--bind").arg(world.store_dir()).arg(&alias.0).status().unwrap();
    assert!(bound.success());
    let stencil =
        |args: &[&str]| world.stencil(&[&["--store", alias.0.to_str().unwrap(), "--json"], args].concat());
    let json = |args: &[&str]| serde_json::from_str::<Value>(&stencil(args).ok().out).unwrap();
    let launched = json(&["clone", "web:1", "--simulate", "read=90%,write=1%"]);
    assert_eq!(launched["clones"].as_array().unwrap().len(), 1);
    assert!(json(&["du"])["totals"]["cache_bytes"].as_u64().unwrap() > 0);
    stencil(&["path", "web:1"]).ok();
    stencil(&["gc"]).ok();
    stencil(&["rm", "web:1"]).exits(5);
    stencil(&["stop", "--all"]).ok();
    stencil(&["rm", "web:1"]).ok();
}
