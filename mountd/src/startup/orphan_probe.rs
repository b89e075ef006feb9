//! Probes a mount that has no record in the runtime directory: determines whether a process serves the mount. The probe
//! runs in a child process, because a process that waits for a mount that does not respond cannot be killed.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::statfs;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use stencilfs::control::{Channel, runtime_dir};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::{holders, procfs};

use super::takeover::Holder;
use crate::protocol::ledger;

/// Longest wait for a reply of the mount: long enough for the startup of a mount, and for the exit of its last process.
const REPLY_TIMEOUT: Duration = Duration::from_secs(4);
const PROBE_INTERVAL: Duration = Duration::from_millis(50);
/// Longest duration of a probe, including a scan of all processes.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Result of a probe.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ProbeResult {
    /// The connection is closed.
    Over,
    /// The supervisor died before it wrote a record; its server is still alive.
    Left,
    /// The mount is served. Contains the runtime directory of the mount, if known.
    Served(Option<PathBuf>),
}

/// Checks that no process can use the mount of `device` any more, so that it may be unmounted.
///
/// # Errors
/// Returns [`Code::InUse`](stencilfs::error::Code::InUse) unless the mount is known to be dead.
pub fn expect_dead(mountpoint: &Path, device: u64) -> Result<()> {
    let dir = match probe(mountpoint, device) {
        Ok(Some(ProbeResult::Over | ProbeResult::Left)) => return Ok(()),
        Ok(Some(ProbeResult::Served(dir))) => dir,
        Ok(None) => None,
        Err(e) => return Err(Error::failed("cannot probe the existing mount").because(e).at(mountpoint)),
    };
    let ours = runtime_dir();
    let place = mountpoint.display();
    let remedy = match dir.filter(|dir| *dir != ours) {
        Some(dir) => {
            let dir = dir.display();
            format!("run 'STENCIL_RUNTIME_DIR={dir} stencil umount {place}', or choose another mountpoint")
        }
        None => format!(
            "run 'stencil umount {place}' with the STENCIL_RUNTIME_DIR of that mount, or choose another \
             mountpoint"
        ),
    };
    let what = format!(
        "a Stencil mount without a record in {} is at the mountpoint, and may be in use",
        ours.display()
    );
    Err(Error::in_use(what).at(mountpoint).hint(remedy))
}

/// Runs the probe in a child process. Returns `None` if the child reports no result in time.
fn probe(mountpoint: &Path, device: u64) -> std::io::Result<Option<ProbeResult>> {
    let (ours, theirs) = Channel::pair()?;
    ours.set_timeout(PROBE_TIMEOUT)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("stencil-mountd")
        .args(["unrecorded", &device.to_string()])
        .arg(mountpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    let result = ours.receive().ok().flatten().map(|(result, _)| result);
    let _ = child.kill();
    // A child that waits for an unresponsive mount cannot exit until the connection is closed.
    for _ in 0..20 {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        thread::sleep(PROBE_INTERVAL / 10);
    }
    Ok(result)
}

/// Runs `stencil-mountd unrecorded`: writes the result of a probe to standard output.
pub fn main(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let device = args.next().and_then(|word| word.to_str()?.parse().ok());
    let (Some(device), Some(mountpoint)) = (device, args.next()) else { return ExitCode::from(2) };
    // One write, as each write to the socket is one message.
    let text = serde_json::to_vec(&probe_mount(PathBuf::from(mountpoint), device)).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    ExitCode::SUCCESS
}

fn probe_mount(mountpoint: PathBuf, device: u64) -> ProbeResult {
    let (sender, receiver) = mpsc::channel();
    // statfs(2) always sends a request to the server, whereas stat(2) may use attributes that the kernel has cached.
    thread::spawn(move || {
        let _ = sender.send(statfs(&mountpoint).err());
        // The end of the thread would close the channel, and `recv_timeout` would no longer wait.
        thread::park();
    });
    let until = Instant::now() + REPLY_TIMEOUT;
    let mut answered = false;
    loop {
        match receiver.recv_timeout(PROBE_INTERVAL) {
            Ok(Some(Errno::NOTCONN)) => return ProbeResult::Over,
            Ok(_) => answered = true,
            Err(_) => {}
        }
        // A server whose supervisor died during startup waits for a supervisor and does not answer the statfs request.
        let (holding, all) = holders(device);
        if all && !holding.is_empty() && holding.iter().all(Holding::is_orphan) {
            return ProbeResult::Left;
        }
        if answered || Instant::now() > until {
            return ProbeResult::Served(holding.into_iter().find_map(|holding| holding.dir));
        }
    }
}

/// Returns the processes that have a descriptor of the connection, and whether all processes could be inspected.
fn holders(device: u64) -> (Vec<Holding>, bool) {
    let own_pid = std::process::id();
    let pids = procfs::pids().unwrap_or_default().into_iter().filter(|&pid| pid != own_pid).collect();
    let looks = holders::look_at_each(pids, holders::SCAN_TIMEOUT, move |pid| {
        device::is_held_by(pid, device).then(|| Holding::of(pid))
    });
    (looks.seen.into_iter().map(|(_, holding)| holding).collect(), looks.unseen.is_empty())
}

/// A process that has a descriptor of the connection.
#[derive(Debug, Default)]
struct Holding {
    /// Runtime directory that contains the record of the mount, if the process is a server.
    dir: Option<PathBuf>,
    /// True if the process is a server whose supervisor is dead.
    has_dead_supervisor: bool,
}

impl Holding {
    fn of(pid: u32) -> Holding {
        let words = procfs::cmdline(pid).ok().flatten().unwrap_or_default();
        if words.get(1).is_none_or(|word| word != "serve") {
            return Holding::default();
        }
        let ledger = Holder::open(pid).and_then(|server| server.get("ledger"));
        let Ok(snapshot) = ledger.and_then(|ledger| ledger::read_snapshot(&ledger)) else {
            return Holding::default();
        };
        // The supervisor's PID is valid in the PID namespace of its server only.
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let same_namespace = namespace("self").is_some_and(|ours| namespace(&pid.to_string()) == Some(ours));
        Holding {
            has_dead_supervisor: same_namespace && !snapshot.supervisor.is_alive(),
            dir: snapshot.record.parent().and_then(Path::parent).map(Path::to_owned),
        }
    }

    /// Returns true if the process is a server whose supervisor is dead, of a mount that belongs to this runtime
    /// directory.
    fn is_orphan(&self) -> bool {
        let ours = runtime_dir();
        let same = |dir: &Path| {
            dir == ours
                || matches!((fs::canonicalize(dir), fs::canonicalize(&ours)), (Ok(a), Ok(b)) if a == b)
        };
        self.has_dead_supervisor && self.dir.as_deref().is_some_and(same)
    }
}
