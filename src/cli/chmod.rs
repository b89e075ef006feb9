//! `stencil chmod` and `stencil chown`: who may read a template's files in a mount.

use clap::Args;

use super::Global;
use super::output::Done;
use super::words::{mode, word};
use crate::error::Result;
use crate::store::{Owner, Store, TemplateRef};

/// Change who may read a template
#[derive(Debug, Args)]
pub struct ChmodArgs {
    /// Read bits in octal: 0444, 0440, 0400
    #[arg(value_parser = mode)]
    mode: u32,
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
}

/// Change the owner of a template
#[derive(Debug, Args)]
pub struct ChownArgs {
    /// User and group by name or number: U, U:G or :G
    #[arg(value_name = "U[:G]", value_parser = word::<Owner>)]
    owner: Owner,
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
}

/// Runs `chmod`.
///
/// # Errors
/// When there is no such template.
pub fn run(args: &ChmodArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    store.set_policy(&digest, |policy| policy.mode = args.mode)?;
    Ok(Done::silent())
}

/// Runs `chown`.
///
/// # Errors
/// When there is no such template.
pub fn run_chown(args: &ChownArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    store.set_policy(&digest, |policy| args.owner.apply(policy))?;
    Ok(Done::silent())
}
