//! Two-phase removal: what is about to be removed is found by nobody, whoever has it is found, and nobody is hurt.

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

use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::passing::{Mounted, Running};
use crate::support::store::guest_like;

const SIZE: usize = 4 << 20;

/// A caller of the mount's supervisor, as `rm` is one.
struct Caller(Channel);

impl Caller {
    fn of(world: &TestMount) -> Caller {
        Caller(world.control())
    }

    fn ask(&self, request: &Request) -> Response {
        self.0.send(request, None).unwrap();
        self.0.receive::<Response>().unwrap().expect("the supervisor has gone").0
    }

    fn done(&self, request: &Request) {
        let answer = self.ask(request);
        assert!(matches!(answer, Response::Done | Response::Settled { .. }), "{answer:?}");
    }
}

/// A process that has a file open, until it is dropped.
fn holder(file: File) -> Running {
    let mut sleep = Command::new("sleep");
    Running(sleep.arg("600").stdin(file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn open(world: &TestMount, digest: &str) -> Option<i32> {
    File::open(world.file(digest, "memory")).err().and_then(|e| e.raw_os_error())
}

#[test]
fn a_condemned_template_is_found_by_nobody_and_again_afterwards() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&guest_like(1, SIZE), "web");
        let other = world.import_bytes(&guest_like(2, SIZE), "other");
        assert_eq!(open(&world, &digest), None, "the kernel has the name now");
        let caller = Caller::of(&world);
        let id = digest.parse().unwrap();
        caller.done(&Request::Condemn { digests: vec![id] });
        assert_eq!(open(&world, &digest), Some(libc::ENOENT), "{serve}");
        let folder = world.mountpoint().join("templates/web/latest/memory");
        assert_eq!(File::open(folder).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(open(&world, &other), None);
        // The next server knows it too.
        let server = world.server();
        assert!(Command::new("kill").args(["-KILL", &server.to_string()]).status().unwrap().success());
        wait_for("another server", || (world.server() != server).then_some(()));
        assert_eq!(open(&world, &digest), Some(libc::ENOENT), "{serve}, the next server");
        caller.done(&Request::Confirm { digests: vec![id] });
        caller.done(&Request::Release { digests: vec![id], removed: false });
        assert_eq!(open(&world, &digest), None, "{serve}, released");
        assert!(matches!(caller.ask(&Request::Confirm { digests: vec![id] }), Response::Failed(_)));
        // A caller that ends lets go.
        caller.done(&Request::Condemn { digests: vec![id] });
        assert_eq!(open(&world, &digest), Some(libc::ENOENT));
        drop(caller);
        wait_for("the template", || open(&world, &digest).is_none().then_some(()));
    }
}

#[test]
fn an_open_that_waits_for_its_backing_ends() {
    let _host = host::shared();
    // A backing may be ready before anybody could condemn it: then there was nothing that waits.
    let met = (0..8).any(|_| condemned_while_an_open_waits());
    assert!(met, "all backings were made before the template was condemned");
}

/// False where the backing was made first.
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
    caller.done(&Request::Condemn { digests: vec![id] });
    let begun = Instant::now();
    let opened = opener.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "it has ended before the answer");
    let met = world.counter("hydrations_done") == 0;
    if met {
        assert_eq!(opened, Err(Some(libc::ENOENT)));
        let reserved = world.json(&["du"])["totals"]["cache_bytes"].as_u64().unwrap();
        assert_eq!(reserved, 0, "its room is given back");
    }
    caller.done(&Request::Release { digests: vec![id], removed: false });
    assert_eq!(open(&world, &digest), None, "the next open has its backing made");
    met
}

#[test]
fn who_has_it_open_is_found_and_the_cache_is_given_back() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&guest_like(1, SIZE), "web");
        let file = File::open(world.file(&digest, "memory")).unwrap();
        // It has the file open and maps nothing of it.
        let holder = holder(file);
        let refused = world.stencil(&["rm", "web"]).exits(5).says("1 processes have it open");
        assert!(refused.err.contains(&holder.0.id().to_string()), "{refused:?}");
        assert_eq!(open(&world, &digest), None, "it is found again at once");
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
        assert_eq!(open_packs(world.server()), 0, "the disk has its room back");
        // The same content is served again when it comes back.
        assert_eq!(world.import_bytes(&guest_like(1, SIZE), "web"), digest);
        assert!(fs::read(world.file(&digest, "memory")).unwrap() == guest_like(1, SIZE));
    }
}

#[test]
fn a_mount_that_cannot_be_asked_is_named_and_nothing_is_removed() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let pid = world.status()["supervisor_pid"].as_u64().unwrap().to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    wait_for("its end", || (!fs::exists(format!("/proc/{pid}/cmdline")).unwrap()).then_some(()));
    let refused = world.stencil(&["rm", "web"]).exits(75).says("supervisor");
    assert!(refused.err.contains(world.mountpoint().to_str().unwrap()), "{refused:?}");
    assert_eq!(open(&world, &digest), None);
    world.mount(&["--serve", "decode"]).ok();
    world.stencil(&["rm", "web"]).ok();
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
}

/// Whoever does not see the supervisor neither takes it for dead nor trusts a search for clones.
#[test]
fn another_pid_namespace_removes_neither_records_nor_templates() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let holder = holder(file);
    let elsewhere = |words: &[&str]| {
        let mut command = world.command_in("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(STENCIL).args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    };
    let listed = elsewhere(&["status"]).ok();
    assert!(listed.out.contains(world.mountpoint().to_str().unwrap()), "{listed:?}");
    elsewhere(&["rm", "web"]).exits(75).says("another PID namespace");
    world.stencil(&["rm", "web"]).exits(5).says("1 processes have it open");
    assert_eq!(open(&world, &digest), None);
    drop(holder);
    world.stencil(&["rm", "web"]).ok();
}

/// What cannot be known of a mount is no sign that there is none.
#[test]
fn a_mount_that_is_not_known_whole_keeps_its_templates() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let record = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap();
    let record = record.path().join("mount.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    world.stencil(&["rm", "web"]).exits(75).says("the record of a mount cannot be read");
    let again = world.mount(&[]).exits(75);
    assert!(
        again.err.contains("the record of a mount cannot be read"),
        "nothing is taken for dead: {again:?}"
    );
    fs::write(&record, &text).unwrap();
    // Another runtime directory knows nothing of the mount; the mount table does.
    let elsewhere = |words: &[&str]| {
        let mut command = world.command();
        command.args(words).env("STENCIL_RUNTIME_DIR", world.dir().join("elsewhere"));
        Run::of(words.join(" "), &command.output().unwrap())
    };
    let refused = elsewhere(&["rm", "web"]).exits(75).says("no record in this runtime directory");
    assert!(refused.err.contains(world.mountpoint().to_str().unwrap()), "{refused:?}");
    assert_eq!(open(&world, &digest), None);
    // A mount namespace of another scenario may hold it for a moment longer; in this mount table it is gone.
    let gone = world.stencil(&["umount", world.mountpoint().to_str().unwrap()]);
    assert!(gone.code == 0 || gone.err.contains("unmounted here"), "{gone:?}");
    elsewhere(&["rm", "web"]).ok();
}

/// A store that is away is known by its identity.
#[test]
fn the_mount_of_a_store_that_was_moved_keeps_its_templates() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let holder = holder(file);
    let moved = world.dir().join("moved");
    fs::rename(world.store_dir(), &moved).unwrap();
    let rm = || world.stencil(&["--store", moved.to_str().unwrap(), "rm", "web"]);
    rm().exits(5).says("have it open");
    // Another folder, then another store at the path that the mount knows.
    fs::create_dir(world.store_dir()).unwrap();
    rm().exits(5).says("have it open");
    world.import_bytes(&guest_like(2, SIZE), "other");
    rm().exits(5).says("have it open");
    // A mount that does not say which store it serves.
    let mut records = fs::read_dir(world.runtime_dir().join("mounts")).unwrap();
    let record = records.next().unwrap().unwrap().path().join("mount.json");
    let sound = fs::read(&record).unwrap();
    let mut of_before: Value = serde_json::from_slice(&sound).unwrap();
    of_before.as_object_mut().unwrap().remove("store_id").unwrap();
    fs::write(&record, of_before.to_string()).unwrap();
    rm().exits(75).says("stencil restart");
    fs::write(&record, sound).unwrap();
    fs::remove_dir_all(world.store_dir()).unwrap();
    fs::rename(&moved, world.store_dir()).unwrap();
    drop(holder);
}

#[test]
fn templates_without_a_tag_go_only_when_nobody_uses_them() {
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
    assert_eq!(dry["removed_templates"], serde_json::json!([unused]));
    assert_eq!(dry["kept_templates"], serde_json::json!([used]));
    let done = world.json(&["gc", "--untagged"]);
    assert_eq!(done["removed_templates"], serde_json::json!([unused]));
    assert_eq!(done["kept_templates"], serde_json::json!([used]));
    drop(holder);
    let done = world.json(&["gc", "--untagged"]);
    assert_eq!(done["removed_templates"], serde_json::json!([used]));
    assert_eq!(world.json(&["ls"])["templates"][0]["digest"], tagged);
    world.stencil(&["verify"]).ok();
}

/// However many they are: all processes are searched once, and each template that is in use stays.
#[test]
fn a_collection_searches_all_processes_once() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digests: Vec<String> =
        (0..40).map(|n| world.import_bytes(&guest_like(n, 128 << 10), &format!("web:{n}"))).collect();
    // What was read lately, and what is in use, and what has got a tag again.
    digests.iter().for_each(|digest| assert!(fs::read(world.file(digest, "memory")).is_ok()));
    let held = [&digests[7], &digests[31]];
    let holders: Vec<_> =
        held.iter().map(|digest| holder(File::open(world.file(digest, "memory")).unwrap())).collect();
    fs::remove_dir_all(world.store_dir().join("tags/web")).unwrap();
    world.stencil(&["tag", &digests[3], "web:3"]).ok();
    let run =
        world.command().env("STENCIL_LOG", "debug").args(["--json", "gc", "--untagged"]).output().unwrap();
    let log = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{log}");
    assert_eq!(log.matches("all processes are searched").count(), 1, "{log}");
    let done: Value = serde_json::from_slice(&run.stdout).unwrap();
    let sorted = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|digest| digest.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(sorted(&done["kept_templates"]), held.map(String::clone).into());
    assert_eq!(sorted(&done["removed_templates"]).len(), 40 - 3);
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

/// Root's mounts are in a runtime directory that the owner of a store cannot write.
#[test]
fn an_owner_without_privileges_removes_what_no_mount_serves() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.open_to_others();
    let (source, own) = (world.dir().join("source"), world.dir().join("own"));
    fs::write(&source, guest_like(1, SIZE)).unwrap();
    fs::create_dir(&own).unwrap();
    run("chown", &["-R", "12345:12345", world.store_dir().to_str().unwrap(), own.to_str().unwrap()]);
    let owner = |runtime_dir: &std::path::Path, words: &[&str]| {
        let mut command = world.command_in("setpriv");
        let user = ["--reuid=12345", "--regid=12345", "--clear-groups", STENCIL];
        let output = command.args(user).args(words).env("STENCIL_RUNTIME_DIR", runtime_dir).output().unwrap();
        Run::of(words.join(" "), &output)
    };
    owner(&own, &["import", source.to_str().unwrap(), "web"]).ok();
    world.mount(&["--serve", "decode"]).ok();
    let digest = world.json(&["ls"])["templates"][0]["digest"].as_str().unwrap().to_owned();
    let file = File::open(world.file(&digest, "memory")).unwrap();
    owner(&world.runtime_dir(), &["rm", "web"]).exits(1).says("or set STENCIL_RUNTIME_DIR");
    // The mount is seen, and it is not known who asks it for what.
    owner(&own, &["rm", "web"]).exits(75).says("has no record");
    let mut read = vec![0; SIZE];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == guest_like(1, SIZE));
    drop(file);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    owner(&own, &["rm", "web"]).ok();
    assert!(world.json(&["ls"])["templates"].as_array().unwrap().is_empty());
}

/// A batch may have every kind of user at once: each template with one stays, is told once, and the others go.
#[test]
fn a_collection_keeps_what_only_the_kernel_or_a_lease_shows() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let names = ["overlay", "leased", "unreadable", "loop", "free", "free-too"];
    let digests: Vec<String> = (0..names.len() as u64)
        .map(|n| world.import_bytes(&guest_like(n, SIZE), &format!("{}:1", names[n as usize])))
        .collect();
    let file = |n: usize| world.file(&digests[n], "memory");
    // No process shows that it has this one open.
    let (over, empty) = (world.dir().join("over"), world.dir().join("empty"));
    [&over, &empty].iter().for_each(|folder| fs::create_dir(folder).unwrap());
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
    // Both a device and a process.
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
    let gc = |words: &[&str]| {
        let run = world.stencil(&[&["--json", "gc", "--untagged"], words].concat());
        (serde_json::from_str::<Value>(&run.out).unwrap_or_default(), run)
    };
    // It hides nothing from anybody, so the kernel cannot tell.
    let (dry, run) = gc(&["--dry-run"]);
    // What a template needs is not known, so no pack is given back.
    assert_eq!(run.code, 3, "{run:?}");
    assert_eq!(dry["error"]["code"], "damage", "{dry}");
    let (done, run) = gc(&[]);
    assert_eq!(run.code, 3, "{run:?}");
    assert_eq!(sorted(&done["removed_templates"]), these(&[4, 5]), "{run:?}");
    assert_eq!(sorted(&done["kept_templates"]), these(&[0, 1, 2, 3]), "{run:?}");
    let mut read = vec![0; SIZE];
    by_overlay.read_exact_at(&mut read, 0).unwrap();
    assert!(read == guest_like(0, SIZE), "its bytes are as before");

    world.import_bytes(&guest_like(2, SIZE), "repaired:1");
    export.kill().unwrap();
    export.wait().unwrap();
    let (dry, _) = gc(&["--dry-run"]);
    assert_eq!(
        (sorted(&dry["removed_templates"]), sorted(&dry["kept_templates"])),
        (these(&[0, 1]), these(&[3])),
        "{dry:#}"
    );
    drop((by_overlay, over, device, holder));
    let (dry, _) = gc(&["--dry-run"]);
    let (done, _) = gc(&[]);
    assert_eq!(sorted(&done["removed_templates"]), these(&[0, 1, 3]));
    for field in ["removed_templates", "removed_packs", "freed_bytes"] {
        assert_eq!(dry[field], done[field], "{field} was said before");
    }
    world.stencil(&["verify"]).ok();
}

/// A removal that is killed at any moment removes the template or leaves it, and never leaves it hidden.
#[test]
fn a_removal_that_is_killed_hides_nothing() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let bytes = guest_like(1, SIZE);
    let mut digest = world.import_bytes(&bytes, "web");
    let mut whole = Duration::ZERO;
    let (mut killed, mut hidden, mut gone) = (0, 0, 0);
    let rounds = host::rounds(12, 200);
    // As many more as it takes until each case was met, on a host whose load changes.
    for round in 0..rounds * 10 {
        if round > rounds && killed > hidden && hidden > 0 && gone > 0 {
            break;
        }
        drop(File::open(world.file(&digest, "memory")).unwrap());
        let begun = Instant::now();
        let mut rm = world.command().args(["rm", "web"]).stdout(Stdio::null()).spawn().unwrap();
        if round == 0 {
            assert!(rm.wait().unwrap().success());
            whole = begun.elapsed();
            digest = world.import_bytes(&bytes, "web");
            continue;
        }
        thread::sleep(whole.mul_f64(f64::from(round % 12) / 9.0));
        let images = world.store_dir().join("images").join(&digest);
        let process = ProcessId::of(rm.id()).unwrap().filter(|p| p.signal(Signal::STOP).is_ok());
        hidden += u32::from(process.is_some() && open(&world, &digest).is_some() && images.exists());
        rm.kill().unwrap();
        killed += u32::from(rm.wait().unwrap().code().is_none());
        if images.exists() {
            wait_for("the template", || open(&world, &digest).is_none().then_some(()));
            assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes, "round {round}");
        } else {
            gone += 1;
        }
        digest = world.import_bytes(&bytes, "web");
    }
    world.stencil(&["rm", "web"]).ok();
    world.stencil(&["verify"]).ok();
    let met =
        format!("{killed} were killed in time, {hidden} of them while it was hidden, {gone} had removed it");
    assert!(killed > hidden && hidden > 0 && gone > 0, "{met}");
    host::soaking().then(|| println!("{met}"));
}

/// A removal that stands still lets go after a while, and begins anew when it goes on.
#[test]
fn a_removal_that_stands_still_hides_nothing_for_long() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&guest_like(1, SIZE), "web");
    let folder = world.store_dir().join("images").join(&digest);
    // It is hidden for a few milliseconds: a removal that was faster is made again.
    let met = (0..50).find_map(|_| {
        let mut rm = world.command().args(["rm", "web"]).stderr(Stdio::piped()).spawn().unwrap();
        let process = ProcessId::of(rm.id()).unwrap().unwrap();
        while open(&world, &digest).is_none() && rm.try_wait().unwrap().is_none() {}
        if process.signal(Signal::STOP).unwrap() && open(&world, &digest).is_some() && folder.exists() {
            return Some((rm, process));
        }
        process.signal(Signal::CONT).unwrap();
        if rm.wait().unwrap().success() {
            world.import_bytes(&guest_like(1, SIZE), "web");
        }
        None
    });
    let (rm, process) = met.expect("a removal that is met while it hides its template");
    let begun = Instant::now();
    let second = world.stencil(&["rm", "web"]).exits(75).says("has been removing template");
    assert!(second.err.contains(&process.pid.to_string()), "{second:?}");
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert_eq!(open(&world, &digest), None, "it is found again");
    let holder = File::open(world.file(&digest, "memory")).unwrap();
    process.signal(Signal::CONT).unwrap();
    let ended = rm.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(5), "who came meanwhile is found: {ended:?}");
    assert_eq!(open(&world, &digest), None);
    drop(holder);
    world.stencil(&["rm", "web"]).ok();
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
}

/// What a removal that was killed behind its last step has left in the cache is given back.
#[test]
fn the_cache_of_a_template_that_vanished_is_given_back() {
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
    caller.done(&Request::Condemn { digests: vec![digest.parse().unwrap()] });
    fs::remove_dir_all(world.store_dir().join("images").join(&digest)).unwrap();
    fs::remove_file(world.store_dir().join("tags/web/latest")).unwrap();
    assert_eq!(cache(), both);
    drop(caller);
    wait_for("its room", || (cache() == both / 2).then_some(()));
    assert_eq!(open(&world, &digest), Some(libc::ENOENT));
    assert!(fs::read(world.file(&kept, "memory")).unwrap() == guest_like(2, SIZE));
}

/// Somebody whom the first search did not see gets his page when the second has seen him.
#[test]
fn who_reads_while_a_template_is_put_back_waits() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = guest_like(1, SIZE);
    let digest = world.import_bytes(&bytes, "web");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    let caller = Caller::of(&world);
    let id = digest.parse().unwrap();
    caller.done(&Request::Condemn { digests: vec![id] });
    let images = world.store_dir().join("images");
    let (folder, grave) = (images.join(&digest), images.join(format!(".{digest}")));
    fs::rename(&folder, &grave).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut read = vec![0; SIZE];
            file.read_exact_at(&mut read, 0).map(|()| read)
        });
        wait_for("a READ that waits", || (world.counter("source_waits") > 0).then_some(()));
        fs::rename(&grave, &folder).unwrap();
        caller.done(&Request::Release { digests: vec![id], removed: false });
        assert!(reader.join().unwrap().unwrap() == bytes);
    });
}

/// Takes a loop device away with its scenario.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_loop_device_counts_as_a_user() {
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
        wait_for("its end", || (world.stencil(&["rm", "web"]).code == 0).then_some(()));
    }
}

#[test]
fn a_store_has_its_mounts_by_every_path() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    world.import_bytes(&guest_like(3, 4 << 20), "web:1");
    let alias = Mounted(world.dir().join("alias"));
    fs::create_dir(&alias.0).unwrap();
    let bound = Command::new("mount").arg("--bind").arg(world.store_dir()).arg(&alias.0).status().unwrap();
    assert!(bound.success());
    let asked =
        |words: &[&str]| world.stencil(&[&["--store", alias.0.to_str().unwrap(), "--json"], words].concat());
    let answer = |words: &[&str]| serde_json::from_str::<Value>(&asked(words).ok().out).unwrap();
    let launched = answer(&["clone", "web:1", "--simulate", "read=90%,write=1%"]);
    assert_eq!(launched["clones"].as_array().unwrap().len(), 1);
    assert!(answer(&["du"])["totals"]["cache_bytes"].as_u64().unwrap() > 0);
    asked(&["path", "web:1"]).ok();
    asked(&["gc"]).ok();
    asked(&["rm", "web:1"]).exits(5);
    asked(&["stop", "--all"]).ok();
    asked(&["rm", "web:1"]).ok();
}
