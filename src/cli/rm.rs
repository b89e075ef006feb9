//! `stencil rm`: removes tags and templates.

use std::io::{self, Write};

use clap::Args;
use serde_json::Value;

use super::Global;
use super::output::{Done, Report, to_json};
use super::words::word;
use crate::clones::removal;
use crate::error::Result;
use crate::store::{Removed, Store, TemplateRef};

/// Remove a tag; the last one takes the template along
#[derive(Debug, Args)]
pub struct RmArgs {
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits; a digest goes with all its tags
    #[arg(value_name = "T", required = true, value_parser = word::<TemplateRef>)]
    templates: Vec<TemplateRef>,
}

struct Gone(Vec<Removed>);

impl Report for Gone {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for removed in &self.0 {
            for tag in &removed.tags {
                writeln!(out, "removed {tag}")?;
            }
            if let Some(digest) = &removed.template {
                writeln!(out, "removed template {digest}")?;
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        serde_json::json!({"removed": to_json(&self.0)})
    }
}

/// Runs it.
///
/// # Errors
/// When there is no such template, or somebody uses it.
pub fn run(args: &RmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let removed = args.templates.iter().map(|template| removal::remove(&store, template));
    Ok(Done::report(Gone(removed.collect::<Result<_>>()?)))
}
