//! `stencil path`: prints the path of a template in a mount.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::control;
use crate::error::Result;
use crate::store::{Digest, Store, TemplateRef};

/// Print the path of a template in a mount
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil path web:1
  stencil path web:1/memory")]
pub struct PathArgs {
    /// Template, or one file of it
    #[arg(value_name = "T[/FILE]")]
    what: String,
}

#[derive(Serialize)]
struct Place {
    #[serde(serialize_with = "crate::sanitize::path")]
    path: PathBuf,
    digest: Digest,
    #[serde(serialize_with = "crate::sanitize::path")]
    mountpoint: PathBuf,
}

impl Report for Place {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.path.display())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil path`.
///
/// # Errors
/// Returns `Code::NotFound` if the template or the file does not exist, or the store is not mounted.
pub fn run(args: &PathArgs, global: &Global) -> Result<Done> {
    let (reference, file) = match args.what.split_once('/') {
        Some((reference, file)) => (reference, Some(file)),
        None => (args.what.as_str(), None),
    };
    let store = Store::open(&global.store)?;
    // The path contains the digest, because the tag may be moved while a guest still uses this template.
    let digest = store.resolve(&reference.parse::<TemplateRef>()?)?;
    let mount = control::mount_of(&store)?;
    let mut path = mount.mountpoint.join("by-id").join(digest.to_string());
    if let Some(file) = file {
        store.template(&digest)?.find_file(file)?;
        path.push(file);
    }
    Ok(Done::report(Place { path, digest, mountpoint: mount.mountpoint }))
}
