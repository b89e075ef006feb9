//! Two hosts on one machine, each with its own network namespace, mount namespace, store and runtime directory. They
//! are connected by links that can be cut; the second host runs an ssh server.
//!
//! Nothing of the hosts is visible outside: networks and mounts end with the processes in the namespaces.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::mount::{Run, STENCIL, daemon, run, temporary, wait_for, without_others};

/// One of the two hosts.
pub struct Host {
    dir: PathBuf,
    /// Keeps the namespaces; exits when its standard input is closed.
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

    /// Returns a command for a program on this host.
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

    /// Runs `stencil` on this host.
    pub fn stencil(&self, words: &[&str]) -> Run {
        let output = self.command(STENCIL).args(words).output().unwrap();
        Run::of(words.join(" "), &output)
    }

    /// Runs `stencil --json` on this host, which must exit with 0, and returns the parsed output.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let run = self.stencil(&[&["--json"], words].concat()).ok();
        serde_json::from_str(&run.out).unwrap_or_else(|e| panic!("{words:?}: {e}: {}", run.out))
    }

    /// The store's directory.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// A path in the host's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The mount point.
    pub fn mountpoint(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    #[track_caller]
    fn run(&self, words: &[&str]) {
        let output = self.command(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Both hosts, the links and the ssh server.
pub struct Hosts {
    pub here: Host,
    pub there: Host,
    server: Child,
    dir: tempfile::TempDir,
}

impl Hosts {
    /// Creates two hosts with `links` links between them.
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

    /// Returns the ssh command without the address, for ssh itself and for programs that run ssh.
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

    /// Returns a command that runs a script on the second host over this link.
    pub fn ssh(&self, link: usize, script: &str) -> Command {
        let words = self.ssh_words();
        let mut command = self.here.command(&words[0]);
        command.args(&words[1..]).arg(format!("root@10.77.{link}.2")).arg(script);
        command.stdin(Stdio::null());
        command
    }

    /// Takes a link down or up at our end. The other host is not notified.
    pub fn set_link(&self, link: usize, up: bool) {
        self.here.run(&["ip", "link", "set", &format!("a{link}"), if up { "up" } else { "down" }]);
    }
}

/// Starts dropbear with its own keys, and with a separate home directory for root.
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
        // `-e` passes the server's environment to the commands, so that they use this host's store.
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
