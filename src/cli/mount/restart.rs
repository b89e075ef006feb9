//! `stencil restart`: replaces the daemon of a mount without unmounting.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::control::{self, Mount};
use crate::error::{Error, Result};
use crate::sys::files::stream::open_source;

/// Replace the daemon of a mount without interrupting clones
///
/// Without --server, the installed stencil-mountd replaces the supervisor and the server. With --server, the given
/// program replaces the server only. If the new server does not serve within 5 s, it is terminated and the old server
/// continues.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil restart /srv/templates
  stencil restart --all
  stencil restart /srv/templates --server ./stencil-mountd")]
pub struct RestartArgs {
    /// Mountpoint
    #[arg(value_name = "MNT", required_unless_present = "all")]
    mountpoint: Option<PathBuf>,
    /// Restart the daemons of all mounts
    #[arg(long, conflicts_with = "mountpoint")]
    all: bool,
    /// Program of the new server
    #[arg(long, value_name = "PATH")]
    server: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Restarted {
    mounts: Vec<One>,
}

#[derive(Debug, Serialize)]
struct One {
    #[serde(serialize_with = "crate::sanitize::path")]
    mountpoint: PathBuf,
    supervisor_pid: u32,
    version: String,
    server_pid: Option<u32>,
    server_version: Option<String>,
}

impl Report for Restarted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for one in &self.mounts {
            writeln!(
                out,
                "{}: supervisor {} ({}), server {} ({})",
                one.mountpoint.display(),
                one.supervisor_pid,
                one.version,
                one.server_pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string()),
                one.server_version.as_deref().unwrap_or("unknown version")
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Restarts the daemon of one mount or of all mounts in turn, and stops at the first failure.
///
/// # Errors
/// Returns the reason why the new server does not serve; the old server then continues. Returns `Code::NotFound` if no
/// mount is at the given path; with `--all`, no mount is not an error.
pub fn run(args: &RestartArgs, global: &Global) -> Result<Done> {
    let path = match &args.server {
        Some(path) => path.clone(),
        None => control::find_daemon()?,
    };
    let program = open_source(&path).map_err(|e| Error::io("cannot open the program", &path, e))?;
    let mut restarted = Restarted { mounts: Vec::new() };
    for mount in chosen(args, global)? {
        if mount.orphaned {
            return Err(mount.lost_supervisor());
        }
        control::request_restart(&mount, program.as_fd(), args.server.is_none())
            .map_err(|e| e.context(mount.mountpoint.display()))?;
        let status = mount.status()?;
        restarted.mounts.push(One {
            mountpoint: status.mountpoint,
            supervisor_pid: status.supervisor_pid,
            version: status.version,
            server_pid: status.server_pid,
            server_version: status.server_version,
        });
    }
    Ok(Done::report(restarted))
}

fn chosen(args: &RestartArgs, global: &Global) -> Result<Vec<Mount>> {
    let mut mounts = control::mounts()?;
    let Some(path) = &args.mountpoint else {
        let filter = StoreFilter::of(global)?;
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
        return Ok(mounts);
    };
    let path = crate::cli::mount::umount::absolute(path)?;
    // A detached mount and a newer mount may have the same path. The newer mount is meant.
    mounts.retain(|mount| mount.mountpoint == path);
    mounts.sort_by_key(|mount| mount.detached);
    mounts.truncate(1);
    match mounts.is_empty() {
        false => Ok(mounts),
        true => Err(Error::not_found("no Stencil mount at this path")
            .at(path)
            .hint("run 'stencil status' to list the mounts")),
    }
}
