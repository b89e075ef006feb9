//! Stuck FUSE connections: `stencil doctor` finds them, and aborts one after a confirmation.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::users::{User, Users, list, unseen};
use crate::cli::output::{Report, confirm, to_json};
use crate::clones::counted;
use crate::control::{self, Mount};
use crate::error::{Error, Result};
use crate::sys::files::mount;
use crate::sys::fuse::control_fs::{self, Connection};
use crate::sys::process::procfs;

/// Time within which an aborted connection must have completed its pending requests.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A FUSE connection whose pending requests make no progress.
#[derive(Debug, Serialize)]
pub struct Stuck {
    /// Number of the connection.
    connection: u32,
    /// Number of pending requests.
    waiting: u64,
    /// Mountpoint; `None` if the file system is not reachable by a path any more.
    #[serde(serialize_with = "crate::sanitize::optional_path")]
    mountpoint: Option<PathBuf>,
    /// Type of the file system, if it is mounted.
    fs_type: Option<String>,
    users: Vec<User>,
    /// Processes that could not be inspected in time; each may also use the mount.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
}

impl Stuck {
    fn of(connection: &Connection, mounts: &[Mount], mounted: &[procfs::MountLine]) -> Result<Stuck> {
        let device = procfs::makedev(0, connection.number);
        let ours = mounts.iter().find(|m| m.device == device);
        let there = mounted.iter().rfind(|m| m.dev == device);
        let own = ours.map_or([None, None], Mount::processes);
        let users = Users::of(device, &own)?;
        Ok(Stuck {
            connection: connection.number,
            waiting: connection.waiting,
            mountpoint: there.map(|m| m.mountpoint.clone()).or_else(|| Some(ours?.mountpoint.clone())),
            fs_type: there.map(|m| m.fs_type.clone()),
            users: users.found,
            unseen: users.unseen,
        })
    }

    /// Formats the connection with its number and mountpoint.
    fn name(&self) -> String {
        let place =
            self.mountpoint.as_ref().map_or_else(|| "not mounted".into(), |p| p.display().to_string());
        format!("FUSE connection {} ({place})", self.connection)
    }

    /// Describes the finding in one line.
    pub fn found(&self) -> String {
        let requests = counted(self.waiting, "pending request", "pending requests");
        let mut text = format!("{} is stuck with {requests}", self.name());
        match self.users.len() {
            0 => text.push_str("; no process uses its files"),
            _ => text.push_str(&format!("; its files are used by {}", list(&self.users))),
        }
        if !self.unseen.is_empty() {
            text.push_str(&format!("; {}", unseen(&self.unseen)));
        }
        text
    }

    /// Returns the remedy for the finding.
    pub fn remedy(&self) -> String {
        format!(
            "abort the connection with 'stencil doctor --fix-stuck {}': all its requests fail, and clones of files \
             that are served by decode are killed at the next access to a page that is not in RAM",
            self.connection
        )
    }
}

/// Finds all stuck connections. A Stencil mount whose server still counts replies is busy, not stuck.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`.
pub fn find() -> Result<Vec<Stuck>> {
    let mounts = control::mounts().unwrap_or_default();
    let waits: Vec<u32> =
        control_fs::connections()?.iter().filter(|c| c.waiting > 0).map(|c| c.number).collect();
    let counted = || -> BTreeMap<u32, Option<BTreeMap<String, u64>>> {
        let number = |m: &Mount| rustix::fs::minor(m.device);
        let ours = mounts.iter().filter(|m| waits.contains(&number(m)));
        ours.map(|m| (number(m), m.status().ok().map(|status| status.counters))).collect()
    };
    let before = counted();
    let mut stuck = control_fs::stuck_connections()?;
    if stuck.is_empty() {
        return Ok(vec![]);
    }
    let after = counted();
    stuck.retain(|c| before.get(&c.number) == after.get(&c.number));
    let mounted = procfs::mounts()?;
    stuck.iter().map(|c| Stuck::of(c, &mounts, &mounted)).collect()
}

/// The result of aborting a connection.
#[derive(Debug, Serialize)]
pub struct Aborted {
    connection: u32,
    #[serde(serialize_with = "crate::sanitize::optional_path")]
    mountpoint: Option<PathBuf>,
    /// Processes that use the mount. A process whose file is served by decode is killed at its next access to a page
    /// that is not in RAM.
    cut_off: Vec<User>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
    /// True if the dead file system is still mounted.
    still_mounted: bool,
}

impl Report for Aborted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "FUSE connection {} is aborted", self.connection)?;
        if !self.cut_off.is_empty() {
            writeln!(out, "processes cut off: {}", list(&self.cut_off))?;
        }
        if !self.unseen.is_empty() {
            writeln!(out, "{}", unseen(&self.unseen))?;
        }
        match &self.mountpoint {
            Some(path) if self.still_mounted => {
                writeln!(out, "{0} is a dead mount; to remove it: umount -l {0}", path.display())
            }
            _ => Ok(()),
        }
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Aborts the connection with this number, or the only stuck one, after a confirmation unless `yes` is set.
///
/// # Errors
/// Returns `Code::NotFound` if the connection does not exist; `Code::Usage` if it is not stuck, if several connections
/// are stuck and no number is given, or if no terminal can confirm; and an error if the user declines.
pub fn fix(number: Option<u32>, yes: bool) -> Result<Aborted> {
    let stuck = choose(find()?, number)?;
    let name = stuck.name();
    let users = Users { found: stuck.users, unseen: stuck.unseen };
    crate::print_line!("warning: {name} will be aborted: all requests on it will fail");
    users.announce();
    if !yes {
        confirm("abort the connection?")?;
    }
    let device = procfs::makedev(0, stuck.connection);
    match mount::abort_fuse_connection(device) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        other => other.map_err(|e| {
            Error::failed(format!("cannot abort {name}")).because(e).hint("run the command as root")
        })?,
    }
    let until = Instant::now() + ABORT_TIMEOUT;
    let is_pending = || {
        control_fs::connections().map(|all| all.iter().any(|c| c.number == stuck.connection && c.waiting > 0))
    };
    while is_pending()? && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Aborted {
        connection: stuck.connection,
        mountpoint: stuck.mountpoint,
        cut_off: users.found,
        unseen: users.unseen,
        still_mounted: procfs::mounts()?.iter().any(|m| m.dev == device),
    })
}

fn choose(mut stuck: Vec<Stuck>, number: Option<u32>) -> Result<Stuck> {
    const LIST: &str = "run 'stencil doctor' to list stuck connections";
    match (number, stuck.len()) {
        (Some(number), _) => match stuck.iter().position(|s| s.connection == number) {
            Some(at) => Ok(stuck.swap_remove(at)),
            None if control_fs::connections()?.iter().any(|c| c.number == number) => Err(Error::usage(
                format!("FUSE connection {number} is not stuck: its requests make progress"),
            )
            .hint(LIST)),
            None => Err(Error::not_found(format!("there is no FUSE connection {number}")).hint(LIST)),
        },
        (None, 1) => Ok(stuck.swap_remove(0)),
        (None, 0) => Err(Error::not_found("no FUSE connection is stuck")
            .hint("run 'stencil doctor' to check the mounts and connections of this host")),
        (None, count) => {
            let names: Vec<String> = stuck.iter().map(Stuck::name).collect();
            Err(Error::usage(format!("{count} connections are stuck: {}", names.join(", ")))
                .hint("name one connection: stencil doctor --fix-stuck N"))
        }
    }
}
