//! A real Linux guest in QEMU (TCG): booted, captured once per build, given to scenarios.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use super::mount::{STENCIL, TestMount, run, temporary};
use super::store::random;

/// Words of a QEMU whose guest clones can be made of; `dir` gets its RAM file and sockets.
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

/// A QEMU of a scenario's own; killed when dropped.
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
            .expect("qemu-system-x86_64 runs: make setup");
        let mut qemu = Qemu { child, dir: dir.to_owned() };
        patiently("the QMP socket", Duration::from_secs(30), || {
            let ended = qemu.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU ended: {}", qemu.log());
            // Other sessions wait for this one: it must be short.
            Qmp::connect(&qemu.socket()).ok().map(drop)
        });
        qemu
    }

    /// Boots the Linux guest and waits until its heart beats.
    pub fn boot(dir: &Path) -> Qemu {
        Qemu::boot_with(dir, "")
    }

    /// The same with more words on its command line.
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

    /// Its QMP socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// A QMP session.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.socket()).unwrap()
    }

    /// `running`, `paused`…
    pub fn status(&self) -> String {
        self.qmp().status().unwrap()
    }

    /// Runs a QMP command without arguments.
    pub fn run(&self, command: &str) -> Value {
        self.qmp().run(command, json!({})).unwrap()
    }

    /// Heartbeats so far.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        heartbeats(&self.dir.join("serial"))
    }

    /// Waits until there are so many heartbeats.
    pub fn wait_heartbeats(&self, count: usize) {
        patiently("heartbeats", Duration::from_secs(120), || {
            (self.heartbeats().len() >= count).then_some(())
        });
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// True when it has ended.
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

/// A root disk for a guest: an ext4 of 64 MiB and more, with its system and a file of `noise` bytes that do not compress,
/// as a raw base image and a qcow2 over it. Gives the qcow2.
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

/// The address of the network card that [`devices`] gives.
pub const CAPTURED_MAC: &str = "52:54:00:12:34:57";

/// Words that give a guest this disk, a network card with a forward from a port of the host, and a second serial port.
pub fn devices(dir: &Path, disk: &Path, port: u16) -> String {
    format!(
        "-drive file={},if=virtio,format=qcow2,id=root -netdev user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:80 \
         -device virtio-net-pci,netdev=n0,id=eth,mac={CAPTURED_MAC} \
         -serial unix:{}/second.sock,server=on,wait=off",
        disk.display(),
        dir.display()
    )
}

/// What the guest behind that port has written to its disk: a heartbeat a line.
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

/// What a guest answers to a line on its second serial port.
pub fn told(port: &Path, line: &str) -> String {
    let socket = UnixStream::connect(port).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (&socket).write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(&socket).read_line(&mut answer).unwrap();
    let told = answer.trim().strip_prefix(line).and_then(|rest| rest.strip_prefix(": "));
    told.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// A guest's root is on the disk that [`make_disk`] made, and not the initramfs.
#[track_caller]
pub fn root_is_on_disk(port: &Path) {
    let root = told(port, "root");
    assert!(root.starts_with("/dev/vd") && root.ends_with(" ext4"), "{root}");
}

/// The heartbeats in a guest's disk image that nobody uses; its file system must be sound.
pub fn beats_in_image(image: &Path, dir: &Path) -> Vec<String> {
    run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    let copy = dir.join("copy.raw");
    run("qemu-img", &["convert", "-O", "raw", image.to_str().unwrap(), copy.to_str().unwrap()]);
    // The journal of a guest that did not unmount is replayed; after that nothing may be left to mend.
    let replayed = Command::new("e2fsck").args(["-p"]).arg(&copy).output().unwrap();
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{replayed:?}");
    run("e2fsck", &["-f", "-n", copy.to_str().unwrap()]);
    let text = run("debugfs", &["-R", "cat /srv/beats", copy.to_str().unwrap()]);
    fs::remove_file(copy).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Which image each block device of a VM has, without figures that move.
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

/// Overlays of captures in that folder.
pub fn overlays(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().flatten().map(|e| e.path());
    all.filter(|path| path.to_string_lossy().contains(".stencil-")).collect()
}

/// Whether a VM's migrations leave shared RAM out.
pub fn ignores_shared(qmp: &mut Qmp) -> bool {
    let all = qmp.run("query-migrate-capabilities", json!({})).unwrap();
    let one = all.as_array().unwrap().iter().find(|c| c["capability"] == "x-ignore-shared").unwrap();
    one["state"].as_bool().unwrap()
}

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One line of the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// Counts from 1 since the guest booted.
    pub count: u64,
    /// A fresh random number of the guest's kernel.
    pub random: String,
}

/// The heartbeats in a serial log; a line that is not whole yet is left out.
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

/// Waits for something that a guest takes its time for.
#[track_caller]
pub fn patiently<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(std::time::Instant::now() < end, "no {what} after {patience:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Puts the template `guest:v1`, captured from a booted guest, into the scenario's store. Its mount must not exist yet.
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

/// A store with the captured guest, kept below the build directory for this very build.
fn captured() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("guest");
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

/// Paths of the guest's kernel and initramfs, and the kernel's command line.
pub fn linux() -> [String; 3] {
    let done = Command::new(script()).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.try_into().expect("three lines")
}
