//! The server's sandbox: forbidden operations are tried inside and outside of it, and a real server has no privileges.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use stencilfs::control::CONTROL_VERSION;
use stencilfs::sys::files::mount;
use stencilfs::sys::process::ProcessId;

use crate::failover::attempt::sandbox::calls::{Allowed, CALLS};
use crate::failover::attempt::{self, Outcome, Sandbox};
use crate::support::actor::Actor;
use crate::support::mount::{SIGSYS, STENCIL, TestMount, wait_for};
use crate::support::{daemon::link, host};

/// The number of allowed system calls in docs/explanation/security.md. A change must be deliberate.
const COUNT: usize = 50;

/// A process that is not related to a server.
struct Stranger(Child);

impl Stranger {
    fn start() -> Stranger {
        Stranger(Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The object of an operation.
enum Target {
    Nothing,
    Word(&'static str),
    /// The PID of an unrelated process.
    Process,
    /// An empty directory.
    Directory,
    /// An existing file.
    File,
    /// A name that does not exist.
    New,
    /// A file of the store.
    Store,
}
use Target::{Directory, File, New, Nothing, Process, Store, Word};

/// Operation, object, result outside of the sandbox, result inside, and whether the seccomp filter is the layer that
/// refuses it.
const ATTEMPTS: &[(&str, Target, &str, &str, bool)] = &[
    ("execve", Nothing, "done", "EPERM", true),
    ("fork", Nothing, "done", "EPERM", true),
    ("clone3", Nothing, "EINVAL", "ENOSYS", false),
    ("ptrace", Process, "done", "EPERM", true),
    ("process_vm_readv", Process, "EFAULT", "EPERM", true),
    ("kill", Process, "done", "EPERM", true),
    ("tgkill", Process, "done", "EPERM", true),
    ("set_owner", Process, "done", "EPERM", true),
    ("pidfd_open", Process, "done", "EPERM", true),
    ("socket_inet", Nothing, "done", "EPERM", true),
    ("socket_unix", Nothing, "done", "EPERM", true),
    ("socket_netlink", Nothing, "done", "EPERM", true),
    ("mount", Directory, "done", "EPERM", true),
    ("unshare", Nothing, "done", "EPERM", true),
    ("bpf", Nothing, "done", "EPERM", true),
    ("io_uring", Nothing, "EFAULT", "EPERM", true),
    ("userfaultfd", Nothing, "done", "EPERM", true),
    ("map_code", Nothing, "done", "EPERM", true),
    ("setuid", Word("0"), "done", "EPERM", true),
    ("chmod", File, "done", "EPERM", true),
    ("unlink", File, "done", "EPERM", true),
    ("write", File, "done", "EPERM", true),
    ("write", Store, "done", "EPERM", true),
    ("create", New, "done", "EPERM", true),
    ("tmpfile", Directory, "done", "EPERM", true),
    ("memfd", Nothing, "done", "EPERM", true),
    ("read", Word("/etc/shadow"), "done", "EACCES", false),
    ("read", File, "done", "EACCES", false),
    // Operations that a server needs.
    ("read", Store, "done", "done", false),
    ("thread", Nothing, "done", "done", false),
];

/// Tries one operation. `lacking` is a feature that the kernel is made to lack.
fn attempt(
    world: &TestMount,
    lacking: Option<&str>,
    kill: bool,
    inside: bool,
    what: &'static str,
    target: &Target,
) -> Outcome {
    let stranger = matches!(target, Process).then(Stranger::start);
    let file = world.dir().join("target");
    let _ = fs::remove_file(&file);
    let _ = fs::remove_dir(&file);
    let object = match target {
        Nothing => String::new(),
        Word(word) => (*word).to_owned(),
        Process => stranger.as_ref().unwrap().0.id().to_string(),
        Directory => {
            fs::create_dir(&file).unwrap();
            file.display().to_string()
        }
        File => {
            fs::write(&file, "x").unwrap();
            file.display().to_string()
        }
        New => file.display().to_string(),
        Store => world.store_dir().join("format").display().to_string(),
    };
    let sandbox = inside.then(|| Sandbox { store: world.store_dir(), kill });
    let outcome = attempt::attempt(lacking, sandbox, what, object);
    let _ = mount::unmount(&file, true);
    outcome
}

#[test]
fn forbidden_operations_fail_inside_the_sandbox() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    for (what, target, outside, inside, _) in ATTEMPTS {
        let got = attempt(&world, None, false, false, what, target).result;
        assert_eq!(got, *outside, "{what} outside of the sandbox: the attempt proves nothing");
        let got = attempt(&world, None, false, true, what, target).result;
        assert_eq!(got, *inside, "{what} inside");
    }
}

#[test]
fn with_seccomp_kill_a_forbidden_call_raises_sigsys() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    for (what, target, _, inside, by_filter) in ATTEMPTS {
        let tried = attempt(&world, None, true, true, what, target);
        match by_filter {
            true => assert_eq!((tried.signal, tried.result.as_str()), (Some(libc::SIGSYS), ""), "{what}"),
            false => assert_eq!((tried.signal, tried.result.as_str()), (None, *inside), "{what}"),
        }
    }
}

/// Each layer alone refuses the operations that the other layer would refuse first.
#[test]
fn each_sandbox_layer_works_without_the_other() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let inside = |lacking, what, target| attempt(&world, Some(lacking), false, true, what, &target).result;
    assert_eq!(inside("seccomp", "read", Word("/etc/shadow")), "EACCES");
    assert_eq!(inside("seccomp", "write", Store), "EACCES");
    assert_eq!(inside("seccomp", "create", New), "EACCES");
    assert_eq!(inside("seccomp", "unlink", File), "EACCES");
    assert_eq!(inside("seccomp", "kill", Process), "EPERM");
    assert_eq!(inside("seccomp", "ptrace", Process), "EPERM");
    assert_eq!(inside("seccomp", "mount", Directory), "EPERM");
    assert_eq!(inside("seccomp", "unshare", Nothing), "EPERM", "the process has no capability either");
    assert_eq!(inside("landlock", "write", Store), "EPERM");
    assert_eq!(inside("landlock", "create", New), "EPERM");
    assert_eq!(inside("landlock", "kill", Process), "EPERM");
    assert_eq!(inside("landlock", "read", File), "done", "only Landlock forbids reading");
}

fn status_fields(path: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

/// Panics unless every thread of the server has this uid and gid, no capability, and a seccomp filter.
#[track_caller]
fn assert_confined(pid: u32, uid: u32) {
    let tasks: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().collect();
    assert!(tasks.len() >= 4, "{} threads", tasks.len());
    let uids = format!("{uid} {uid} {uid} {uid}");
    for task in tasks {
        let fields = status_fields(&task.path().join("status"));
        let field = |name: &str| {
            let found = fields.iter().find(|(n, _)| n == name);
            found.unwrap_or_else(|| panic!("no {name}")).1.clone()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(
            (field("Uid"), field("Gid"), field("Groups")),
            (uids.clone(), uids.clone(), String::new())
        );
        assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
    }
}

/// Panics unless a supervisor that did not start the server can take the server's FUSE descriptor with pidfd_getfd.
#[track_caller]
fn assert_adoptable(pid: u32) {
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut taken = Vec::<OwnedFd>::new();
    for fd in fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/fuse"))) {
        let number = fd.file_name().to_str().unwrap().parse().unwrap();
        taken.push(pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap());
    }
    assert!(!taken.is_empty(), "the server has no FUSE connection open");
}

fn image(seed: u8) -> Vec<u8> {
    (0..1_048_576u32).map(|i| (i / 4096) as u8 ^ (i as u8).wrapping_mul(seed)).collect()
}

#[test]
fn a_running_server_has_no_privileges() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&image(3), "web:1");
        assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), image(3));
        assert_confined(world.server(), 0);
        assert_adoptable(world.server());
        world.kill_server();
        let digest = world.import_bytes(&image(5), "web:2");
        assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), image(5));
        assert_confined(world.server(), 0);
        let supervisor = world.status()["supervisor_pid"].as_u64().unwrap();
        let fields = status_fields(Path::new(&format!("/proc/{supervisor}/status")));
        assert!(
            fields.contains(&("Seccomp".to_owned(), "0".to_owned())),
            "the supervisor has no seccomp filter"
        );
    }
}

/// The server drops the capability to lock memory, but locks the reply buffers before.
#[test]
fn reply_buffers_are_locked_despite_a_low_memlock_limit() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let digest = world.import_bytes(&image(3), "web:1");
    let plain = world.command();
    let mut command = Command::new("prlimit");
    command
        .args(["--memlock=65536:65536", STENCIL, "mount"])
        .arg(world.mountpoint())
        .args(["--serve", "decode"]);
    let set = plain.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let output = command.envs(set).current_dir(world.dir()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), image(3));
    let fields = status_fields(Path::new(&format!("/proc/{}/status", world.server())));
    let locked = &fields.iter().find(|(name, _)| name == "VmLck").unwrap().1;
    let locked: u64 = locked.trim_end_matches(" kB").parse().unwrap();
    assert!(locked >= 4 << 10, "only {locked} KiB are locked");
}

/// Makes a user the owner of a store, and the store reachable for that user.
fn give_store_to(world: &TestMount, uid: u32) {
    world.open_to_others();
    let mut directories = vec![world.store_dir()];
    while let Some(path) = directories.pop() {
        std::os::unix::fs::lchown(&path, Some(uid), Some(uid)).unwrap();
        if path.is_dir() {
            directories.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

#[test]
fn a_server_runs_as_the_stores_owner() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::unmounted();
        let first = world.import_bytes(&image(3), "web:1");
        give_store_to(&world, 1000);
        world.mount(&["--serve", serve]).ok();
        assert_eq!(fs::read(world.file(&first, "memory")).unwrap(), image(3));
        assert_confined(world.server(), 1000);
        assert_adoptable(world.server());
        // Files that root imports belong to the store's owner too, with all directories above them.
        let second = world.import_bytes(&image(7), "api:1");
        let mut directories = vec![world.store_dir()];
        while let Some(path) = directories.pop() {
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000), "{}", path.display());
            if metadata.is_dir() {
                directories.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
        assert_eq!(fs::read(world.file(&second, "memory")).unwrap(), image(7));
        world.kill_server();
        assert_eq!(fs::read(world.mountpoint().join("templates/api/1/memory")).unwrap(), image(7));
        assert_confined(world.server(), 1000);
    }
}

#[test]
fn mount_refuses_a_store_that_its_owner_cannot_read() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    give_store_to(&world, 1000);
    fs::set_permissions(world.dir(), fs::Permissions::from_mode(0o700)).unwrap();
    world.mount(&["--serve", "decode"]).exits(1).says("the store's owner (uid 1000) cannot read the store");
    fs::set_permissions(world.dir(), fs::Permissions::from_mode(0o711)).unwrap();
    world.mount(&["--serve", "decode"]).ok();
}

#[test]
fn a_server_does_not_follow_links_out_of_the_store() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&image(3), "web:1");
    let inside = world.store_dir().join("tags/web/1");
    let link = world.mountpoint().join("templates/web/1");
    let before = fs::read_link(&link).unwrap();
    // The same bytes behind a symbolic link that leads out of the store.
    let outside = world.dir().join("outside");
    fs::rename(&inside, &outside).unwrap();
    symlink(&outside, &inside).unwrap();
    assert_eq!(fs::read_link(&link).unwrap_err().raw_os_error(), Some(libc::EIO));
    let log = world.log();
    assert!(log.contains("Too many levels of symbolic links"), "{log}");
    fs::rename(&outside, &inside).unwrap();
    assert_eq!(fs::read_link(&link).unwrap(), before);
}

/// A compromised server sends every request that must be refused. The supervisor refuses and keeps working, and no
/// clone is affected.
#[test]
fn the_supervisor_validates_requests_of_the_server() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "auto", "--cache-size", "64M"]);
    let digest = world.import_bytes(&image(3), "web:1");
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), image(3).len()));
    assert_eq!(world.counter("opens_passthrough"), 1);
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap();
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = resident();
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    let link = link::link_of(server.pid);
    server.signal(Signal::STOP).unwrap();
    link.set_timeout(Duration::from_secs(5)).unwrap();
    let mut number = 1_000_000u64;
    let mut reply_to = |request: Value| -> String {
        number += 1;
        link.send(&link::request(number, &request), None).unwrap();
        loop {
            // Replies to requests of the stopped server itself come first.
            let (reply, fd) = link.receive::<Value>().unwrap().expect("the supervisor has exited");
            if reply["number"] == number {
                assert!(fd.is_none(), "{request}: the reply has a descriptor");
                return reply["body"].to_string();
            }
        }
    };
    let ours = json!({ "digest": digest, "file": "memory" });
    for request in [
        json!({ "reserve": { "key": link::absent_key(1), "size": 4096, "data_bytes": u64::MAX } }),
        json!({ "reserve": { "key": link::absent_key(1), "size": u64::MAX, "data_bytes": 4096 } }),
        json!({ "freeze": { "key": link::absent_key(2) } }),
        json!({ "register": { "key": link::absent_key(2), "identity": [0, 0] } }),
        json!({ "no_backing": { "key": { "digest": digest, "file": "x".repeat(256) }, "reason": null } }),
        json!({ "handshake": { "control_version": 0, "version": "", "lacks": [], "init_reply": [] } }),
        json!({ "handshake": { "control_version": CONTROL_VERSION, "version": "", "lacks": [], "init_reply": [1, 2] } }),
    ] {
        let answer = reply_to(request.clone());
        assert!(answer.contains("refused"), "{request}: {answer}");
    }
    // A backing that a clone maps is not evicted.
    assert_eq!(reply_to(json!({ "evict": { "keys": [ours] } })), json!({ "evicted": [] }).to_string());
    // The recorded reasons are bounded in number and length.
    let mut refused = 0;
    for n in 0..5000 {
        // All reasons are written to the ledger each time: of 25 MB only a few bytes of each reason may be kept.
        let reason = "x".repeat(if n < 500 { 50_000 } else { 1 });
        let answer =
            reply_to(json!({ "no_backing": { "key": link::absent_key(1000 + n), "reason": reason } }));
        refused += u32::from(answer.contains("refused"));
    }
    assert!((900..5000).contains(&refused), "{refused} of 5000 were refused");
    assert!(
        resident() < before + (24 << 10),
        "resident memory of the supervisor: {before} KiB before, {} KiB after",
        resident()
    );
    // An invalid message costs the server its connection, and nothing else.
    link.send(&"no question", None).unwrap();
    wait_for("another server", || (world.server() != server.pid).then_some(()));
    assert_eq!(world.status()["supervisor_pid"].as_u64().unwrap(), supervisor);
    for page in 0..256 {
        assert_eq!(clone.tell(&format!("read 0 {page}")), u64::from(image(3)[page * 4096]));
    }
    let next = world.import_bytes(&image(5), "web:2");
    assert_eq!(fs::read(world.file(&next, "memory")).unwrap(), image(5));
}

#[test]
fn the_log_reports_a_server_that_dies_of_sigsys() {
    let _host = host::shared();
    let mut world = TestMount::new("decode");
    world.expects_sigsys = true;
    let digest = world.import_bytes(&image(3), "web:1");
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    server.signal(Signal::SYS).unwrap();
    wait_for("SIGSYS in the log", || world.log().contains(SIGSYS).then_some(()));
    assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), image(3));
}

#[test]
fn a_kernel_without_a_sandbox_layer_is_reported_and_served() {
    let _host = host::shared();
    for (feature, words) in
        [("landlock", "the kernel has no Landlock"), ("seccomp", "the kernel has no seccomp")]
    {
        let world = TestMount::unmounted();
        let digest = world.import_bytes(&image(3), "web:1");
        let lacking = |words: &[&str]| {
            let mut command = Command::new(STENCIL);
            attempt::hide(&mut command, feature);
            command.args(words);
            command.env("STENCIL_STORE", world.store_dir()).env("STENCIL_RUNTIME_DIR", world.runtime_dir());
            let output = command.current_dir(world.dir()).output().unwrap();
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
        };
        lacking(&["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"]);
        assert_eq!(fs::read(world.file(&digest, "memory")).unwrap(), image(3));
        assert!(world.log().contains(words), "{}", world.log());
        let status = world.status();
        assert!(status["server_lacks"][0].as_str().unwrap().contains(words), "{status:#}");
        let status = world.stencil(&["status"]).ok().out;
        assert!(status.contains(words), "{status}");
        let doctor = lacking(&["doctor"]);
        assert!(doctor.contains(words), "{doctor}");
        let healthy = world.stencil(&["doctor"]).out;
        assert!(!healthy.contains(words), "{healthy}");
    }
}

#[test]
fn the_list_of_system_calls_is_the_documented_one() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/explanation/security.md"))
        .unwrap();
    let marker = "<!-- test: the_list_of_system_calls_is_the_documented_one -->";
    let table = page.split(marker).nth(1).expect("no table with the marker");
    // "always", "never", or a condition, whose words only the page has.
    let kind = |allowed: &str| match allowed.split(';').next() {
        Some("always") => "always",
        Some("never") => "never",
        _ => "conditional",
    };
    let rows = table.trim_start().lines().take_while(|line| line.starts_with('|')).skip(2);
    let documented: BTreeSet<(String, &str)> = rows
        .map(|row| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            (cells[1].trim_matches('`').to_owned(), kind(cells[2]))
        })
        .collect();
    let allowed: BTreeSet<(String, &str)> = CALLS
        .iter()
        .map(|call| {
            let kind = match call.allowed {
                Allowed::Always => "always",
                Allowed::Unknown => "never",
                Allowed::If(_) | Allowed::OwnProcess(_) => "conditional",
            };
            (call.name.to_owned(), kind)
        })
        .collect();
    assert_eq!(allowed, documented, "allowed (left) and documented (right) system calls differ");
    assert_eq!(
        CALLS.len(),
        COUNT,
        "the number of allowed system calls has changed: update docs/explanation/security.md and this constant"
    );
}
