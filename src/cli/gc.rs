//! `stencil gc`: gives back what nobody needs.

use std::io::{self, Write};

use clap::Args;
use serde_json::Value;

use super::output::{Done, Report, to_json};
use super::{Global, interrupt};
use crate::error::Result;
use crate::store::{Collected, Store};

/// Give back what no template needs
///
/// Removed templates leave their blocks behind, since others may need them. This removes packs that nobody needs, and
/// writes packs of which little is needed anew. Imports wait meanwhile; mounts and clones go on.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Change nothing, say what would be given back
    #[arg(long)]
    dry_run: bool,
}

#[derive(serde::Serialize)]
struct Collection {
    dry_run: bool,
    #[serde(flatten)]
    collected: Collected,
}

impl Report for Collection {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Collected {
            sessions,
            removed_packs,
            repacked_packs,
            new_packs,
            placements,
            freed_bytes,
            dead_bytes,
        } = &self.collected;
        let would = if self.dry_run { "would be " } else { "" };
        writeln!(out, "{freed_bytes} {would}given back ({} bytes)", freed_bytes.get())?;
        writeln!(
            out,
            "{removed_packs} packs {would}removed, {repacked_packs} of them written anew as {new_packs}, for {placements} templates"
        )?;
        if *sessions > 0 {
            writeln!(out, "{sessions} folders of killed commands {would}removed")?;
        }
        if dead_bytes.get() > 0 {
            writeln!(out, "{dead_bytes} that nobody needs stay in packs that are mostly needed")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs it.
///
/// # Errors
/// When the store cannot be written, or it is not known what a damaged template needs.
pub fn run(args: &GcArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let stop = interrupt::flag()?;
    let collected = store.collect(args.dry_run, &stop, &*global.progress())?;
    Ok(Done::report(Collection { dry_run: args.dry_run, collected }))
}
