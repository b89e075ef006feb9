//! `stencil rm`: removes tags and templates.

use std::io::{self, Write};

use clap::Args;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::clones::removal;
use crate::error::Result;
use crate::store::{Removed, Store, TemplateRef};

/// Remove tags, and each template whose last tag is removed
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil rm web:1
  stencil rm web:1 web:2
  stencil rm 5f3c9a1e")]
pub struct RmArgs {
    /// Tag (NAME[:TAG]), or a template with all its tags: NAME@blake3:HEX, or at least eight hex digits of the digest
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
                writeln!(out, "the template is kept as {}", names.join(", "))?;
            }
            if let Some(digest) = &removed.digest {
                writeln!(out, "removed template {digest}")?;
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        serde_json::json!({"removed": to_json(&self.0)})
    }
}

/// Runs `stencil rm`. If a removal fails, the report lists the removals before.
///
/// # Errors
/// Returns `Code::NotFound` if a template does not exist, and `Code::InUse` if a template is in use.
pub fn run(args: &RmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    // All names are checked before the first removal, so that a mistyped name removes nothing.
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
