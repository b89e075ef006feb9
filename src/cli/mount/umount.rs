//! `stencil umount`: unmounts a store.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::users::{User, Users, list, unseen};
use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::clones::counted;
use crate::control::{self, Mount, UnmountMode};
use crate::error::{Error, Result};
use crate::sys::files::mount;

/// Time within which a mount must end after an unmount request; afterwards, another user still holds the mount.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time within which a supervisor must exit after its record does not name a mount any more.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Unmount a store that no clone maps
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil umount /srv/templates
  stencil umount -l /srv/templates
  stencil umount --force /srv/templates")]
pub struct UmountArgs {
    /// Mountpoint
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Detach the mount now, and serve it until its last clone exits
    #[arg(short, long)]
    lazy: bool,
    /// End the mount now; clones that still need pages from it are killed
    #[arg(long, conflicts_with = "lazy")]
    force: bool,
}

#[derive(Debug, Serialize)]
struct Unmounted {
    #[serde(serialize_with = "crate::sanitize::path")]
    mountpoint: PathBuf,
    /// Processes for which the detached mount is still served.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    served_until_they_end: Vec<User>,
    /// Processes that use the mount. A process whose file is served by decode is killed at its next access to a page
    /// that is not in RAM.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cut_off: Vec<User>,
    /// Processes that could not be inspected; each may also use the mount.
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
            writeln!(out, "served until these processes exit: {}", list(&self.served_until_they_end))?;
        }
        if !self.cut_off.is_empty() {
            writeln!(out, "processes cut off: {}", list(&self.cut_off))?;
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

/// Unmounts the store.
///
/// # Errors
/// Returns [`Code::InUse`](crate::error::Code::InUse) with a list of the users if the mount is in use, and
/// `Code::NotFound` if nothing is mounted at the path.
pub fn run(args: &UmountArgs, global: &Global) -> Result<Done> {
    let path = absolute(&args.mountpoint)?;
    let mode = match (args.lazy, args.force) {
        (true, _) => UnmountMode::Lazy,
        (_, true) => UnmountMode::Force,
        _ => UnmountMode::Plain,
    };
    // A detached mount and a newer mount may have the same path. The newer mount is meant.
    let control::Listing { mut mounts, dead, unread } = control::list()?;
    unread.iter().for_each(|error| log::warn!("{error}"));
    if mount::at(&path)?.is_none_or(|there| there.fs_type != mount::FS_TYPE) {
        mounts.extend(dead.into_iter().filter(|mount| mount.detached));
    }
    let here = || mounts.iter().filter(|m| m.mountpoint == path);
    let Some(found) = here().find(|m| !m.detached).or_else(|| here().next()) else {
        return without_supervisor(&path, args, global);
    };
    let users = Users::of(found.device, &found.processes())?;
    match mode {
        UnmountMode::Plain if users.found.iter().any(|u| u.maps) => return Err(in_use(found, &users)),
        // Nothing is left to detach, and no server will serve the users.
        UnmountMode::Plain | UnmountMode::Lazy if found.is_dead() => return Err(in_use(found, &users)),
        UnmountMode::Force if !global.quiet => users.announce(),
        _ => {}
    }
    end_mount(found, mode).map_err(|e| match e.code() {
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

/// Sends the unmount request to the supervisor. If the supervisor is dead, unmounts here.
fn end_mount(found: &Mount, mode: UnmountMode) -> Result<()> {
    if !found.orphaned {
        return control::request_unmount(found, mode);
    }
    let fail = |e: io::Error| match e.raw_os_error() {
        Some(libc::EBUSY) => Error::in_use("the mount is in use").at(&found.mountpoint),
        _ => Error::io("cannot unmount", &found.mountpoint, e),
    };
    let is_attached = || Ok(mount::at(&found.mountpoint)?.is_some_and(|there| there.dev == found.device));
    // Abort before unmounting: while the mount is attached, no other file system can get its device number.
    if mode == UnmountMode::Force && (found.detached || is_attached()?) {
        abort(found.device).map_err(fail)?;
    }
    if !found.detached {
        mount::unmount(&found.mountpoint, mode != UnmountMode::Plain).map_err(fail)?;
    }
    Ok(())
}

/// Aborts the connection. A connection that does not exist any more is no error.
fn abort(device: u64) -> io::Result<()> {
    match mount::abort_fuse_connection(device) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// Unmounts a mount that has neither supervisor nor server, or reports that the mount is not a Stencil mount.
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
                Some(libc::EBUSY) => Error::in_use("the mount is dead, but processes still use it")
                    .at(path)
                    .hint(format!("detach the mount: stencil umount -l {}", path.display())),
                _ => Error::io("cannot unmount", path, e),
            })?;
            // This removes the record, unless processes still use the mount.
            control::mounts()?;
            Ok(Done::report(report))
        }
        Some(there) => {
            Err(Error::usage(format!("the mount is of type {}, not a Stencil mount", there.fs_type))
                .at(path)
                .hint(format!("unmount the file system with umount {}", path.display())))
        }
        None => Err(Error::not_found("nothing is mounted at this path")
            .at(path)
            .hint("run 'stencil status' to list the mounts")),
    }
}

fn wait_for_end(found: &Mount) -> Result<()> {
    let until = Instant::now() + UNMOUNT_TIMEOUT;
    let mut dead = None;
    while found.dir.exists() {
        let living = control::mounts()?.iter().any(|m| m.dir == found.dir);
        // A supervisor removes the files of its record one by one, and the directory last.
        if !living && dead.get_or_insert_with(Instant::now).elapsed() > EXIT_TIMEOUT {
            break;
        }
        if Instant::now() > until {
            return Err(Error::in_use(
                "the mount is unmounted here but still served: another mount namespace or an open file uses the \
                 mount",
            )
            .at(&found.mountpoint)
            .hint("run 'stencil status' to see the mount until its last user exits"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Resolves symbolic links without accessing the file system that is mounted at the path, which may be dead.
pub(in crate::cli) fn absolute(path: &Path) -> Result<PathBuf> {
    mount::place(path).map_err(|e| {
        Error::io("cannot find the mountpoint", path, e).hint("run 'stencil status' to list the mounts")
    })
}

fn in_use(mount: &Mount, users: &Users) -> Error {
    let clones = users.found.iter().filter(|u| u.maps).count();
    let processes = |n: usize, verb: &str, verbs: &str| {
        counted(n as u64, &format!("process {verb}"), &format!("processes {verbs}"))
    };
    let mut what = match (clones, users.found.len()) {
        (0, 0) => "the mount is in use".to_owned(),
        (0, n) => format!("{} files of the mount open: {}", processes(n, "has", "have"), list(&users.found)),
        (n, _) => format!("{} templates of the mount: {}", processes(n, "maps", "map"), list(&users.found)),
    };
    if !users.unseen.is_empty() {
        what = format!("{what}; {}", unseen(&users.unseen));
    }
    Error::in_use(what).at(&mount.mountpoint).hint(match mount.detached {
        false => "stop the processes, or detach the mount with -l to serve it until they exit",
        true => "stop the processes, or end the mount with --force, which kills processes that still need its pages; the mount is \
                 detached already",
    })
}
