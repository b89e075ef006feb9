//! The Debian package of the programs under test, and a clean Debian 12 to install it in.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use super::mount::{Run, STENCIL, run, temporary};

/// A call of `make` without what an outer `make` or `cargo` has put into the environment.
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

/// The folder of the programs under test, as `make` takes it.
pub fn bin() -> String {
    format!("bin={}", Path::new(STENCIL).parent().unwrap().display())
}

/// The package, made once.
pub fn package() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        super::mount::daemon();
        let made = make(&["-s", "deb-files", &bin(), "deb_options=--fast"]).ok();
        let path = PathBuf::from(made.out.lines().last().expect("cargo-deb names the package"));
        assert!(path.is_file(), "{}", made.out);
        path
    })
}

/// A Debian 12 as debootstrap makes it, with mounts, processes and root folder of its own. Dropped, all of it ends.
pub struct Debian {
    dir: tempfile::TempDir,
    holder: Child,
    /// The first process of its own, as this host numbers it.
    init: String,
}

impl Debian {
    /// Unpacks one, and starts a process that holds its namespaces.
    pub fn new() -> Debian {
        let tar = Path::new(STENCIL).ancestors().nth(2).unwrap().join("guest/bookworm.tar");
        assert!(tar.is_file(), "{} is missing: run make setup", tar.display());
        let dir = temporary("debian-");
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        run("tar", &["-C", root.to_str().unwrap(), "--numeric-owner", "-xpf", tar.to_str().unwrap()]);
        std::fs::write(root.join("dev/fuse"), "").unwrap();
        // A copy of this host's mounts would hold those of other scenarios: the old root goes at once. The first process
        // reaps what loses its parent, as that of a system does.
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
        assert_eq!(line, "here\n", "the namespaces of {}", root.display());
        let pid = holder.id();
        let init = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Debian { dir, holder, init: init.trim().to_owned() }
    }

    /// A path of the root, as this host sees it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join("root").join(inside.trim_start_matches('/'))
    }

    /// Runs a shell's words in it; ended after two minutes.
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
            // A forbidden system call of a server is not refused here: it ends the server.
            ("STENCIL_SECCOMP", "kill"),
        ]);
        Run::of(script.to_owned(), &command.output().unwrap())
    }

    /// Runs a shell's words in it, which must exit with 0, and gives its output.
    #[track_caller]
    pub fn out(&self, script: &str) -> String {
        self.sh(script).ok().out
    }

    /// Runs `stencil --json` in it.
    #[track_caller]
    pub fn json(&self, words: &str) -> serde_json::Value {
        let out = self.out(&format!("stencil --json {words}"));
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{words}: {e}: {out}"))
    }

    /// Everything on its disk: path → type, mode, owner, target, content. Without what dpkg itself keeps books in.
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
        files.retain(|path, _| !BOOKS.iter().any(|book| path.starts_with(book)));
        files
    }
}

/// What any installation of any package changes, and any mount.
const BOOKS: [&str; 6] = [
    "var/lib/dpkg/status",
    "var/lib/dpkg/available",
    "var/lib/dpkg/triggers/",
    "var/log/dpkg.log",
    "var/cache/ldconfig/",
    // Of mount(8), which has one from its first option of systemd on.
    "run/mount/utab",
];

impl Drop for Debian {
    fn drop(&mut self) {
        // The first process of a namespace takes all others with it, and is gone after them: nobody writes below the
        // folder any more when that is removed.
        let _ = Command::new("kill").args(["-TERM", &self.init]).status();
        let _ = self.holder.wait();
    }
}
