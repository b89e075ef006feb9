//! A hostile store of another user: each of its files and directories is replaced by something else. No command of root
//! touches anything outside the store, blocks, or ends without a documented exit code.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, makedev, mknodat};

use crate::support::host;
use crate::support::mount::{TestMount, temporary};
use crate::support::store::{random, stencil};

/// The store's owner.
const OWNER: u32 = 1234;

/// The time limit for a command.
const MAX_TIME: Duration = Duration::from_secs(5);

/// The documented exit codes.
const CODES: [i32; 8] = [0, 1, 2, 3, 4, 5, 6, 75];

/// The replacement for a file or directory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// A link to the original, moved out of the store.
    Link,
    DanglingLink,
    HardLink,
    Fifo,
    Socket,
    Zero,
    Folder,
    Empty,
    Endless,
}

const KINDS: [Kind; 9] = [
    Kind::Link,
    Kind::DanglingLink,
    Kind::HardLink,
    Kind::Fifo,
    Kind::Socket,
    Kind::Zero,
    Kind::Folder,
    Kind::Empty,
    Kind::Endless,
];

/// Commands that root runs. `SOURCE`, `STREAM` and `OUT` are files beside the store.
const COMMANDS: [&str; 21] = [
    "import SOURCE new:1",
    "import SOURCE web:1",
    "load -i STREAM",
    "tag web:1 web:2",
    "tag other:1 web:1",
    "chmod 0400 web:1",
    "chown 7:7 web:1",
    "gc",
    "gc --untagged",
    "gc --dry-run",
    "rm web:1",
    "rm other:1",
    "ls",
    "inspect web:1",
    "du",
    "verify",
    "verify web:1",
    "export --force web:1 OUT",
    "save --force web:1 -o OUT",
    "recipe web:1",
    "density",
];

/// A store with two templates, one tag each, all lock files, and the leftovers of a killed command.
struct Sample {
    dir: tempfile::TempDir,
    /// The paths in the store to replace, one at a time.
    entries: Vec<PathBuf>,
}

impl Sample {
    fn new() -> Sample {
        let dir = temporary("hostile-");
        let run = |words: &[&str]| {
            let output = stencil(dir.path(), words).current_dir(dir.path()).output().unwrap();
            assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let bytes = random(1, 200 << 10);
        fs::write(dir.path().join("source"), &bytes).unwrap();
        fs::write(dir.path().join("other"), &bytes[64 << 10..]).unwrap();
        run(&["import", "source", "web:1"]);
        run(&["import", "other", "other:1"]);
        run(&["gc"]);
        run(&["save", "web:1", "-o", "stream"]);
        let store = dir.path().join("store");
        let entries = below(&store);
        let digest = stencilfs::store::Store::open(&store).unwrap().tag(&"web:1".parse().unwrap()).unwrap();
        let ours = digest.unwrap().to_string();
        fs::create_dir_all(store.join("tmp/dead/deep")).unwrap();
        fs::write(store.join("tmp/dead/deep/file"), "left").unwrap();
        let mut entries: Vec<PathBuf> = entries
            .into_iter()
            .map(|path| path.strip_prefix(&store).unwrap().to_owned())
            .filter(|path| !path.starts_with("images") || path.iter().nth(1).is_none_or(|d| *d == *ours))
            .filter(|path| !path.starts_with("tags/other"))
            .collect();
        entries.push("tmp/dead".into());
        entries.sort();
        assert!(entries.len() >= 15, "{entries:?}");
        Sample { dir, entries }
    }

    /// Copies the store to `dir` for another user, replaces `entry`, and creates a directory beside the store that must
    /// not be touched.
    fn replaced(&self, dir: &Path, entry: &Path, kind: Kind) {
        copy(&self.dir.path().join("store"), &dir.join("store"));
        fs::create_dir_all(dir.join("outside/dead")).unwrap();
        fs::write(dir.join("outside/dead/file"), "kept").unwrap();
        fs::write(dir.join("outside/file"), "kept").unwrap();
        kind.plant(&dir.join("store").join(entry), &dir.join("outside"));
    }
}

impl Kind {
    fn plant(self, path: &Path, outside: &Path) {
        let moved = outside.join("moved");
        fs::rename(path, &moved).unwrap();
        if self != Kind::Link {
            if moved.is_dir() { fs::remove_dir_all(&moved) } else { fs::remove_file(&moved) }.unwrap();
        }
        let node = |kind, device| mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, device).unwrap();
        match self {
            Kind::Link => symlink(&moved, path).unwrap(),
            Kind::DanglingLink => symlink(outside.join("none"), path).unwrap(),
            Kind::HardLink => return fs::hard_link(outside.join("file"), path).unwrap(),
            Kind::Fifo => node(FileType::Fifo, 0),
            Kind::Socket => node(FileType::Socket, 0),
            Kind::Zero => node(FileType::CharacterDevice, makedev(1, 5)),
            Kind::Folder => fs::create_dir(path).unwrap(),
            Kind::Empty => drop(File::create(path).unwrap()),
            Kind::Endless => File::create(path).unwrap().set_len(1 << 40).unwrap(),
        }
        lchown(path, Some(OWNER), Some(OWNER)).unwrap();
    }
}

/// Returns all files and directories below a directory.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

/// Copies a directory and makes the store's owner its owner.
fn copy(from: &Path, to: &Path) {
    match from.is_dir() {
        true => {
            fs::create_dir(to).unwrap();
            fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                copy(&entry.path(), &to.join(entry.file_name()));
            }
        }
        false => drop(fs::copy(from, to).unwrap()),
    }
    lchown(to, Some(OWNER), Some(OWNER)).unwrap();
}

/// Returns all properties of a directory's files that a command could change. A command may unlink a hard link of the
/// store to a file outside: without `link_count_matters` link counts and ctime are ignored.
fn state(folder: &Path, link_count_matters: bool) -> BTreeMap<PathBuf, String> {
    let mut paths = below(folder);
    paths.push(folder.to_owned());
    let of = |path: PathBuf| {
        let meta = fs::symlink_metadata(&path).unwrap();
        let names = if link_count_matters { meta.nlink() } else { 0 };
        let changed = if link_count_matters { (meta.ctime(), meta.ctime_nsec()) } else { (0, 0) };
        let bytes =
            if meta.is_file() && meta.len() < 1 << 30 { fs::read(&path).unwrap() } else { Vec::new() };
        let what = format!(
            "inode {} mode {:o} owner {}:{} names {names} length {} modified {}.{} changed {changed:?} {}",
            meta.ino(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            blake3::hash(&bytes)
        );
        (path, what)
    };
    paths.into_iter().map(of).collect()
}

/// Runs a command for at most [`MAX_TIME`]. Returns its exit code and standard error.
fn limited(mut command: Command, dir: &Path) -> Result<(i32, String), String> {
    let err = dir.join("stderr");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&err).unwrap());
    let mut child = command.spawn().unwrap();
    let until = Instant::now() + MAX_TIME;
    let said = || fs::read_to_string(&err).unwrap_or_default();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return match status.code() {
                Some(code) if CODES.contains(&code) => Ok((code, said())),
                _ => Err(format!("{status}: {}", said())),
            };
        }
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("the command takes more than {MAX_TIME:?}: {}", said()));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs one command on a store with one replaced entry. Returns all violations.
fn attempt(sample: &Sample, entry: &Path, kind: Kind, words: &str) -> Vec<String> {
    let dir = temporary("hostile-one-");
    sample.replaced(dir.path(), entry, kind);
    let outside = dir.path().join("outside");
    let link_count_matters = kind != Kind::HardLink;
    let before = state(&outside, link_count_matters);
    let words: Vec<String> = words
        .split(' ')
        .map(|word| match word {
            "SOURCE" => sample.dir.path().join("source").to_str().unwrap().to_owned(),
            "STREAM" => sample.dir.path().join("stream").to_str().unwrap().to_owned(),
            "OUT" => dir.path().join("out").to_str().unwrap().to_owned(),
            word => word.to_owned(),
        })
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut violations = Vec::new();
    let mut note =
        |what: String| violations.push(format!("{} as {kind:?}: {words:?}: {what}", entry.display()));
    if let Err(what) = limited(stencil(dir.path(), &words), dir.path()) {
        note(what);
    }
    let after = state(&outside, link_count_matters);
    for (path, now) in &after {
        match before.get(path) {
            Some(was) if was == now => {}
            was => note(format!("{} was {was:?}, is {now}", path.display())),
        }
    }
    before.keys().filter(|path| !after.contains_key(*path)).for_each(|path| {
        note(format!("{} was removed", path.display()));
    });
    for path in below(&dir.path().join("store")) {
        let meta = fs::symlink_metadata(&path).unwrap();
        let planted = kind == Kind::HardLink && meta.nlink() > 1;
        if meta.uid() != OWNER && !planted {
            note(format!("{} belongs to user {}", path.display(), meta.uid()));
        }
    }
    violations
}

/// Runs all cases in parallel; panics if there are violations.
fn on_all_cores<T: Sync>(cases: &[T], act: impl Fn(&T) -> Vec<String> + Sync) {
    let (next, violations) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let _host = host::shared();
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = act(case);
                    violations.lock().unwrap().extend(found);
                }
            });
        }
    });
    let violations = violations.into_inner().unwrap();
    assert!(
        violations.is_empty(),
        "{} violations in {} cases: {:#?}",
        violations.len(),
        cases.len(),
        &violations[..violations.len().min(40)]
    );
}

#[test]
fn soak_root_commands_on_a_hostile_store_stay_inside_and_end() {
    let sample = Sample::new();
    let mut cases = Vec::new();
    for entry in &sample.entries {
        for kind in KINDS {
            cases.extend(COMMANDS.map(|words| (entry.clone(), kind, words)));
        }
    }
    // The step has no common factor with the lengths of the lists: each command is combined with each entry and each
    // kind.
    let step = host::rounds(11, 1);
    assert!(step == 1 || cases.len() % step != 0, "{} cases", cases.len());
    let harmful = |entry: &Path, kind| {
        matches!(entry.to_str(), Some("tmp" | "tags/web" | "locks/names" | "tags/web/1"))
            && matches!(kind, Kind::Link | Kind::DanglingLink)
    };
    let taken: Vec<_> = (0..)
        .zip(&cases)
        .filter(|(number, (entry, kind, words))| {
            number % step == 0 || (harmful(entry, *kind) && COMMANDS[..11].contains(words))
        })
        .map(|(_, case)| case)
        .collect();
    on_all_cores(&taken, |(entry, kind, words)| attempt(&sample, entry, *kind, words));
}

/// Mounts a hostile store and reads a template; the entry is replaced before the mount or while the store is mounted.
fn mounted(sample: &Sample, entry: &Path, kind: Kind, before_mount: bool) -> Vec<String> {
    let world = TestMount::unmounted();
    let dir = world.dir().to_owned();
    fs::remove_dir_all(world.store_dir()).unwrap();
    world.open_to_others();
    let mut violations = Vec::new();
    let mut run = |words: &[&str]| {
        let mut command = world.command();
        command.args(words);
        match limited(command, &dir) {
            Ok((code, _)) => code,
            Err(what) => {
                violations.push(format!(
                    "{} as {kind:?}, before the mount: {before_mount}: {words:?}: {what}",
                    entry.display()
                ));
                -1
            }
        }
    };
    let mountpoint = world.mountpoint().to_str().unwrap();
    let mount = ["mount", mountpoint, "--serve", "decode"];
    if before_mount {
        sample.replaced(&dir, entry, kind);
        run(&mount);
    } else {
        copy(&sample.dir.path().join("store"), &world.store_dir());
        assert_eq!(run(&mount), 0);
        fs::rename(world.store_dir(), dir.join("whole")).unwrap();
        sample.replaced(&dir, entry, kind);
        fs::remove_dir_all(dir.join("whole")).unwrap();
    }
    let before = state(&dir.join("outside"), kind != Kind::HardLink);
    let file = world.mountpoint().join("templates/web/1/memory");
    let mut read = Command::new("cat");
    read.arg(&file);
    let read = limited(read, &dir);
    run(&["clone", "web:1", "--simulate", "read=10%,write=1p"]);
    run(&["status"]);
    run(&["density"]);
    run(&["stop", "--all"]);
    run(&["rm", "web:1"]);
    run(&["umount", mountpoint]);
    let after = state(&dir.join("outside"), kind != Kind::HardLink);
    if before != after {
        violations.push(format!(
            "{} as {kind:?}: the directory outside was {before:#?}, is {after:#?}",
            entry.display()
        ));
    }
    if let Err(what) = read {
        violations.push(format!(
            "{} as {kind:?}, before the mount: {before_mount}: a read: {what}",
            entry.display()
        ));
    }
    violations
}

#[test]
fn soak_a_mount_of_a_hostile_store_blocks_no_command() {
    let sample = Sample::new();
    let mut cases = Vec::new();
    for entry in &sample.entries {
        for kind in KINDS {
            cases.extend([true, false].map(|before_mount| (entry.clone(), kind, before_mount)));
        }
    }
    let step = host::rounds(61, 1);
    let taken: Vec<_> = cases.iter().step_by(step).collect();
    on_all_cores(&taken, |(entry, kind, before_mount)| mounted(&sample, entry, *kind, *before_mount));
}

#[test]
fn a_new_store_follows_no_links_and_has_its_parents_owner() {
    let dir = temporary("hostile-new-");
    let (home, outside) = (dir.path().join("home"), dir.path().join("outside"));
    fs::create_dir(&home).unwrap();
    fs::create_dir(&outside).unwrap();
    lchown(&home, Some(OWNER), Some(OWNER)).unwrap();
    let source = dir.path().join("source");
    fs::write(&source, random(2, 100 << 10)).unwrap();
    let import = |store: &str| {
        let words = ["import", source.to_str().unwrap(), "web:1", "--store", store];
        let mut command = stencil(dir.path(), &words);
        command.env_remove("STENCIL_STORE").current_dir(&home);
        limited(command, dir.path()).unwrap()
    };
    // A missing directory with missing parents: by a relative path, and by a link that root follows deliberately.
    symlink(&home, dir.path().join("way")).unwrap();
    for store in ["a/b/store", dir.path().join("way/c").to_str().unwrap()] {
        let (code, said) = import(store);
        assert_eq!(code, 0, "{said}");
    }
    assert!(home.join("a/b/store/format").is_file() && home.join("c/format").is_file());
    // A directory of a user that contains only a link.
    for name in ["images", "packs", "tags", "tmp", "locks"] {
        let store = home.join(format!("with-{name}"));
        fs::create_dir(&store).unwrap();
        symlink(&outside, store.join(name)).unwrap();
        lchown(&store, Some(OWNER), Some(OWNER)).unwrap();
        let (code, said) = import(store.to_str().unwrap());
        assert_eq!(code, 3, "{name}: {said}");
        assert!(said.contains(name), "{said}");
    }
    assert_eq!(below(&outside), Vec::<PathBuf>::new());
    let mine = fs::metadata(home.join("c")).unwrap();
    for path in below(&home.join("c")) {
        let its = fs::symlink_metadata(&path).unwrap();
        assert_eq!((its.uid(), its.gid()), (mine.uid(), mine.gid()), "{}", path.display());
        let mode = if its.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(its.mode() & 0o7777, mode, "{}", path.display());
        assert!(!its.file_type().is_symlink() && !its.file_type().is_fifo());
    }
}

#[test]
fn a_wait_for_a_held_lock_ends_by_timeout_or_signal() {
    let sample = Sample::new();
    let dir = temporary("hostile-lock-");
    copy(&sample.dir.path().join("store"), &dir.path().join("store"));
    let held = File::open(dir.path().join("store/locks/names")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let spawn = |words: &[&str]| {
        stencil(dir.path(), words)
            .current_dir(sample.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let waits = spawn(&["tag", "web:1", "web:2"]);
    for words in [&["import", "source", "new:1"][..], &["gc"], &["load", "-i", "stream"]] {
        let child = spawn(words);
        // A command waits for the lock after it has opened the lock file.
        let opened = |pid: u32| {
            let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            links.filter_map(|link| fs::read_link(link.path()).ok()).any(|to| to.ends_with("locks/names"))
        };
        crate::support::mount::wait_for("the lock to be opened", || opened(child.id()).then_some(()));
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.contains("interrupted"), "{words:?}: {said}");
    }
    let output = waits.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
}
