//! Two hosts on one machine: each has its own network, its own mounts, its own store and runtime directory. They reach
//! each other by links that can be cut, and the second one by ssh.
//!
//! Nothing of it has a name on the machine itself: networks and mounts end with the processes in them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::mount::{Run, STENCIL, daemon, run, temporary, wait_for, without_others};

/// One of the two.
pub struct Host {
    dir: PathBuf,
    /// Lives for as long as its standard input is open, and keeps the namespaces.
    holder: Child,
}

impl Host {
    fn new(dir: PathBuf) -> Host {
        fs::create_dir_all(dir.join("mnt")).unwrap();
        let others = without_others(&dir);
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("{others}; ip link set lo up && echo ready && exec cat"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Host { dir, holder }
    }

    /// A program on this host.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder.id().to_string(), "--net", "--mount", "--", program])
            .env("STENCIL_STORE", self.store())
            .env("STENCIL_RUNTIME_DIR", self.dir.join("run"))
            .env_remove("STENCIL_LOG")
            .env_remove("STENCIL_MOUNTD");
        command
    }

    /// Runs `stencil` here.
    pub fn stencil(&self, words: &[&str]) -> Run {
        let output = self.command(STENCIL).args(words).output().unwrap();
        Run::of(words.join(" "), &output)
    }

    /// Runs `stencil --json` here, which must exit with 0.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let run = self.stencil(&[&["--json"], words].concat()).ok();
        serde_json::from_str(&run.out).unwrap_or_else(|e| panic!("{words:?}: {e}: {}", run.out))
    }

    /// Its store's folder.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// A path of its own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where it mounts its store.
    pub fn mountpoint(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    #[track_caller]
    fn run(&self, words: &[&str]) {
        let output = self.command(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Both, and what lies between them.
pub struct Hosts {
    pub here: Host,
    pub there: Host,
    server: Child,
    dir: tempfile::TempDir,
}

impl Hosts {
    /// Two hosts with so many links between them.
    pub fn new(links: usize) -> Hosts {
        daemon();
        let dir = temporary("hosts-");
        let (here, there) = (Host::new(dir.path().join("here")), Host::new(dir.path().join("there")));
        for link in 0..links {
            let (ours, theirs) = (format!("a{link}"), format!("b{link}"));
            let pid = there.holder.id().to_string();
            here.run(&["ip", "link", "add", &ours, "type", "veth", "peer", "name", &theirs, "netns", &pid]);
            for (host, name, end) in [(&here, &ours, 1), (&there, &theirs, 2)] {
                host.run(&["ip", "address", "add", &format!("10.77.{link}.{end}/24"), "dev", name]);
                host.run(&["ip", "link", "set", name, "up"]);
            }
        }
        let server = serve_ssh(&there, dir.path());
        let hosts = Hosts { here, there, server, dir };
        wait_for("ssh", || hosts.ssh(0, "true").status().is_ok_and(|s| s.success()).then_some(()));
        hosts
    }

    /// The words that reach the other host over that link, without the address: for ssh and whoever runs it.
    pub fn ssh_words(&self) -> Vec<String> {
        let key = self.dir.path().join("key");
        let words = [
            "ssh",
            "-F",
            "none",
            "-i",
            key.to_str().unwrap(),
            "-p",
            "2222",
            "-q",
            "-oBatchMode=yes",
            "-oStrictHostKeyChecking=no",
            "-oUserKnownHostsFile=/dev/null",
            "-oConnectTimeout=20",
            "-oServerAliveInterval=2",
            "-oServerAliveCountMax=3",
        ];
        words.map(str::to_owned).to_vec()
    }

    /// `ssh` from here to there over that link.
    pub fn ssh(&self, link: usize, script: &str) -> Command {
        let words = self.ssh_words();
        let mut command = self.here.command(&words[0]);
        command.args(&words[1..]).arg(format!("root@10.77.{link}.2")).arg(script);
        command.stdin(Stdio::null());
        command
    }

    /// Cuts a link, or mends it. The cable is at our end: the other side's host is not told.
    pub fn set_link(&self, link: usize, up: bool) {
        self.here.run(&["ip", "link", "set", &format!("a{link}"), if up { "up" } else { "down" }]);
    }
}

/// Debian's small ssh server, with keys of its own, and a home directory of its own for root.
fn serve_ssh(host: &Host, dir: &Path) -> Child {
    let home = host.path("home");
    fs::create_dir_all(home.join(".ssh")).unwrap();
    let (key, server_key) = (dir.join("key"), dir.join("server-key"));
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]);
    run("dropbearkey", &["-t", "ed25519", "-f", server_key.to_str().unwrap()]);
    fs::copy(key.with_extension("pub"), home.join(".ssh/authorized_keys")).unwrap();
    run("chmod", &["-R", "go-rwx", home.to_str().unwrap()]);
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let others = passwd.lines().filter(|line| !line.starts_with("root:"));
    let root = format!("root:x:0:0:root:{}:/bin/sh", home.display());
    let passwd = others.fold(root, |all, line| all + "\n" + line) + "\n";
    let table = host.path("passwd");
    fs::write(&table, passwd).unwrap();
    host.run(&["mount", "--bind", table.to_str().unwrap(), "/etc/passwd"]);
    host.command("dropbear")
        // Its own environment goes to the commands: their store is this host's.
        .args(["-F", "-E", "-e", "-s", "-m", "-p", "2222", "-K", "2", "-r", server_key.to_str().unwrap()])
        .args(["-P", host.path("dropbear.pid").to_str().unwrap()])
        .process_group(0)
        .stderr(fs::File::create(host.path("dropbear.log")).unwrap())
        .spawn()
        .unwrap()
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.there.path("dropbear.log")).unwrap_or_default());
        }
        for host in [&self.here, &self.there] {
            host.stencil(&["stop", "--all"]);
            host.stencil(&["umount", "--force", host.mountpoint().to_str().unwrap()]);
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
        for host in [&mut self.here, &mut self.there] {
            drop(host.holder.stdin.take());
            let _ = host.holder.wait();
        }
    }
}
