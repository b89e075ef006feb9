//! `stencil tag`: one more name for a template.

use clap::Args;

use super::Global;
use super::output::Done;
use super::words::word;
use crate::error::Result;
use crate::store::{Store, TagName, TemplateRef};

/// Point a name at a template
#[derive(Debug, Args)]
pub struct TagArgs {
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// The name that points at it from now on
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<TagName>)]
    new: TagName,
}

/// Runs it.
///
/// # Errors
/// When there is no such template.
pub fn run(args: &TagArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    store.set_tag(&args.new, &digest)?;
    Ok(Done::silent())
}
