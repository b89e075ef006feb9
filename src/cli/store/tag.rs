//! `stencil tag`: adds or moves a tag.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::error::Result;
use crate::store::{Digest, Moved, Store, TagName, TemplateRef};

/// Point a tag at a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil tag web:1 web:stable
  stencil tag 5f3c9a1e web:2")]
pub struct TagArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Tag to create or move
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<TagName>)]
    new: TagName,
}

#[derive(Serialize)]
struct TagReport {
    digest: Digest,
    tag: TagName,
    /// The tag, if it pointed at another template before.
    moved: Vec<Moved>,
}

impl Report for TagReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        self.moved.iter().try_for_each(|moved| writeln!(out, "{moved}"))
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil tag`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist.
pub fn run(args: &TagArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let moved = store.set_tag(&args.new, &digest)?.into_iter().collect();
    Ok(Done::report(TagReport { digest, tag: args.new.clone(), moved }))
}
