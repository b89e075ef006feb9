//! A real Linux guest in QEMU (TCG): booted and captured once per build, then copied for each scenario.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::mount::{STENCIL, TestMount, run, temporary};
use crate::support::store::random;

/// Returns the arguments of a QEMU whose guest can be captured and cloned; `dir` holds its RAM file and sockets.
pub fn qemu_words(dir: &Path, memory: &str) -> Vec<String> {
    let dir = dir.display();
    let text = format!(
        "-M q35,memory-backend=ram0 -accel tcg -cpu max -m {memory} -nodefaults -no-user-config -display none \
         -object memory-backend-file,id=ram0,size={memory},mem-path={dir}/ram,share=on \
         -device vmgenid,guid=auto -object rng-random,id=rng0,filename=/dev/urandom \
         -device virtio-rng-pci,rng=rng0 -serial file:{dir}/serial -qmp unix:{dir}/qmp,server=on,wait=off"
    );
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// A QEMU of one scenario; killed on drop.
pub struct Qemu {
    child: Child,
    dir: PathBuf,
}

impl Qemu {
    /// Starts QEMU and waits for its QMP socket.
    pub fn start(dir: &Path, words: &[String]) -> Qemu {
        let log = File::create(dir.join("qemu.log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("cannot run qemu-system-x86_64: run make setup");
        let mut qemu = Qemu { child, dir: dir.to_owned() };
        patiently("the QMP socket", Duration::from_secs(30), || {
            let ended = qemu.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU exited: {}", qemu.log());
            // QMP serves one session at a time: this one ends at once.
            Qmp::connect(&qemu.socket()).ok().map(drop)
        });
        qemu
    }

    /// Boots the Linux guest and waits for three heartbeats.
    pub fn boot(dir: &Path) -> Qemu {
        Qemu::boot_with(dir, "")
    }

    /// Same as [`Qemu::boot`] with more QEMU arguments.
    pub fn boot_with(dir: &Path, more: &str) -> Qemu {
        let [kernel, initramfs, append] = linux();
        let mut words = qemu_words(dir, "256M");
        for (option, value) in [("-kernel", kernel), ("-initrd", initramfs), ("-append", append)] {
            words.extend([option.to_owned(), value]);
        }
        words.extend(more.split_ascii_whitespace().map(str::to_owned));
        let qemu = Qemu::start(dir, &words);
        qemu.wait_heartbeats(3);
        qemu
    }

    /// The path of the QMP socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// Opens a QMP session.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.socket()).unwrap()
    }

    /// The run state: `running`, `paused`…
    pub fn status(&self) -> String {
        self.qmp().status().unwrap()
    }

    /// Runs a QMP command without arguments.
    pub fn run(&self, command: &str) -> Value {
        self.qmp().run(command, json!({})).unwrap()
    }

    /// The heartbeats so far.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        heartbeats(&self.dir.join("serial"))
    }

    /// Waits until there are `count` heartbeats.
    pub fn wait_heartbeats(&self, count: usize) {
        patiently("heartbeats", Duration::from_secs(120), || {
            (self.heartbeats().len() >= count).then_some(())
        });
    }

    /// Kills QEMU with SIGKILL, like a crash.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Returns true if QEMU has exited.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a root disk for a guest: an ext4 of 64 MiB plus `noise`, with the guest's system and a file of `noise`
/// incompressible bytes, as a raw base image and a qcow2 over it. Returns the path of the qcow2.
pub fn make_disk(dir: &Path, noise: usize) -> PathBuf {
    let (more, base, disk) = (dir.join("more"), dir.join("base.raw"), dir.join("disk.qcow2"));
    fs::create_dir(&more).unwrap();
    fs::write(more.join("noise"), random(7, noise)).unwrap();
    let size = format!("{}M", 64 + (noise >> 20));
    let words = ["--disk", base.to_str().unwrap(), &size, more.to_str().unwrap()];
    run(script().to_str().unwrap(), &words);
    let words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    run("qemu-img", &[&words[..], &[base.to_str().unwrap(), disk.to_str().unwrap()]].concat());
    disk
}

/// The MAC address of the network card that [`devices`] adds.
pub const CAPTURED_MAC: &str = "52:54:00:12:34:57";

/// Returns QEMU arguments for this disk, a network card with a port forwarded from the host, and a second serial port.
pub fn devices(dir: &Path, disk: &Path, port: u16) -> String {
    format!(
        "-drive file={},if=virtio,format=qcow2,id=root -netdev user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:80 \
         -device virtio-net-pci,netdev=n0,id=eth,mac={CAPTURED_MAC} \
         -serial unix:{}/second.sock,server=on,wait=off",
        disk.display(),
        dir.display()
    )
}

/// Returns the lines (one per heartbeat) that the guest behind this port has written to its disk.
pub fn beats_on_disk(port: u16) -> Option<Vec<String>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(b"GET /beats HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.contains("200 OK"), "{head}");
    Some(body.lines().map(str::to_owned).collect())
}

/// Sends a line to a guest's second serial port and returns the guest's reply.
pub fn told(port: &Path, line: &str) -> String {
    let socket = UnixStream::connect(port).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (&socket).write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(&socket).read_line(&mut answer).unwrap();
    let told = answer.trim().strip_prefix(line).and_then(|rest| rest.strip_prefix(": "));
    told.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Panics unless the guest's root is on the disk that [`make_disk`] made, and not the initramfs.
#[track_caller]
pub fn root_is_on_disk(port: &Path) {
    let root = told(port, "root");
    assert!(root.starts_with("/dev/vd") && root.ends_with(" ext4"), "{root}");
}

/// Returns the heartbeats in a guest's disk image that no process uses. Panics if its file system is damaged.
pub fn beats_in_image(image: &Path, dir: &Path) -> Vec<String> {
    run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    let copy = dir.join("copy.raw");
    run("qemu-img", &["convert", "-O", "raw", image.to_str().unwrap(), copy.to_str().unwrap()]);
    // The journal of a guest that did not unmount is replayed; the check after that must find no error.
    let replayed = Command::new("e2fsck").args(["-p"]).arg(&copy).output().unwrap();
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{replayed:?}");
    run("e2fsck", &["-f", "-n", copy.to_str().unwrap()]);
    let text = run("debugfs", &["-R", "cat /srv/beats", copy.to_str().unwrap()]);
    fs::remove_file(copy).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Returns the image of each block device of a VM, without counters.
pub fn media(qmp: &mut Qmp) -> Value {
    let all = qmp.run("query-block", json!({})).unwrap();
    let one = |b: &Value| {
        let inserted = &b["inserted"];
        json!([
            b["device"],
            b["qdev"],
            inserted["node-name"],
            inserted["file"],
            inserted["ro"],
            inserted["drv"]
        ])
    };
    all.as_array().unwrap().iter().map(one).collect()
}

/// Returns the overlays of captures in this directory.
pub fn overlays(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().flatten().map(|e| e.path());
    all.filter(|path| path.to_string_lossy().contains(".stencil-")).collect()
}

/// Returns true if the VM's migrations leave out shared RAM (`x-ignore-shared`).
pub fn ignores_shared(qmp: &mut Qmp) -> bool {
    let all = qmp.run("query-migrate-capabilities", json!({})).unwrap();
    let one = all.as_array().unwrap().iter().find(|c| c["capability"] == "x-ignore-shared").unwrap();
    one["state"].as_bool().unwrap()
}

/// Returns a TCP port without a listener.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One heartbeat line of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// The number since the guest booted, from 1.
    pub count: u64,
    /// A new random UUID of the guest's kernel.
    pub random: String,
}

/// Returns the heartbeats in a serial log, without an incomplete last line.
pub fn heartbeats(serial: &Path) -> Vec<Heartbeat> {
    let text = String::from_utf8_lossy(&fs::read(serial).unwrap_or_default()).into_owned();
    let beat = |line: &str| {
        let mut words = line.strip_prefix("heartbeat ")?.split_ascii_whitespace();
        let count = words.next()?.parse().ok()?;
        let random = words.nth(1).filter(|r| r.len() == 36)?.to_owned();
        Some(Heartbeat { count, random })
    };
    text.lines().filter_map(beat).collect()
}

/// Polls `look` every 20 ms until it returns a value; panics after `patience`.
#[track_caller]
pub fn patiently<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(std::time::Instant::now() < end, "timed out after {patience:?} waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Puts the template `guest:v1`, captured from a booted guest, into the scenario's store, which must not be mounted.
pub fn give(world: &TestMount) {
    let store = world.store_dir();
    fs::remove_dir_all(&store).unwrap();
    fs::create_dir(&store).unwrap();
    give_to(&store);
}

/// Copies the store with that template into an empty directory.
pub fn give_to(store: &Path) {
    let from = captured().join(".");
    let copied = Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(store).status().unwrap();
    assert!(copied.success());
}

/// Returns the directory of the files that `make setup` downloads for guests.
pub fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("guest")
}

/// Returns a store with the captured guest, cached in the build directory for exactly this build.
fn captured() -> PathBuf {
    let cache = cache();
    let [kernel, initramfs, _] = linux();
    let lock = File::create(cache.join("captured.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut hasher = blake3::Hasher::new();
    for path in [Path::new(STENCIL), Path::new(&kernel), Path::new(&initramfs)] {
        hasher.update(&fs::read(path).unwrap());
    }
    let place = cache.join(format!("captured-{}", &hasher.finalize().to_hex()[..16]));
    if place.exists() {
        return place;
    }
    for old in fs::read_dir(&cache).unwrap().flatten() {
        let name = old.file_name();
        let age = old.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if name.to_string_lossy().starts_with("captured-") && age.is_some_and(|a| a.as_secs() > 3600) {
            let _ = fs::remove_dir_all(old.path());
        }
    }
    let dir = temporary("capture-");
    let guest = Qemu::boot(dir.path());
    let store = dir.path().join("store");
    let done = Command::new(STENCIL)
        .arg("--store")
        .arg(&store)
        .arg("capture")
        .arg(guest.socket())
        .arg("guest:v1")
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    fs::rename(&store, &place).unwrap();
    place
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/guest.sh")
}

/// Returns the paths of the guest's kernel and initramfs, and the kernel's command line.
pub fn linux() -> [String; 3] {
    let done = Command::new(script()).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.try_into().expect("guest.sh prints three lines")
}
