//! `stencil chmod` and `stencil chown`: change the permissions of a template's files in a mount.

use clap::Args;

use crate::cli::Global;
use crate::cli::output::Done;
use crate::cli::value_parsers::{mode, word};
use crate::error::Result;
use crate::store::{Owner, Store, TemplateRef};

/// Change the permission bits of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil chmod 0440 web:1
  stencil chmod 0400 5f3c9a1e")]
pub struct ChmodArgs {
    /// Read bits in octal: 0444, 0440 or 0400
    #[arg(value_parser = mode)]
    mode: u32,
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
}

/// Change the owner of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil chown root:107 web:1
  stencil chown :107 web:1")]
pub struct ChownArgs {
    /// User and group, by name or number: U, U:G or :G
    #[arg(value_name = "U[:G]", value_parser = word::<Owner>)]
    owner: Owner,
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
}

/// Runs `chmod`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist.
pub fn run(args: &ChmodArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    store.set_policy(&digest, |policy| policy.mode = args.mode)?;
    Ok(Done::silent())
}

/// Runs `chown`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist.
pub fn run_chown(args: &ChownArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    store.set_policy(&digest, |policy| args.owner.apply(policy))?;
    Ok(Done::silent())
}
