//! A shell session of a reader: a bash with a fresh home directory, in a mount namespace in which the system
//! directories that the pages name (`/var/lib/stencil`, `/run/stencil`, `/srv`, `/mnt`, `/etc`) belong to this session.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::mount::{STENCIL, daemon, temporary, without_others};

/// Time limit for one command.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Environment variable that marks the processes of a session.
const MARK: &str = "STENCIL_TEST_SESSION";

/// Sets up the namespace. Overlays keep changes of system directories in a tmpfs; stores lie on a real file system,
/// because passthrough refuses overlayfs.
const NAMESPACE: &str = r#"
cd "$1"
mount -t tmpfs -o mode=755 none scratch
for dir in /etc /var/lib /usr/sbin /usr/local; do
    mkdir -p "scratch$dir/upper" "scratch$dir/work"
    mount -t overlay overlay -o "lowerdir=$dir,upperdir=$1/scratch$dir/upper,workdir=$1/scratch$dir/work" "$dir"
done
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/stencil /var/lib/stencil
mount --bind store /var/lib/stencil
mount --bind mnt /mnt
mount --bind srv /srv
ln -sf "$2" /usr/sbin/mount.fuse.stencil
echo ready
exec cat
"#;

/// Runs the files whose names come on standard input, one after the other, in one shell; prints their exit codes.
const LOOP: &str = r#"
__code=0
while read -r __file; do
    (exit $__code)
    . "$__file" >"$__file.out" 2>&1 </dev/null
    __code=$?
    echo $__code
done
"#;

/// Output and exit code of a command.
pub struct Outcome {
    /// Standard output and standard error, with the reader's paths.
    pub text: String,
    /// Exit code.
    pub code: i32,
}

/// One reader's session. Dropping the value ends the session, with all processes and mounts of the session.
pub struct Session {
    dir: tempfile::TempDir,
    /// Keeps the namespace; ends when its standard input is closed.
    holder: Child,
    shell: Child,
    input: ChildStdin,
    codes: Receiver<i32>,
    count: usize,
}

impl Session {
    /// Starts a session.
    pub fn start() -> Session {
        daemon();
        let dir = temporary("page-");
        for name in ["scratch", "store", "mnt", "srv", "home", "tmp", "commands", "bin"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let script = format!("set -e; {}; {NAMESPACE}", without_others(dir.path()));
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", &script, "bash"])
            .arg(dir.path())
            .arg(STENCIL)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .env(MARK, dir.path())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "namespace of {}", dir.path().display());
        let mut shell = inside(dir.path(), &holder)
            .args(["bash", "--noprofile", "--norc", "-c", LOOP])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, codes) = channel();
        let answers = BufReader::new(shell.stdout.take().unwrap());
        std::thread::spawn(move || {
            for code in answers.lines().map_while(Result::ok) {
                let _ = sender.send(code.parse().unwrap_or(-1));
            }
        });
        let input = shell.stdin.take().unwrap();
        Session { dir, holder, shell, input, codes, count: 0 }
    }

    /// The home and working directory.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// The directory of programs that come first in PATH.
    pub fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    /// The directory that the session has at `/var/lib/stencil`.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Runs a command as if the reader typed it.
    pub fn run(&mut self, command: &str) -> Result<Outcome, String> {
        self.count += 1;
        let file = self.dir.path().join(format!("commands/{}", self.count));
        fs::write(&file, format!("{command}\n")).unwrap();
        writeln!(self.input, "{}", file.display()).map_err(|e| format!("the session has ended: {e}"))?;
        let code = self.codes.recv_timeout(TIMEOUT);
        let text = fs::read(file.with_extension("out")).unwrap_or_default();
        let text = self.as_the_reader_sees(&String::from_utf8_lossy(&text), &file);
        match code {
            Ok(code) => Ok(Outcome { text, code }),
            Err(_) => Err(format!(
                "no end within {} s, or 'exit' in the page; output so far:\n{text}",
                TIMEOUT.as_secs()
            )),
        }
    }

    /// Replaces the paths of the home and the temporary directory by those of a reader, and the name of the shell's
    /// file by that of an interactive shell.
    fn as_the_reader_sees(&self, text: &str, file: &Path) -> String {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let shell = format!("{}: line ", file.display());
        let line = |line: &str| match line.strip_prefix(&shell).and_then(|rest| rest.split_once(": ")) {
            Some((_, message)) => format!("bash: {message}\n"),
            None => format!("{line}\n"),
        };
        let ours = marked(self.dir.path());
        text.lines()
            .filter(|line| !warns_of_a_stranger(line, &ours))
            .map(line)
            .collect::<String>()
            .replace(&path("home"), "/root")
            .replace(&path("tmp"), "/tmp")
    }

    /// Clones, mounts and processes that the session has not ended. Waits a moment for those that are ending.
    pub fn leftovers(&mut self) -> Vec<String> {
        let script = "env -u STENCIL_STORE stencil -q ps --ids; awk '$3 == \"fuse.stencil\" { print $2 }' /proc/self/mounts";
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let listed = self.run(script).map_or_else(|e| e, |outcome| outcome.text);
            let ours = [self.holder.id(), self.shell.id()];
            let processes = marked(self.dir.path()).into_iter().filter(|pid| !ours.contains(pid));
            let commands = processes.map(|pid| {
                fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
            });
            let commands = commands.filter(|text| !text.is_empty());
            let left: Vec<String> = listed.lines().map(str::to_owned).chain(commands).collect();
            if left.is_empty() || Instant::now() > end {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// True for a warning that names a process outside of this session, such as `4711 (name)`: it is a process of another
/// scenario that could not be inspected.
fn warns_of_a_stranger(line: &str, ours: &[u32]) -> bool {
    let words: Vec<&str> = line.split(' ').collect();
    let mut pairs = words.windows(2).filter(|pair| pair[1].starts_with('('));
    (line.starts_with("[WARN") || line.starts_with("warning"))
        && pairs.any(|pair| pair[0].parse().is_ok_and(|pid: u32| !ours.contains(&pid)))
}

/// A command in the namespace, with the environment of the reader.
fn inside(dir: &Path, holder: &Child) -> Command {
    let home = dir.join("home");
    let old = std::env::var("PATH").unwrap();
    let programs = Path::new(STENCIL).parent().unwrap();
    let rust = |name: &str, default: &str| {
        std::env::var(name)
            .unwrap_or_else(|_| format!("{}/{default}", std::env::var("HOME").unwrap_or_default()))
    };
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &holder.id().to_string(), "--mount"])
        .arg(format!("--wdns={}", home.display()))
        .env("HOME", &home)
        .env("TMPDIR", dir.join("tmp"))
        .env("PATH", format!("{}:{}:{old}", dir.join("bin").display(), programs.display()))
        .env("STENCIL_RUNTIME_DIR", "/run/stencil")
        .env("STENCIL_SECCOMP", "kill")
        .env("RUSTUP_HOME", rust("RUSTUP_HOME", ".rustup"))
        .env("CARGO_HOME", rust("CARGO_HOME", ".cargo"))
        .env("LC_ALL", "C.UTF-8")
        .env("COLUMNS", "100")
        .env(MARK, dir);
    for name in ["STENCIL_STORE", "STENCIL_LOG", "STENCIL_MOUNTD", "NO_COLOR", "EDITOR", "VISUAL"] {
        command.env_remove(name);
    }
    command
}

/// The processes that bear the mark of a session.
fn marked(dir: &Path) -> Vec<u32> {
    let mark = format!("{MARK}={}", dir.display());
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|b| *b == 0).any(|word| word == mark.as_bytes())
    })
    .collect()
}

impl Drop for Session {
    fn drop(&mut self) {
        let script = "env -u STENCIL_STORE stencil -q stop --all; awk '$3 == \"fuse.stencil\" { print $2 }' /proc/self/mounts | \
                      while read -r place; do stencil -q umount --force \"$place\" || umount -l \"$place\"; done";
        let _ = inside(self.dir.path(), &self.holder)
            .args(["bash", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let left: Vec<u32> =
                marked(self.dir.path()).into_iter().filter(|pid| *pid != self.holder.id()).collect();
            if left.is_empty() || Instant::now() > end {
                break;
            }
            for pid in left {
                let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
            }
            let _ = self.shell.try_wait();
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.shell.wait();
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
