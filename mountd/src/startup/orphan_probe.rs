//! Whether anybody serves a mount that has no record here. It is asked by a process of its own: the mount may not answer,
//! and who asks it cannot end then.

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
use stencilfs::sys::{fuse_dev, procfs, users};

use super::takeover::Holder;
use crate::protocol::ledger;

/// A mount that begins, and one whose last process is dying, has answered within this time.
const ANSWER: Duration = Duration::from_secs(4);
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// All of it, with a look at every process.
const LIMIT: Duration = Duration::from_secs(10);

/// What is known of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Seen {
    /// Its connection is over.
    Over,
    /// Its supervisor died before it could write down who serves: nobody but the server is left.
    Left,
    /// Somebody serves it; in that runtime directory, where that can be told.
    Served(Option<PathBuf>),
}

/// Makes sure that nobody will miss the mount of that device.
///
/// # Errors
/// [`Code::InUse`](stencilfs::error::Code::InUse) for one that is not known to be dead.
pub fn is_dead(mountpoint: &Path, device: u64) -> Result<()> {
    let dir = match ask(mountpoint, device) {
        Ok(Some(Seen::Over | Seen::Left)) => return Ok(()),
        Ok(Some(Seen::Served(dir))) => dir,
        Ok(None) => None,
        Err(e) => return Err(Error::failed("cannot ask the mount that is there").because(e).at(mountpoint)),
    };
    let ours = runtime_dir();
    let place = mountpoint.display();
    let remedy = match dir.filter(|dir| *dir != ours) {
        Some(dir) => {
            let dir = dir.display();
            format!("end it: STENCIL_RUNTIME_DIR={dir} stencil umount {place}; or name another directory")
        }
        None => format!(
            "end it: stencil umount {place}, with the STENCIL_RUNTIME_DIR that it was mounted with; or name \
             another directory"
        ),
    };
    let what = format!("a Stencil mount is there that lives and has no record in {}", ours.display());
    Err(Error::in_use(what).at(mountpoint).remedy(remedy))
}

/// None where the process that asks does not answer.
fn ask(mountpoint: &Path, device: u64) -> std::io::Result<Option<Seen>> {
    let (ours, theirs) = Channel::pair()?;
    ours.set_patience(LIMIT)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("stencil-mountd")
        .args(["unrecorded", &device.to_string()])
        .arg(mountpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    let seen = ours.receive().ok().flatten().map(|(seen, _)| seen);
    let _ = child.kill();
    // Where the mount does not answer, it stays until the connection is over.
    for _ in 0..20 {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        thread::sleep(BETWEEN_LOOKS / 10);
    }
    Ok(seen)
}

/// `stencil-mountd unrecorded`: says on standard output what is known.
pub fn main(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let device = args.next().and_then(|word| word.to_str()?.parse().ok());
    let (Some(device), Some(mountpoint)) = (device, args.next()) else { return ExitCode::from(2) };
    // One write: the other end takes whole messages.
    let text = serde_json::to_vec(&look(PathBuf::from(mountpoint), device)).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    ExitCode::SUCCESS
}

fn look(mountpoint: PathBuf, device: u64) -> Seen {
    let (tell, hear) = mpsc::channel();
    // Attributes can be known to the kernel for a while yet; this is asked of the server every time.
    thread::spawn(move || {
        let _ = tell.send(statfs(&mountpoint).err());
        // The channel's end would be one more answer.
        thread::park();
    });
    let until = Instant::now() + ANSWER;
    let mut answered = false;
    loop {
        match hear.recv_timeout(BETWEEN_LOOKS) {
            Ok(Some(Errno::NOTCONN)) => return Seen::Over,
            Ok(_) => answered = true,
            Err(_) => {}
        }
        // A server that was left before it served waits for a supervisor, and answers nobody.
        let (holding, all) = holders(device);
        if all && !holding.is_empty() && holding.iter().all(Holding::is_left) {
            return Seen::Left;
        }
        if answered || Instant::now() > until {
            return Seen::Served(holding.into_iter().find_map(|holding| holding.dir));
        }
    }
}

/// Who has a descriptor of the connection, and whether these are all.
fn holders(device: u64) -> (Vec<Holding>, bool) {
    let me = std::process::id();
    let pids = procfs::pids().unwrap_or_default().into_iter().filter(|&pid| pid != me).collect();
    let looks = users::look_at_each(pids, users::PATIENCE, move |pid| {
        fuse_dev::is_held_by(pid, device).then(|| Holding::of(pid))
    });
    (looks.seen.into_iter().map(|(_, holding)| holding).collect(), looks.unseen.is_empty())
}

/// A process that has a descriptor of the connection.
#[derive(Debug, Default)]
struct Holding {
    /// The runtime directory in which its mount has its record, where it is a server.
    dir: Option<PathBuf>,
    /// It is a server, and its supervisor is dead.
    lost: bool,
}

impl Holding {
    fn of(pid: u32) -> Holding {
        let words = procfs::cmdline(pid).ok().flatten().unwrap_or_default();
        if words.get(1).is_none_or(|word| word != "serve") {
            return Holding::default();
        }
        let ledger = Holder::open(pid).and_then(|server| server.get("ledger"));
        let Ok(snapshot) = ledger.and_then(|ledger| ledger::look(&ledger)) else { return Holding::default() };
        // Numbers of another PID namespace say nothing here.
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let near = namespace("self").is_some_and(|ours| namespace(&pid.to_string()) == Some(ours));
        Holding {
            lost: near && !snapshot.supervisor.is_alive(),
            dir: snapshot.record.parent().and_then(Path::parent).map(Path::to_owned),
        }
    }

    /// It is the server of a mount of this runtime directory, where nobody knows of it any more.
    fn is_left(&self) -> bool {
        let ours = runtime_dir();
        let same = |dir: &Path| {
            dir == ours
                || matches!((fs::canonicalize(dir), fs::canonicalize(&ours)), (Ok(a), Ok(b)) if a == b)
        };
        self.lost && self.dir.as_deref().is_some_and(same)
    }
}
