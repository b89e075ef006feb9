//! `stencil status`: which mounts there are, and how they do.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::columns::Columns;
use super::output::{Done, Report, to_json};
use crate::clones::find::{self, CloneProcess};
use crate::control::{self, MountStatus};
use crate::error::Result;

/// Show the mounts: who serves them, what is served how, and why
#[derive(Debug, Args)]
pub struct StatusArgs {}

#[derive(Serialize)]
struct Status {
    mounts: Vec<MountStatus>,
    /// Mounts whose supervisor does not answer, and what is wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    silent: Vec<Silent>,
    /// Records of mounts that could not be read: each may be one more mount.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unread: Vec<String>,
    /// Processes that could not be looked into in time: each may be one more clone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unseen: Vec<u32>,
}

#[derive(Serialize)]
struct Silent {
    mountpoint: std::path::PathBuf,
    server_pid: Option<u32>,
    error: String,
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

fn one(mount: &MountStatus, out: &mut dyn Write) -> io::Result<()> {
    let detached = if mount.detached { ", detached: served until its last user ends" } else { "" };
    writeln!(
        out,
        "{} serves {} ({}){detached}",
        mount.mountpoint.display(),
        mount.store.display(),
        mount.serve
    )?;
    let server = mount.server_pid.map_or_else(|| "being started".to_owned(), |pid| pid.to_string());
    writeln!(
        out,
        "  supervisor {} ({}), server {server} ({}), {} restarts",
        mount.supervisor_pid,
        mount.version,
        mount.server_version.as_deref().unwrap_or("not known"),
        mount.restarts
    )?;
    for lack in &mount.server_lacks {
        writeln!(out, "  the server is less isolated than it could be: {lack}")?;
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
    let mut table = Columns::new(&["  TEMPLATE", "FILE", "SIZE", "SERVING", "HYDRATED", "CLONES", "WHY"]);
    for template in &mount.templates {
        for file in &template.files {
            table.row([
                format!("  {}", template.digest.short()),
                file.name.clone(),
                file.size.to_string(),
                file.serving.name().to_owned(),
                if file.hydrated { "yes".into() } else { file.hydrated_bytes.to_string() },
                template.clones.to_string(),
                file.why.clone().unwrap_or_default(),
            ]);
        }
    }
    table.print(out)
}

/// Asks every supervisor of this runtime directory.
///
/// # Errors
/// When the runtime directory cannot be read.
pub fn run(_args: &StatusArgs, _global: &Global) -> Result<Done> {
    let (mounts, unread) = control::mounts_and_unread()?;
    let unread = unread.iter().map(ToString::to_string).collect();
    let mut status = Status { mounts: Vec::new(), silent: Vec::new(), unread, unseen: Vec::new() };
    let search = find::template_mappings(&mounts)?;
    if let Some(holes) = search.holes() {
        log::warn!("{holes}");
    }
    status.unseen = search.unseen;
    for (index, mount) in mounts.into_iter().enumerate() {
        match mount.status() {
            Ok(mut answer) => {
                for template in &mut answer.templates {
                    let maps = |c: &&CloneProcess| {
                        c.maps.iter().any(|m| m.mount == index && m.digest == template.digest)
                    };
                    template.clones = search.clones.iter().filter(maps).count() as u64;
                }
                status.mounts.push(answer);
            }
            Err(error) => status.silent.push(Silent {
                mountpoint: mount.mountpoint,
                server_pid: mount.server_pid,
                error: error.to_string(),
            }),
        }
    }
    Ok(Done::report(status))
}
