//! `stencil status`: reports the state of the mounts.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::clones::counted;
use crate::clones::find::dead_mount::DeadMount;
use crate::clones::find::{self, CloneProcess, handlers};
use crate::control::{self, FileStatus, Mount, MountStatus, Served};
use crate::error::{Code, Error, Result};
use crate::sanitize::{sanitize, utc};
use crate::store::Store;
use crate::sys::process::paused;
use crate::units::{Bytes, whole};

/// Largest number of files that one reason names.
const MAX_NAMED: usize = 3;

/// Show the mounts: their supervisors and servers, and how each file is served
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil status
  stencil --store /srv/store status
  stencil status --json")]
pub struct StatusArgs {}

#[derive(Serialize)]
struct Status {
    mounts: Vec<Responsive>,
    /// Mounts whose supervisor does not respond, with the remedy.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    silent: Vec<Unresponsive>,
    /// Errors of records that cannot be read; each may belong to a mount.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unread: Vec<String>,
    /// Processes that could not be inspected; each may be a clone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
}

#[derive(Serialize)]
struct Responsive {
    #[serde(flatten)]
    mount: MountStatus,
    /// Reason why the store cannot be read. The clones of the mount are then unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    store_error: Option<String>,
}

#[derive(Serialize)]
struct Unresponsive {
    #[serde(serialize_with = "crate::sanitize::path")]
    mountpoint: PathBuf,
    store: PathBuf,
    state: State,
    server_pid: Option<u32>,
    /// `None` if the mount never had a log.
    #[serde(serialize_with = "crate::sanitize::optional_path")]
    log: Option<PathBuf>,
    /// Number of clones of a dead mount; not given if its store cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    clones: Option<u64>,
    error: String,
    remedy: String,
}

/// Reason why the supervisor of a mount does not respond.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// The supervisor is alive but does not respond.
    NoAnswer,
    /// The supervisor is dead, and its server continues to serve.
    NoSupervisor,
    /// The supervisor and the server are dead.
    Dead,
}

impl Unresponsive {
    fn new(mount: &Mount, error: &Error) -> Unresponsive {
        let paused = paused::of(mount.supervisor_pid).filter(|_| !mount.foreign && !mount.orphaned);
        let (error, remedy) = match paused {
            Some(pause) => {
                let pid = mount.supervisor_pid;
                (format!("supervisor {pid} does not respond: it {pause}"), pause.remedy(pid))
            }
            None => (error.to_string(), error.hint_text().unwrap_or("see the log").to_owned()),
        };
        Unresponsive {
            state: State::NoAnswer,
            server_pid: mount.server_pid,
            log: mount.log(),
            clones: None,
            error,
            remedy,
            mountpoint: mount.mountpoint.clone(),
            store: mount.store.clone(),
        }
    }

    fn without_supervisor(mount: &Mount) -> Unresponsive {
        let error = mount.lost_supervisor();
        Unresponsive {
            state: State::NoSupervisor,
            error: error.message().to_owned(),
            ..Unresponsive::new(mount, &error)
        }
    }

    /// `with_clones` are the dead mounts whose clones are known.
    fn dead(mount: &Mount, with_clones: &[DeadMount]) -> Unresponsive {
        let error = mount.lost_both();
        let clones = with_clones.iter().find(|dead| dead.device == mount.device);
        Unresponsive {
            state: State::Dead,
            clones: clones.map(|dead| dead.clones),
            error: error.message().to_owned(),
            ..Unresponsive::new(mount, &error)
        }
    }
}

impl Report for Status {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.mounts.is_empty() && self.silent.is_empty() && self.unread.is_empty() {
            return writeln!(out, "no mounts");
        }
        for (i, mount) in self.mounts.iter().enumerate() {
            if i > 0 {
                writeln!(out)?;
            }
            one(mount, out)?;
        }
        for silent in &self.silent {
            writeln!(out, "{}: {}", silent.mountpoint.display(), silent.error)?;
            if let Some(clones) = silent.clones {
                let map = if clones == 1 { "maps" } else { "map" };
                writeln!(out, "  {} still {map} its templates", counted(clones, "clone", "clones"))?;
            }
            writeln!(out, "  hint: {}", silent.remedy)?;
            log_line(silent.log.as_deref(), out)?;
        }
        for error in &self.unread {
            writeln!(out, "{error}")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

fn log_line(log: Option<&Path>, out: &mut dyn Write) -> io::Result<()> {
    log.map_or(Ok(()), |log| writeln!(out, "  log {}", log.display()))
}

fn one(Responsive { mount, store_error }: &Responsive, out: &mut dyn Write) -> io::Result<()> {
    let read_ahead = mount.read_ahead.filter(|size| *size != control::DEFAULT_READ_AHEAD);
    let read_ahead = read_ahead.map_or_else(String::new, |size| format!(", read-ahead {size}"));
    let detached = if mount.detached { ", detached: served until its last user exits" } else { "" };
    writeln!(
        out,
        "{} serves {} ({}{read_ahead}){detached}",
        mount.mountpoint.display(),
        mount.store.display(),
        mount.serve
    )?;
    if let Some(error) = store_error {
        writeln!(
            out,
            "  {error}; requests for data of the store wait, and the clones of the mount are unknown"
        )?;
    }
    let server = mount.server_pid.map_or_else(|| "being started".to_owned(), |pid| pid.to_string());
    writeln!(
        out,
        "  supervisor {} ({}), server {server} ({}), {}",
        mount.supervisor_pid,
        mount.version,
        mount.server_version.as_deref().unwrap_or("unknown version"),
        counted(mount.restarts, "restart", "restarts")
    )?;
    if let Some(end) = &mount.last_end {
        let memory = if end.out_of_memory {
            ", likely out of memory: raise the memory limit of its control group"
        } else {
            ""
        };
        writeln!(
            out,
            "  previous server {} exited at {} after {:.1} s: {}{memory}",
            end.pid,
            utc(end.at),
            end.lived_seconds,
            end.how
        )?;
    }
    if let Some(at) = mount.next_start {
        let early = mount.early_ends;
        writeln!(
            out,
            "  {} in a row soon after startup; the next server starts at {}",
            counted(early.into(), "server exited", "servers exited"),
            utc(whole(at))
        )?;
    }
    log_line(mount.log.as_deref(), out)?;
    for lack in &mount.server_lacks {
        writeln!(out, "  the server is not fully confined: {lack}")?;
    }
    match (&mount.cache, &mount.cache_why) {
        (Some(place), why) => {
            writeln!(out, "  backings in {place}: {} of {}", mount.cache_used, mount.cache_size)?;
            if let Some(why) = why {
                writeln!(out, "  {why}")?;
            }
        }
        (None, Some(why)) => writeln!(out, "  no backings: {why}")?,
        (None, None) => {}
    }
    let mut table =
        Columns::new(&[Text("  TEMPLATE"), Text("FILE"), Number("SIZE"), Text("SERVING"), Number("CLONES")]);
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for template in &mount.templates {
        for file in &template.files {
            table.row([
                format!("  {}", template.digest.short()),
                file.name.clone(),
                file.size.to_string(),
                serving(file),
                template.clones.map_or_else(|| "?".into(), |clones| clones.to_string()),
            ]);
            if let Some(why) = &file.why {
                let files = reasons.entry(why).or_default();
                files.push(format!("{}/{}", template.digest.short(), file.name));
            }
        }
    }
    table.print(out)?;
    reasons.iter().try_for_each(|(why, files)| {
        let first = files.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(", ");
        match files.len().saturating_sub(MAX_NAMED) {
            0 => writeln!(out, "  {first}: {}", sanitize(why)),
            more => writeln!(out, "  {first} and {more} more: {}", sanitize(why)),
        }
    })
}

/// Describes how a file is served. Without a complete backing, passthrough begins after the next open has filled it.
fn serving(file: &FileStatus) -> String {
    let name = file.serving.name();
    match (file.serving, file.hydrated, file.hydrated_bytes) {
        (Served::Decode | Served::Kernel, ..) | (_, true, _) => name.to_owned(),
        (Served::Passthrough, false, Bytes::ZERO) => format!("{name}, not hydrated yet"),
        (Served::Passthrough, false, filled) => format!("{name}, {filled} hydrated"),
    }
}

/// Returns the reason why the store of a mount cannot be read, `None` if the store can be read.
fn store_error(mount: &Mount) -> Option<String> {
    let opened = Store::open(&mount.store).and_then(|store| {
        store.check_reachable()?;
        if mount.store_id != store.id() {
            return Err(Error::try_again("another store is at the path of the store").at(&mount.store));
        }
        Ok(())
    });
    opened.err().map(|error| error.to_string())
}

/// Requests the status of every supervisor of this runtime directory. The command exits with
/// [`Code::CheckFailed`] if a mount has, or may have, no supervisor that responds.
///
/// # Errors
/// Returns an error if the runtime directory cannot be read.
pub fn run(_args: &StatusArgs, global: &Global) -> Result<Done> {
    let filter = StoreFilter::of(global)?;
    let control::Listing { mut mounts, mut dead, unread } = control::list()?;
    mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
    dead.retain(|mount| filter.has(&mount.store, &mount.store_id));
    let unread = unread.iter().map(ToString::to_string).collect();
    let mut status = Status { mounts: Vec::new(), silent: Vec::new(), unread, unseen: Vec::new() };
    let store_errors: Vec<Option<String>> = mounts.iter().map(store_error).collect();
    let mut present: Vec<Mount> =
        mounts.iter().zip(&store_errors).filter(|(_, e)| e.is_none()).map(|(m, _)| m.clone()).collect();
    present.extend(control::with_store(dead.clone()));
    let mut search = find::template_mappings(&present)?;
    handlers::take_out(&mut search.clones, |_| true)?;
    if let Some(holes) = search.holes() {
        log::warn!("{holes}");
    }
    status.unseen = search.unseen.pids();
    let with_clones = DeadMount::of(&present, search.clones.iter());
    status.silent = dead.iter().map(|mount| Unresponsive::dead(mount, &with_clones)).collect();
    let mut indexes = 0..;
    for (mount, store_error) in mounts.into_iter().zip(store_errors) {
        let index = if store_error.is_none() { indexes.next() } else { None };
        if mount.orphaned {
            status.silent.push(Unresponsive::without_supervisor(&mount));
            continue;
        }
        match mount.status() {
            Ok(mut answer) => {
                for template in &mut answer.templates {
                    template.clones = index.map(|index| {
                        let maps = |c: &&CloneProcess| {
                            c.maps.iter().any(|m| m.mount == index && m.digest == template.digest)
                        };
                        search.clones.iter().filter(maps).count() as u64
                    });
                }
                status.mounts.push(Responsive { mount: answer, store_error });
            }
            // The mount may have ended since it was listed.
            Err(error) if control::lives(&mount).unwrap_or(true) => {
                status.silent.push(Unresponsive::new(&mount, &error));
            }
            Err(_) => {}
        }
    }
    let is_healthy = status.silent.is_empty() && status.unread.is_empty();
    let done = Done::report(status);
    Ok(if is_healthy { done } else { done.exit_as(Code::CheckFailed) })
}
