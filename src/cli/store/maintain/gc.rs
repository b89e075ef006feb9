//! `stencil gc`: frees the space of unreferenced records.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::{Global, interrupt};
use crate::clones::{counted, removal};
use crate::control;
use crate::error::{Code, Result};
use crate::progress::Progress;
use crate::store::{Collect, Collected, Digest, Store};

/// Free the space that no template references
///
/// The blocks of a removed template stay in the store, because other templates may reference them. This command removes
/// packs without referenced records, and rewrites packs that are at least half unreferenced. While all other packs
/// together hold much unreferenced data, the command also rewrites the packs with the largest unreferenced share. With
/// --all, it rewrites every pack that has an unreferenced record. Imports wait during the run; mounts and clones are
/// not affected.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil gc --dry-run
  stencil gc
  stencil gc --untagged --all")]
pub struct GcArgs {
    /// Report the space that would be freed, without changing the store
    #[arg(long)]
    dry_run: bool,
    /// Also remove templates that have no tag and are not in use
    #[arg(long)]
    untagged: bool,
    /// Rewrite every pack with an unreferenced record, regardless of its share of referenced records
    #[arg(long)]
    all: bool,
}

#[derive(serde::Serialize)]
struct Collection {
    dry_run: bool,
    /// Removed templates, which had no tag.
    removed_digests: Vec<Digest>,
    /// Templates without a tag that are in use, or whose use is unknown.
    kept_digests: Vec<Digest>,
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
        for digest in &self.removed_digests {
            writeln!(out, "template {digest} {}", if self.dry_run { "would be removed" } else { "removed" })?;
        }
        for digest in &self.kept_digests {
            writeln!(out, "template {digest} has no tag and is kept, because it may be in use")?;
        }
        let would = if self.dry_run { "would be " } else { "" };
        writeln!(out, "{freed_bytes} {would}freed ({} bytes)", freed_bytes.get())?;
        write!(out, "{} {would}removed", counted(*removed_packs, "pack", "packs"))?;
        if *repacked_packs > 0 {
            let (packs, templates) =
                (counted(*new_packs, "new pack", "new packs"), counted(*placements, "template", "templates"));
            write!(
                out,
                "; {repacked_packs} of them {would}rewritten as {packs}; placements of {templates} {would}updated"
            )?;
        }
        writeln!(out)?;
        if *sessions > 0 {
            let directories = counted(*sessions, "session directory", "session directories");
            let removed = if self.dry_run { "would remove" } else { "removed" };
            writeln!(out, "{removed} {directories} that killed commands had left")?;
        }
        if dead_bytes.get() > 0 {
            writeln!(
                out,
                "{dead_bytes} of unreferenced records remain in packs that are in use; 'stencil gc --all' rewrites \
                 these packs"
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil gc`.
///
/// # Errors
/// Returns an error if the store cannot be written, or if the references of a damaged template are unknown.
pub fn run(args: &GcArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let stop = interrupt::flag()?;
    let mut collection = Collection {
        dry_run: args.dry_run,
        removed_digests: Vec::new(),
        kept_digests: Vec::new(),
        collected: Collected::default(),
    };
    match collect(args, &store, (&stop, &*global.progress()), &mut collection) {
        Ok(()) => {}
        Err(error) if args.dry_run || collection.removed_digests.is_empty() => return Err(error),
        Err(error) => return Ok(Done::report(collection).but_failed(error)),
    }
    if !args.dry_run {
        // Disk space is freed only when the servers close their descriptors of removed packs.
        let mounts = control::mounts_of(&store).unwrap_or_else(|error| {
            log::warn!("cannot notify the mounts of the store: {error}");
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
            let used: HashSet<Digest> = match removal::used(store, &untagged) {
                Ok(used) => used.into_iter().map(|(digest, _)| digest).collect(),
                Err(error) if error.code() == Code::TryAgain => {
                    log::warn!("{error}");
                    untagged.iter().copied().collect()
                }
                Err(error) => return Err(error),
            };
            (collection.kept_digests, collection.removed_digests) =
                untagged.into_iter().partition(|digest| used.contains(digest));
        } else {
            remove_untagged(store, &untagged, collection)?;
        }
    }
    let dry_run = args.dry_run.then_some(&*collection.removed_digests);
    collection.collected = store.collect(Collect { dry_run, all: args.all }, stop, progress)?;
    Ok(())
}

/// Removes the templates. A template whose use is unknown is kept with a warning.
fn remove_untagged(store: &Store, untagged: &[Digest], collection: &mut Collection) -> Result<()> {
    for batch in untagged.chunks(removal::BATCH) {
        let done = match removal::remove_untagged(store, batch) {
            Ok(done) => done,
            Err(error) if error.code() == Code::TryAgain => {
                log::warn!("{error}");
                collection.kept_digests.extend(batch);
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut failed = Ok(());
        for (digest, removed) in done {
            match removed {
                Ok(true) => collection.removed_digests.push(digest),
                // The template has a tag now, or another command has removed the template.
                Ok(false) => {}
                Err(error) if error.code() == Code::InUse => collection.kept_digests.push(digest),
                Err(error) if error.code() == Code::TryAgain => {
                    log::warn!("{error}");
                    collection.kept_digests.push(digest);
                }
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed?;
    }
    Ok(())
}
