//! FUSE connections that nobody answers: found, and aborted if the user wants it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::output::{Report, to_json};
use super::users::{User, Users, list, unseen};
use crate::control::{self, Mount};
use crate::error::{Error, Result};
use crate::sys::fusectl::{self, Connection};
use crate::sys::{mount, procfs};

/// An aborted connection has let its requests go within this time.
const END: Duration = Duration::from_secs(5);

/// A FUSE connection whose requests wait without moving.
#[derive(Debug, Serialize)]
pub struct Stuck {
    /// Its number.
    connection: u32,
    /// Requests that wait.
    waiting: u64,
    /// Where it is mounted; none where no path leads to it any more.
    #[serde(serialize_with = "crate::shown::optional_path")]
    mountpoint: Option<PathBuf>,
    /// Type of its file system, where it is mounted.
    fs_type: Option<String>,
    users: Vec<User>,
    /// Processes that could not be looked into in time: each may be one more user.
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

    /// The connection by number and place.
    fn name(&self) -> String {
        let place =
            self.mountpoint.as_ref().map_or_else(|| "nowhere mounted".into(), |p| p.display().to_string());
        format!("FUSE connection {} ({place})", self.connection)
    }

    /// What is the matter, in one line.
    pub fn found(&self) -> String {
        let mut words = format!("{} has {} requests that nobody answers", self.name(), self.waiting);
        match self.users.len() {
            0 => words.push_str("; no process has its files"),
            _ => words.push_str(&format!("; its files are used by {}", list(&self.users))),
        }
        if !self.unseen.is_empty() {
            words.push_str(&format!("; {}", unseen(&self.unseen)));
        }
        words
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        format!(
            "stencil doctor --fix-stuck {} aborts it: its users get errors, and clones die at the next page that they do not have",
            self.connection
        )
    }
}

/// All of them. A mount of ours whose server still counts answers is busy, not stuck.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn find() -> Result<Vec<Stuck>> {
    let mounts = control::mounts().unwrap_or_default();
    let waits: Vec<u32> =
        fusectl::connections()?.iter().filter(|c| c.waiting > 0).map(|c| c.number).collect();
    let counted = || -> BTreeMap<u32, Option<BTreeMap<String, u64>>> {
        let number = |m: &Mount| rustix::fs::minor(m.device);
        let ours = mounts.iter().filter(|m| waits.contains(&number(m)));
        ours.map(|m| (number(m), m.status().ok().map(|status| status.counters))).collect()
    };
    let before = counted();
    let mut stuck = fusectl::stuck_connections()?;
    if stuck.is_empty() {
        return Ok(vec![]);
    }
    let after = counted();
    stuck.retain(|c| before.get(&c.number) == after.get(&c.number));
    let mounted = procfs::mounts()?;
    stuck.iter().map(|c| Stuck::of(c, &mounts, &mounted)).collect()
}

/// What became of it.
#[derive(Debug, Serialize)]
pub struct Aborted {
    connection: u32,
    #[serde(serialize_with = "crate::shown::optional_path")]
    mountpoint: Option<PathBuf>,
    /// Will die when they next need a page that they have not.
    cut_off: Vec<User>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
    /// The mountpoint is still there, and dead.
    still_mounted: bool,
}

impl Report for Aborted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "FUSE connection {} is aborted", self.connection)?;
        if !self.cut_off.is_empty() {
            writeln!(out, "these were cut off: {}", list(&self.cut_off))?;
        }
        if !self.unseen.is_empty() {
            writeln!(out, "{}", unseen(&self.unseen))?;
        }
        match &self.mountpoint {
            Some(path) if self.still_mounted => {
                writeln!(out, "{0} is dead now: umount -l {0} takes it away", path.display())
            }
            _ => Ok(()),
        }
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Aborts one of them: that number, or the only one. Asks before, unless `yes`.
///
/// # Errors
/// When that one is not stuck, several are and none is named, nobody can be asked, or the answer is no.
pub fn fix(number: Option<u32>, yes: bool) -> Result<Aborted> {
    let stuck = choose(find()?, number)?;
    let name = stuck.name();
    let users = Users { found: stuck.users, unseen: stuck.unseen };
    crate::say!("stencil: {name} is to be aborted: all requests on it fail from then on");
    users.announce();
    if !yes {
        ask()?;
    }
    let device = procfs::makedev(0, stuck.connection);
    match mount::abort_fuse_connection(device) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        other => other
            .map_err(|e| Error::failed(format!("cannot abort {name}")).because(e).remedy("run it as root"))?,
    }
    let until = Instant::now() + END;
    let waits = || {
        fusectl::connections().map(|all| all.iter().any(|c| c.number == stuck.connection && c.waiting > 0))
    };
    while waits()? && Instant::now() < until {
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
    const LIST: &str = "stencil doctor lists the connections that are stuck";
    match (number, stuck.len()) {
        (Some(number), _) => match stuck.iter().position(|s| s.connection == number) {
            Some(at) => Ok(stuck.swap_remove(at)),
            None if fusectl::connections()?.iter().any(|c| c.number == number) => {
                Err(Error::usage(format!("FUSE connection {number} is not stuck: its requests are answered"))
                    .remedy(LIST))
            }
            None => Err(Error::not_found(format!("there is no FUSE connection {number}")).remedy(LIST)),
        },
        (None, 1) => Ok(stuck.swap_remove(0)),
        (None, 0) => Err(Error::not_found("no FUSE connection is stuck").remedy("nothing needs to be done")),
        (None, count) => {
            let names: Vec<String> = stuck.iter().map(Stuck::name).collect();
            Err(Error::usage(format!("{count} connections are stuck: {}", names.join(", ")))
                .remedy("name one: stencil doctor --fix-stuck N"))
        }
    }
}

fn ask() -> Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::usage("nobody can be asked: standard input is no terminal")
            .remedy("add --yes where the abort is meant"));
    }
    let _ = write!(io::stderr(), "abort it? [y/N] ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|e| Error::failed("cannot read the answer").because(e))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Error::failed("nothing was aborted: the answer was not y").remedy("its users wait on")),
    }
}
