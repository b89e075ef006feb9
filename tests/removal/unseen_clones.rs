//! Every way to use a template: `rm` finds the user, or refuses, or removes the template without harm for the reason
//! given in the documentation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::daemon::passing::Mounted;
use crate::support::holder::{Holder, hash_of};
use crate::support::host;
use crate::support::mount::{Run, STENCIL, TestMount, run, wait_for};
use crate::support::store::guest_like;

const SIZE: usize = 1 << 20;

/// The name of the template's file.
const FILE: &str = "memory";

/// Rows of the documentation that other scenarios cover or that cannot be tried here.
const ELSEWHERE: &[&str] = &["process that cannot be inspected", "handle of an NFS client"];

/// With passthrough, the ways in which something other than a process may keep the file open.
const BY_PASSTHROUGH: &[&str] = &[
    "mapping",
    "first thread ended, mapping",
    "descriptor",
    "descriptor in flight",
    "mount of the file",
    "loop device below a bind mount",
    "mapping through overlayfs",
    "pages in a pipe, by splice",
    "copy in a memory file",
];

/// The words of `rm` about a user that only the kernel knows.
const NO_PROCESS: &str = "but no process uses the file";

/// The result of `rm` while a template is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rm {
    /// Exit 5: the scan finds the process and reports it.
    Named,
    /// Exit 5: only the kernel knows the user.
    Unnamed,
    /// `rm` removes the template, and the holder still reads the right bytes.
    Removes,
}

use Rm::{Named, Removes, Unnamed};

/// Each way to use a template, and the result of `rm` during that use.
const WAYS: &[(&str, Rm)] = &[
    ("mapping", Named),
    ("shared mapping", Named),
    ("mapping that was moved", Named),
    ("mapping that a child does not inherit", Named),
    ("mapping with a KVM machine", Named),
    ("mapping of a stopped process", Named),
    ("mapping of a traced process", Named),
    ("mapping of another user", Named),
    ("mapping of a process that cannot be dumped", Named),
    ("mapping below another root", Named),
    ("mapping in other namespaces", Named),
    ("first thread ended, mapping", Named),
    ("first thread ended, descriptor", Named),
    ("thread with its own descriptors", Named),
    ("child in the parent's memory", Named),
    ("descriptor", Named),
    ("descriptor without access", Named),
    ("descriptor in flight", Unnamed),
    ("descriptor in an io_uring", Unnamed),
    ("mount of the file", Unnamed),
    ("watch by inotify", Unnamed),
    ("loop device", Named),
    ("loop device below a bind mount", Unnamed),
    ("mapping through overlayfs", Named),
    ("mapping through a detached overlayfs", Named),
    ("file of an overlayfs that no process uses", Unnamed),
    ("pages in a pipe, by splice", Removes),
    ("pages in a pipe, by vmsplice", Removes),
    ("pages pinned by an io_uring", Removes),
    ("copy in a memory file", Removes),
];

/// A use of the template; the fields are dropped in order, the process first.
struct Held {
    holder: Option<Holder>,
    device: Option<Loop>,
    /// A file for this process to open.
    file: Option<PathBuf>,
    mounts: Vec<Mounted>,
}

/// A loop device, detached on drop.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

impl Loop {
    fn of(file: &Path) -> Loop {
        Loop(run("losetup", &["-r", "-f", "--show", file.to_str().unwrap()]).trim().to_owned())
    }
}

impl Held {
    fn by(way: &str, file: &Path, folder: &Path) -> Held {
        let place = |name: &str| {
            let place = folder.join(name);
            fs::create_dir_all(&place).unwrap();
            place
        };
        let overlay = |lower: &Path, at: &str| {
            let (at, empty) = (place(at), place("empty"));
            let options = format!("lowerdir={}:{}", lower.display(), empty.display());
            run("mount", &["-t", "overlay", "overlay", "-o", &options, at.to_str().unwrap()]);
            Mounted(at)
        };
        let mut held = Held { holder: None, device: None, file: None, mounts: Vec::new() };
        let template = file.parent().unwrap();
        match way {
            "loop device" => held.device = Some(Loop::of(file)),
            "loop device below a bind mount" => {
                let at = place("bound");
                run("mount", &["--bind", template.to_str().unwrap(), at.to_str().unwrap()]);
                let bound = Mounted(at);
                held.device = Some(Loop::of(&bound.0.join(FILE)));
            }
            _ if way.contains("overlayfs") => {
                held.mounts.push(overlay(template, "one"));
                held.holder = Some(Holder::start("mapping", &held.mounts[0].0.join(FILE), folder));
                if way.contains("detached") {
                    held.mounts.clear();
                }
                if way.contains("no process uses") {
                    // The exit closes the file; only the reference inside overlayfs remains.
                    held.holder = None;
                    held.file = Some(held.mounts[0].0.join(FILE));
                }
            }
            _ => held.holder = Some(Holder::start(way, file, folder)),
        }
        held
    }

    /// Returns the hash of the bytes that the holder reads, and ends the use.
    fn hash(self) -> Option<u64> {
        match (self.holder, &self.device) {
            (Some(holder), _) => holder.hash(),
            (None, Some(device)) => fs::read(&device.0).ok().map(|bytes| hash_of(&bytes)),
            (None, None) => fs::read(self.file?).ok().map(|bytes| hash_of(&bytes)),
        }
    }
}

fn check_every_holder(serve: &str) {
    let world = TestMount::new(serve);
    let bytes = guest_like(1, SIZE);
    let digest = world.import_bytes(&bytes, "web:1");
    let folder = world.dir().join("holder");
    fs::create_dir_all(&folder).unwrap();
    let mut failures = Vec::new();
    let all = serve == "decode";
    for (way, expected) in WAYS.iter().filter(|(way, _)| all || BY_PASSTHROUGH.contains(way)) {
        world.wait_until_verified(&digest);
        let held = Held::by(way, &world.file(&digest, FILE), &folder);
        let rm = world.stencil(&["rm", "web:1"]);
        let matches = match expected {
            Named => rm.code == 5 && !rm.err.contains(NO_PROCESS),
            Unnamed => rm.code == 5 && rm.err.contains(NO_PROCESS),
            Removes => rm.code == 0,
        };
        if !matches {
            failures.push(format!("{way}: rm exits with {}: {}", rm.code, rm.err));
        }
        if held.hash() != Some(hash_of(&bytes)) {
            failures.push(format!("{way}: the holder reads wrong bytes"));
        }
        // The use has ended, but the kernel may close the last file a moment later.
        let lingers = rm.code != 0 && (*expected == Unnamed || way.contains("overlayfs"));
        if lingers {
            wait_for(way, || (world.stencil(&["rm", "web:1"]).code == 0).then_some(()));
        }
        if rm.code == 0 || lingers {
            assert_eq!(world.import_bytes(&bytes, "web:1"), digest);
        }
    }
    assert!(failures.is_empty(), "{serve}:\n{}", failures.join("\n"));
}

/// Runs `stencil` by another program and returns its result.
fn run_by(world: &TestMount, program: &str, words: &[&str], ours: &[&str]) -> Run {
    let mut command = world.command_in(program);
    command.args(words).arg(STENCIL).args(ours);
    Run::of(format!("{program} {} {}", words.join(" "), ours.join(" ")), &command.output().unwrap())
}

/// Root in a user namespace has all capabilities, but none of them applies to processes outside.
#[test]
fn rm_refuses_without_the_right_to_inspect_all_processes() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = guest_like(1, SIZE);
    let digest = world.import_bytes(&bytes, "web:1");
    let holder = Holder::start("mapping of another user", &world.file(&digest, FILE), world.dir());
    let user_namespace = ["--user", "--map-root-user"];
    run_by(&world, "unshare", &user_namespace, &["rm", "web:1"])
        .exits(75)
        .says("a user namespace other than the host's");
    let pid_namespace = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    run_by(&world, "unshare", &pid_namespace, &["rm", "web:1"])
        .exits(75)
        .says("a PID namespace other than the host's");
    // Templates without a tag have the same protection.
    fs::remove_file(world.store_dir().join("tags/web/1")).unwrap();
    let gc = run_by(&world, "unshare", &user_namespace, &["gc", "--untagged"]);
    assert!(gc.code != 0 || gc.out.contains("kept") || gc.err.contains("namespace"), "{gc:?}");
    assert!(world.store_dir().join("images").join(&digest).exists());
    world.stencil(&["tag", &digest, "web:1"]).ok();
    // Root without the needed capabilities: every process with more capabilities is reported.
    let less = "=-sys_ptrace,-perfmon,-sys_admin";
    let no_trace = [&*format!("--bounding-set{less}"), &*format!("--inh-caps{less}")];
    for ours in [&["rm", "web:1"][..], &["density"]] {
        let run = run_by(&world, "setpriv", &no_trace, ours).exits(75);
        assert!(run.err.contains("no permission to inspect processes that may be clones: "), "{run:?}");
    }
    let ps = run_by(&world, "setpriv", &no_trace, &["--json", "ps"]).ok();
    let listed: serde_json::Value = serde_json::from_str(&ps.out).unwrap();
    let unseen = listed["unseen"].as_array().unwrap();
    assert!(unseen.contains(&std::process::id().into()), "{listed}");
    assert_eq!(holder.hash(), Some(hash_of(&bytes)));
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    // Without a mount no process can use the template.
    run_by(&world, "unshare", &user_namespace, &["rm", "web:1"]).ok();
}

#[test]
fn every_holder_of_a_template_keeps_its_bytes_by_decode() {
    let _host = host::shared();
    check_every_holder("decode");
}

#[test]
fn every_holder_of_a_template_keeps_its_bytes_by_passthrough() {
    let _host = host::shared();
    check_every_holder("passthrough");
}

#[test]
fn every_holder_of_a_template_keeps_its_bytes_by_kernel_decode() {
    let _host = host::shared();
    check_every_holder("kernel");
}

#[test]
fn the_documented_ways_to_use_a_template_are_all_tested() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/explanation/removal.md"))
        .unwrap();
    let table = text.split_once("| held by | `rm` |").expect("no table of ways").1;
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.split('|').map(str::trim).skip(1).collect::<Vec<_>>());
    let documented: BTreeSet<(&str, &str, bool)> = cells
        .filter(|cells| !ELSEWHERE.contains(&cells[0]))
        .map(|cells| (cells[0], cells[1], cells[2].starts_with("kernel: ")))
        .collect();
    let answer = |rm: Rm| if rm == Removes { "removed" } else { "exit 5" };
    let tried: BTreeSet<(&str, &str, bool)> =
        WAYS.iter().map(|(way, rm)| (*way, answer(*rm), *rm == Unnamed)).collect();
    assert_eq!(documented, tried);
    assert!(ELSEWHERE.iter().all(|way| table.contains(&format!("| {way} |"))));
    assert!(BY_PASSTHROUGH.iter().all(|way| WAYS.iter().any(|(other, _)| other == way)));
}

/// Counting, listing and the refusal of `umount` do not depend on the thread that has the mapping.
#[test]
fn every_command_sees_a_clone_whose_first_thread_has_exited() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = guest_like(1, SIZE);
    let digest = world.import_bytes(&bytes, "web:1");
    let holder = Holder::start("first thread ended, mapping", &world.file(&digest, FILE), world.dir());
    let pid = holder.pid();
    let density = world.json(&["density"]);
    let clone = &density["clones"][0];
    assert_eq!(clone["pid"], pid, "{density:#}");
    assert_eq!((&clone["mapped_bytes"], &clone["dirty_pages"]), (&(SIZE as u64).into(), &1.into()));
    assert!(clone["page_table_bytes"].as_u64() > Some(0) && clone["overhead_bytes"].as_u64() > Some(0));
    assert_eq!(world.json(&["ps"])["clones"][0]["pid"], pid);
    let status = world.status();
    assert_eq!(status["templates"][0]["clones"], 1, "{status:#}");
    let dirty = world.json(&["dirty", &pid.to_string()]);
    assert_eq!(dirty["dirty_pages"], 1, "{dirty:#}");
    let refused = world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).exits(5);
    assert!(refused.err.contains(&format!("{pid} (")), "{refused:?}");
    assert_eq!(holder.hash(), Some(hash_of(&bytes)));
    // A clone whose maps show another file system.
    let held = Held::by("mapping through overlayfs", &world.file(&digest, FILE), world.dir());
    let density = world.json(&["density", "--audit"]);
    assert_eq!(density["totals"]["clones"], 1, "{density:#}");
    assert_eq!(density["clones"][0]["mapped_bytes"], SIZE as u64);
    assert_eq!(density["audit"]["frames"]["unknown_processes"], 0, "{density:#}");
    assert_eq!(held.hash(), Some(hash_of(&bytes)));
}
