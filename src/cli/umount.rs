//! `stencil umount`: end a mount.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::output::{Done, Report, to_json};
use super::users::{User, Users, list, unseen};
use crate::control::{self, Mount, UnmountMode};
use crate::error::{Error, Result};
use crate::sys::mount;

/// A mount that was told to end has ended within this time, or somebody else still holds it.
const END: Duration = Duration::from_secs(10);

/// A supervisor whose record says nothing any more has ended within this time.
const LAST_STEPS: Duration = Duration::from_secs(1);

/// Unmount; refused while clones map it
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Where it is mounted
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Take it out of the tree now; it is served until its last clone ends
    #[arg(short, long)]
    lazy: bool,
    /// End it now: clones that still need pages from it die
    #[arg(long, conflicts_with = "lazy")]
    force: bool,
}

#[derive(Debug, Serialize)]
struct Unmounted {
    #[serde(serialize_with = "crate::shown::path")]
    mountpoint: PathBuf,
    /// Still served, for these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    served_until_they_end: Vec<User>,
    /// Will die when they next need a page that they have not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cut_off: Vec<User>,
    /// Processes that could not be looked into: each may be one more user.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
}

impl Unmounted {
    fn new(mountpoint: PathBuf) -> Unmounted {
        Unmounted { mountpoint, served_until_they_end: vec![], cut_off: vec![], unseen: vec![] }
    }
}

impl Report for Unmounted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} is unmounted", self.mountpoint.display())?;
        if !self.served_until_they_end.is_empty() {
            writeln!(out, "it is served until these end: {}", list(&self.served_until_they_end))?;
        }
        if !self.cut_off.is_empty() {
            writeln!(out, "these were cut off: {}", list(&self.cut_off))?;
        }
        if !self.unseen.is_empty() {
            writeln!(out, "{}", unseen(&self.unseen))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Unmounts.
///
/// # Errors
/// [`Code::InUse`](crate::error::Code::InUse) with the users' list; not found where nothing is mounted.
pub fn run(args: &UmountArgs, global: &Global) -> Result<Done> {
    let path = absolute(&args.mountpoint)?;
    let mode = match (args.lazy, args.force) {
        (true, _) => UnmountMode::Lazy,
        (_, true) => UnmountMode::Force,
        _ => UnmountMode::Plain,
    };
    // A lazily unmounted one may share its path with a newer one: that is meant.
    let mounts = control::mounts()?;
    let here = || mounts.iter().filter(|m| m.mountpoint == path);
    let Some(found) = here().find(|m| !m.detached).or_else(|| here().next()) else {
        return without_supervisor(&path, args, global);
    };
    let users = Users::of(found.device, &found.processes())?;
    match mode {
        UnmountMode::Plain if users.found.iter().any(|u| u.maps) => return Err(in_use(found, &users)),
        UnmountMode::Force if !global.quiet => users.announce(),
        _ => {}
    }
    end(found, mode).map_err(|e| match e.code() {
        crate::error::Code::InUse if mode == UnmountMode::Plain => in_use(found, &users),
        _ => e,
    })?;
    let mut report = Unmounted::new(path);
    match mode {
        UnmountMode::Plain => wait_for_end(found)?,
        UnmountMode::Force => {
            wait_for_end(found)?;
            (report.cut_off, report.unseen) = (users.found, users.unseen);
        }
        UnmountMode::Lazy if users.is_empty() => wait_for_end(found)?,
        UnmountMode::Lazy => (report.served_until_they_end, report.unseen) = (users.found, users.unseen),
    }
    Ok(Done::report(report))
}

/// Asks the supervisor; where that has died, does it itself.
fn end(found: &Mount, mode: UnmountMode) -> Result<()> {
    if !found.orphaned {
        return control::request_unmount(found, mode);
    }
    let fail = |e: io::Error| match e.raw_os_error() {
        Some(libc::EBUSY) => Error::in_use("the mount is in use").at(&found.mountpoint),
        _ => Error::io("cannot unmount", &found.mountpoint, e),
    };
    let is_there = || Ok(mount::at(&found.mountpoint)?.is_some_and(|there| there.dev == found.device));
    // First: as long as it is attached, nobody else has its number.
    if mode == UnmountMode::Force && (found.detached || is_there()?) {
        abort(found.device).map_err(fail)?;
    }
    if !found.detached {
        mount::unmount(&found.mountpoint, mode != UnmountMode::Plain).map_err(fail)?;
    }
    Ok(())
}

/// Aborts the connection; one that is over already is fine.
fn abort(device: u64) -> io::Result<()> {
    match mount::abort_fuse_connection(device) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// A mount that no supervisor or server stands behind: dead, or not ours.
fn without_supervisor(path: &Path, args: &UmountArgs, global: &Global) -> Result<Done> {
    match mount::at(path)? {
        Some(there) if there.fs_type == mount::FS_TYPE => {
            let mut report = Unmounted::new(path.to_owned());
            if args.force {
                let users = Users::of(there.dev, &[])?;
                if !global.quiet {
                    users.announce();
                }
                (report.cut_off, report.unseen) = (users.found, users.unseen);
                abort(there.dev).map_err(|e| Error::io("cannot abort the connection", path, e))?;
            }
            mount::unmount(path, args.lazy || args.force).map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => Error::in_use("the mount is dead, and processes still hold it")
                    .at(path)
                    .remedy(format!("detach it: stencil umount -l {}", path.display())),
                _ => Error::io("cannot unmount", path, e),
            })?;
            // Its record goes with it.
            control::mounts()?;
            Ok(Done::report(report))
        }
        Some(there) => {
            Err(Error::usage(format!("a mount of type {} is there, none of Stencil", there.fs_type))
                .at(path)
                .remedy(format!("take that away with umount {}", path.display())))
        }
        None => Err(Error::not_found("nothing is mounted there")
            .at(path)
            .remedy("stencil status lists the mounts of Stencil")),
    }
}

fn wait_for_end(found: &Mount) -> Result<()> {
    let until = Instant::now() + END;
    let mut dead = None;
    while found.dir.exists() {
        let living = control::mounts()?.iter().any(|m| m.dir == found.dir);
        // A supervisor takes its record away file by file: the folder is the last of it.
        if !living && dead.get_or_insert_with(Instant::now).elapsed() > LAST_STEPS {
            break;
        }
        if Instant::now() > until {
            return Err(Error::in_use(
                "it is unmounted here, but served on: another mount namespace or open file holds it",
            )
            .at(&found.mountpoint)
            .remedy("stencil status shows it until its last user ends"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The path without symbolic links, and without asking what is mounted there: that may be dead.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    mount::place(path).map_err(|e| {
        Error::io("cannot find the mountpoint", path, e).remedy("stencil status lists the mounts of Stencil")
    })
}

fn in_use(mount: &Mount, users: &Users) -> Error {
    let clones = users.found.iter().filter(|u| u.maps).count();
    let mut what = match (clones, users.found.len()) {
        (0, 0) => "the mount is in use".to_owned(),
        (0, n) => format!("{n} processes have files of the mount open: {}", list(&users.found)),
        (n, _) => format!("{n} processes map templates of the mount: {}", list(&users.found)),
    };
    if !users.unseen.is_empty() {
        what = format!("{what}; {}", unseen(&users.unseen));
    }
    Error::in_use(what).at(&mount.mountpoint).remedy(match mount.detached {
        false => "stop them, or detach it with -l: they are then served until they end",
        true => "it is detached already, and ends when they do: stop them, or cut them off with --force",
    })
}
