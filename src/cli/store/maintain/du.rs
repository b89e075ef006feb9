//! `stencil du`: reports the disk space of the store.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::{Global, interrupt};
use crate::control::{self, LeaseHolder};
use crate::error::Result;
use crate::store::{Digest, Store, StoreUsage, TemplateUsage};
use crate::units::Bytes;

/// Show the disk space of templates, alone and shared
///
/// LOGICAL is the length of the template's files, UNIQUE the space that removing the template and `stencil gc
/// --all` would free, SHARED the space that other templates also use, and CACHE the passthrough backings in all mounts
/// of the store.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil du
  stencil --store /srv/store du --json")]
pub struct DuArgs {}

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    usage: TemplateUsage,
    cache_bytes: Option<Bytes>,
}

#[derive(Serialize)]
struct Totals {
    #[serde(flatten)]
    usage: StoreUsage,
    cache_bytes: Option<Bytes>,
}

struct Usage {
    templates: Vec<Line>,
    totals: Totals,
    leases: Vec<LeaseHolder>,
}

impl Report for Usage {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Columns::new(&[
            Text("TEMPLATE"),
            Text("DIGEST"),
            Number("LOGICAL"),
            Number("DATA"),
            Number("STORED"),
            Number("UNIQUE"),
            Number("SHARED"),
            Number("CACHE"),
        ]);
        let cache = |bytes: Option<Bytes>| bytes.map_or_else(|| "?".into(), |b| b.to_string());
        for Line { usage, cache_bytes } in &self.templates {
            table.row([
                if usage.tags.is_empty() { "-".into() } else { usage.tags.join(", ") },
                usage.digest.short(),
                usage.logical_bytes.to_string(),
                usage.data_bytes.to_string(),
                usage.stored_bytes.to_string(),
                usage.unique_bytes.to_string(),
                usage.shared_bytes.to_string(),
                cache(*cache_bytes),
            ]);
        }
        table.print(out)?;
        let t = &self.totals.usage;
        writeln!(out, "store  {} = {} unique + {} shared", t.store_bytes, t.unique_bytes, t.shared_bytes)?;
        let overhead = Bytes::new(t.overhead_bytes.unsigned_abs());
        let sign = if t.overhead_bytes < 0 { "-" } else { "+" };
        writeln!(out, "       + {} unreferenced {sign} {overhead} pack headers and indexes", t.dead_bytes)?;
        writeln!(
            out,
            "       + {} tables + {} sessions + {} other",
            t.table_bytes, t.session_bytes, t.other_bytes
        )?;
        writeln!(out, "cache  {}", cache(self.totals.cache_bytes))?;
        for lease in &self.leases {
            writeln!(out, "lease  {} process {}", lease.digest.short(), lease.name())?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        json!({
            "templates": to_json(&self.templates),
            "totals": to_json(&self.totals),
            "leases": to_json(&self.leases),
        })
    }
}

/// Runs `stencil du`.
///
/// # Errors
/// Returns an error if the store cannot be read.
pub fn run(_args: &DuArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let mut usage = store.usage(&*interrupt::flag()?, &*global.progress())?;
    let caches = caches(&store).map_err(|error| log::warn!("cannot measure the cache: {error}")).ok();
    let of = |digest: &Digest| caches.as_ref().map(|c| c.get(digest).copied().unwrap_or(Bytes::ZERO));
    let templates = std::mem::take(&mut usage.templates);
    let templates =
        templates.into_iter().map(|usage| Line { cache_bytes: of(&usage.digest), usage }).collect();
    let totals = Totals { usage, cache_bytes: caches.as_ref().map(|c| c.values().copied().sum()) };
    let leases = control::leases(&store).unwrap_or_else(|error| {
        log::warn!("cannot list leases: {error}");
        Vec::new()
    });
    Ok(Done::report(Usage { templates, totals, leases }))
}

/// Returns the size of the backings of each template in all mounts of the store, including removed templates.
fn caches(store: &Store) -> Result<BTreeMap<Digest, Bytes>> {
    let mut caches: BTreeMap<Digest, Bytes> = BTreeMap::new();
    for mount in control::mounts_of(store)? {
        for row in mount.snapshot()?.backings {
            let bytes = caches.entry(row.key.digest).or_insert(Bytes::ZERO);
            *bytes = Bytes::new(bytes.get() + row.reserved);
        }
    }
    Ok(caches)
}
