//! The Debian package of the programs under test, and a minimal Debian 12 to install it in.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use crate::support::mount::{Run, STENCIL, run, temporary};

/// Runs `make` without the environment variables that an outer `make` or `cargo` has set.
pub fn make(words: &[&str]) -> Run {
    let output = Command::new("make")
        .arg("--no-print-directory")
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("CARGO")
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .env_remove("MFLAGS")
        .output()
        .unwrap();
    Run::of(format!("make {}", words.join(" ")), &output)
}

/// The `bin=` argument for `make`: the directory of the programs under test.
pub fn bin() -> String {
    format!("bin={}", Path::new(STENCIL).parent().unwrap().display())
}

/// Returns the path of the package, which is built once.
pub fn package() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        crate::support::mount::daemon();
        let made = make(&["-s", "deb-files", &bin(), "deb_options=--fast"]).ok();
        let path = PathBuf::from(made.out.lines().last().expect("no output of cargo-deb"));
        assert!(path.is_file(), "{}", made.out);
        path
    })
}

/// A Debian 12 from debootstrap with its own root directory, mount namespace and PID namespace. Drop ends its processes
/// and removes it.
pub struct Debian {
    dir: tempfile::TempDir,
    holder: Child,
    /// PID 1 of the namespace, as the host numbers it.
    init: String,
}

impl Debian {
    /// Unpacks a root and starts a process that holds the namespaces.
    pub fn new() -> Debian {
        let tar = Path::new(STENCIL).ancestors().nth(2).unwrap().join("guest/bookworm.tar");
        assert!(tar.is_file(), "missing {}: run make setup", tar.display());
        let dir = temporary("debian-");
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        run("tar", &["-C", root.to_str().unwrap(), "--numeric-owner", "-xpf", tar.to_str().unwrap()]);
        std::fs::write(root.join("dev/fuse"), "").unwrap();
        // The old root is detached at once: the namespace's copies of the host's mounts would keep other scenarios'
        // mounts alive. Like init, PID 1 reaps orphaned processes.
        let script = "cd \"$1\" && mount --bind . . && cd \"$1\" && mount -t proc proc proc && mount -t sysfs sysfs sys \
                      && mount --bind /dev/fuse dev/fuse && pivot_root . . \
                      && umount -l . && cd / && exec sh -c 'trap \"exit 0\" TERM; echo here; while :; do sleep 1 & wait $!; done'";
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL"])
            .args(["sh", "-c", script, "sh"])
            .arg(&root)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "here\n", "cannot create the namespaces of {}", root.display());
        let pid = holder.id();
        let init = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Debian { dir, holder, init: init.trim().to_owned() }
    }

    /// The host's path of a file inside the root.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join("root").join(inside.trim_start_matches('/'))
    }

    /// Runs a shell script inside, for at most 120 s.
    pub fn sh(&self, script: &str) -> Run {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "120", "nsenter", "--target", &self.init]);
        command.args(["--mount", "--pid", "--root", "--wdns=/", "sh", "-c", script]);
        command.env_clear();
        let marks = std::env::vars_os().filter(|(name, _)| name == "STENCIL_TEST_RUN");
        command.envs(marks).envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LC_ALL", "C"),
            ("DEBIAN_FRONTEND", "noninteractive"),
            // A forbidden system call kills the server instead of failing with EPERM.
            ("STENCIL_SECCOMP", "kill"),
        ]);
        Run::of(script.to_owned(), &command.output().unwrap())
    }

    /// Runs a shell script inside, which must exit with 0, and returns its output.
    #[track_caller]
    pub fn out(&self, script: &str) -> String {
        self.sh(script).ok().out
    }

    /// Runs `stencil --json` inside and returns the parsed output.
    #[track_caller]
    pub fn json(&self, words: &str) -> serde_json::Value {
        let out = self.out(&format!("stencil --json {words}"));
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{words}: {e}: {out}"))
    }

    /// Everything in the root: path → type, mode, owner, link target, content. Without the files of [`BOOKKEEPING`].
    pub fn files(&self) -> BTreeMap<String, String> {
        let script = "cd \"$1\" && find . -xdev -printf '%P\\t%y %m %U:%G %l\\n' && \
                      find . -xdev -type f -print0 | sort -z | xargs -0 sha256sum";
        let listed = run("sh", &["-c", script, "sh", self.path("").to_str().unwrap()]);
        let mut files = BTreeMap::new();
        for line in listed.lines() {
            if let Some((path, what)) = line.split_once('\t') {
                files.insert(path.to_owned(), what.to_owned());
            } else {
                let (hash, path) = line.split_once("  ./").unwrap_or_else(|| panic!("{line}"));
                files.entry(path.to_owned()).or_default().push_str(hash);
            }
        }
        files.retain(|path, _| !BOOKKEEPING.iter().any(|file| path.starts_with(file)));
        files
    }
}

/// Files that every installation of a package changes, and every mount.
const BOOKKEEPING: [&str; 6] = [
    "var/lib/dpkg/status",
    "var/lib/dpkg/available",
    "var/lib/dpkg/triggers/",
    "var/log/dpkg.log",
    "var/cache/ldconfig/",
    // mount(8) creates this file for the first option for systemd.
    "run/mount/utab",
];

impl Drop for Debian {
    fn drop(&mut self) {
        // When PID 1 of a namespace ends, the kernel kills all other processes there first: after the wait nothing
        // writes below the directory any more.
        let _ = Command::new("kill").args(["-TERM", &self.init]).status();
        let _ = self.holder.wait();
    }
}
