//! A real Linux guest in QEMU (TCG): booted, captured once per build, given to scenarios.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use super::mount::{STENCIL, TestMount, temporary};

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
        let (kernel, initramfs) = kernel_and_initramfs();
        let mut words = qemu_words(dir, "256M");
        for (option, value) in [
            ("-kernel", kernel.as_str()),
            ("-initrd", &initramfs),
            ("-append", "console=ttyS0 quiet panic=-1"),
        ] {
            words.extend([option.to_owned(), value.to_owned()]);
        }
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
    let copied =
        Command::new("cp").args(["-a", "--reflink=auto"]).arg(captured()).arg(&store).status().unwrap();
    assert!(copied.success());
}

/// A store with the captured guest, kept below the build directory for this very build.
fn captured() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("guest");
    let (kernel, initramfs) = kernel_and_initramfs();
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

/// Paths of the guest's kernel and initramfs.
pub fn kernel_and_initramfs() -> (String, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/guest.sh");
    let done = Command::new(&script).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    let mut lines = text.lines().map(str::to_owned);
    (lines.next().unwrap(), lines.next().unwrap())
}
