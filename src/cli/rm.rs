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
            if !removed.kept_tags.is_empty() {
                let names: Vec<String> = removed.kept_tags.iter().map(ToString::to_string).collect();
                writeln!(out, "the template stays as {}", names.join(", "))?;
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
/// When there is no such template, or somebody uses it; what was removed before is told.
pub fn run(args: &RmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    // A name that is mistyped is found before anything goes.
    args.templates.iter().try_for_each(|template| store.expect_removable(template))?;
    let mut gone = Gone(Vec::new());
    for template in &args.templates {
        match removal::remove(&store, template) {
            Ok(removed) => gone.0.push(removed),
            Err(error) if gone.0.is_empty() => return Err(error),
            Err(error) => return Ok(Done::report(gone).but_failed(error)),
        }
    }
    Ok(Done::report(gone))
}
