//! `stencil gc`: gives back what nobody needs.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::Value;

use super::output::{Done, Report, to_json};
use super::{Global, interrupt};
use crate::clones::removal;
use crate::control;
use crate::error::{Code, Result};
use crate::progress::Progress;
use crate::store::{Collect, Collected, Digest, Store};

/// Give back what no template needs
///
/// Removed templates leave their blocks behind, since others may need them. This removes packs that nobody needs, and
/// rewrites packs of which little is needed; with --all every pack with an unreferenced record. Imports wait meanwhile; mounts and clones go on.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Change nothing, say what would be given back
    #[arg(long)]
    dry_run: bool,
    /// Also remove templates without a tag that nobody uses
    #[arg(long)]
    untagged: bool,
    /// Rewrite every pack with an unreferenced record, however much of it is needed
    #[arg(long)]
    all: bool,
}

#[derive(serde::Serialize)]
struct Collection {
    dry_run: bool,
    /// Templates without a tag that are gone.
    removed_templates: Vec<Digest>,
    /// Those that somebody uses.
    kept_templates: Vec<Digest>,
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
        for digest in &self.removed_templates {
            writeln!(out, "template {digest} {}", if self.dry_run { "would be removed" } else { "removed" })?;
        }
        for digest in &self.kept_templates {
            writeln!(out, "template {digest} has no tag and stays: it is in use, or Stencil cannot tell")?;
        }
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
            writeln!(
                out,
                "{dead_bytes} unreferenced in packs that are still in use; stencil gc --all rewrites them"
            )?;
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
    let mut collection = Collection {
        dry_run: args.dry_run,
        removed_templates: Vec::new(),
        kept_templates: Vec::new(),
        collected: Collected::default(),
    };
    match collect(args, &store, (&stop, &*global.progress()), &mut collection) {
        Ok(()) => {}
        Err(error) if args.dry_run || collection.removed_templates.is_empty() => return Err(error),
        Err(error) => return Ok(Done::report(collection).but_failed(error)),
    }
    if !args.dry_run {
        // What a server has open keeps its room.
        let mounts = control::mounts_of(&store).unwrap_or_else(|error| {
            log::warn!("mounts are not told: {error}");
            Vec::new()
        });
        for mount in mounts.into_iter().filter(|m| !m.orphaned) {
            control::request_refresh(&mount).unwrap_or_else(|error| log::warn!("{error}"));
        }
    }
    Ok(Done::report(collection))
}

fn collect(
    args: &GcArgs,
    store: &Store,
    (stop, progress): (&AtomicBool, &dyn Progress),
    collection: &mut Collection,
) -> Result<()> {
    if args.untagged {
        store.expect_tags_readable()?;
        let untagged = store.untagged(&store.digests()?)?;
        if args.dry_run {
            let used: HashSet<Digest> =
                removal::used(store, &untagged)?.into_iter().map(|(digest, _)| digest).collect();
            (collection.kept_templates, collection.removed_templates) =
                untagged.into_iter().partition(|digest| used.contains(digest));
        } else {
            remove_untagged(store, &untagged, collection)?;
        }
    }
    let dry_run = args.dry_run.then_some(&*collection.removed_templates);
    collection.collected = store.collect(Collect { dry_run, all: args.all }, stop, progress)?;
    Ok(())
}

/// Keeps templates of which it cannot be known whether they are in use, with a warning.
fn remove_untagged(store: &Store, untagged: &[Digest], collection: &mut Collection) -> Result<()> {
    for batch in untagged.chunks(removal::BATCH) {
        let done = match removal::remove_untagged(store, batch) {
            Ok(done) => done,
            Err(error) if error.code() == Code::TryAgain => {
                log::warn!("{error}");
                collection.kept_templates.extend(batch);
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut failed = Ok(());
        for (digest, removed) in done {
            match removed {
                Ok(true) => collection.removed_templates.push(digest),
                // It has a tag now, or another command has removed it.
                Ok(false) => {}
                Err(error) if error.code() == Code::InUse => collection.kept_templates.push(digest),
                Err(error) if error.code() == Code::TryAgain => {
                    log::warn!("{error}");
                    collection.kept_templates.push(digest);
                }
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed?;
    }
    Ok(())
}
