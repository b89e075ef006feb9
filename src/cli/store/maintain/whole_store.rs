//! `stencil store`: commands for the directory of a store.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use crate::cli::interrupt;
use crate::cli::output::{Done, Report, confirm, to_json};
use crate::clones::counted;
use crate::control;
use crate::error::{Error, Result};
use crate::sanitize;
use crate::store::Store;

/// Unseal or remove a store that is not in use
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil store unseal /var/lib/stencil
  stencil store destroy /srv/old-templates")]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    Unseal(UnsealArgs),
    Destroy(DestroyArgs),
}

/// Unseal the packs of a store: make them changeable
///
/// A mount with `--serve kernel` makes packs immutable (chattr +i), because the kernel decodes them without a
/// comparison with their hashes. Other programs can then neither remove nor rename them: `rm -r` and `mv` to another
/// file system fail with EPERM. The next mount with `--serve kernel` seals the packs and verifies the files again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil store unseal /var/lib/stencil
  stencil store unseal --json /srv/templates")]
struct UnsealArgs {
    /// Directory of the store
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Remove a store with all its templates
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil store destroy /srv/old-templates
  stencil store destroy --yes /srv/old-templates")]
struct DestroyArgs {
    /// Do not ask for a confirmation
    #[arg(long)]
    yes: bool,
    /// Directory of the store
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Serialize)]
struct Unsealed {
    #[serde(serialize_with = "sanitize::path")]
    store: PathBuf,
    unsealed_packs: u64,
}

impl Report for Unsealed {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} unsealed", counted(self.unsealed_packs, "pack", "packs"))
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

#[derive(Serialize)]
struct Destroyed {
    #[serde(serialize_with = "sanitize::path")]
    store: PathBuf,
    removed_templates: u64,
}

impl Report for Destroyed {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let templates = counted(self.removed_templates, "template", "templates");
        writeln!(out, "{} removed, with {templates}", sanitize::path_text(&self.store))
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Opens a store that no mount serves.
///
/// # Errors
/// Returns [`Code::InUse`](crate::error::Code::InUse) if the store is mounted, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) if that is unknown.
fn unused(dir: &Path) -> Result<Store> {
    let store = Store::open(dir)?;
    match control::every_mount_of(&store)?.first() {
        None => Ok(store),
        Some(mount) => {
            Err(Error::in_use(format!("the store is mounted on {}", sanitize::path_text(&mount.mountpoint)))
                .at(dir)
                .hint("end its clones, then run 'stencil umount MNT'"))
        }
    }
}

/// Removes the directory of a store, unless it is a mountpoint.
fn remove_directory(dir: &Path) -> Result<()> {
    match std::fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        Err(e) => {
            let has_others = e.kind() == io::ErrorKind::DirectoryNotEmpty;
            let error = Error::io("the templates are removed, but not the directory of the store", dir, e);
            Err(match has_others {
                true => error.hint("the directory has other files: remove them, then the directory"),
                false => error,
            })
        }
    }
}

/// Runs the command for a store.
///
/// # Errors
/// Returns an error if the store is in use or cannot be changed.
pub fn run(args: &StoreArgs) -> Result<Done> {
    let interrupt = interrupt::flag()?;
    match &args.command {
        StoreCommand::Unseal(args) => {
            let store = unused(&args.dir)?;
            let unsealed_packs = store.unseal(&interrupt, || unused(&args.dir).map(drop))?;
            Ok(Done::report(Unsealed { store: store.dir().to_owned(), unsealed_packs }))
        }
        StoreCommand::Destroy(args) => {
            let store = unused(&args.dir)?;
            let (dir, removed_templates) = (store.dir().to_owned(), store.digests()?.len() as u64);
            if !args.yes {
                let what = counted(removed_templates, "template", "templates");
                confirm(&format!("remove {} with {what}?", sanitize::path_text(&dir)))?;
            }
            store.destroy(&interrupt, || unused(&args.dir).map(drop))?;
            remove_directory(&dir)?;
            Ok(Done::report(Destroyed { store: dir, removed_templates }))
        }
    }
}
