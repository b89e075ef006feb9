//! `stencil rm`: removes tags and templates.

use std::io::{self, Write};

use clap::Args;
use serde_json::Value;

use super::Global;
use super::output::{Done, Report, to_json};
use super::words::word;
use crate::clones::find;
use crate::control::{self, RemovalMark};
use crate::error::{Error, Result};
use crate::store::{Digest, Removed, Store, TemplateRef};

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
/// When there is no such template, or a process maps it.
pub fn run(args: &RmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let removed = args.templates.iter().map(|t| {
        let mut mark = None;
        store.remove(t, |digest| check_unused(&store, digest, &mut mark))
    });
    Ok(Done::report(Gone(removed.collect::<Result<_>>()?)))
}

/// Refuses while a process maps the template in any mount of this store, lazily unmounted ones too.
fn check_unused(store: &Store, digest: &Digest, mark: &mut Option<RemovalMark>) -> Result<()> {
    let mark = mark.insert(RemovalMark::announce(store, digest)?);
    mark.expect_no_lease()?;
    let mut mounts = control::mounts()?;
    mounts.retain(|m| m.store == store.dir());
    if mounts.is_empty() {
        return Ok(());
    }
    if let Err(error) = store.template(digest) {
        let why = format!("template {digest} is damaged, so its users cannot be found ({})", error.message());
        return Err(Error::in_use(why)
            .remedy("import the same memory again to repair it, or unmount the store first"));
    }
    let clones = find::template_mappings(&mounts)?.complete()?;
    let users = clones.iter().filter(|c| c.maps.iter().any(|m| m.digest == *digest));
    let pids: Vec<String> = users.map(|c| c.pid.to_string()).collect();
    match pids.len() {
        0 => Ok(()),
        count => Err(Error::in_use(format!(
            "template {digest} is in use: {count} processes map it: {}",
            pids.join(", ")
        ))
        .remedy("stop them first: stencil stop ends the clones that Stencil launched")),
    }
}
