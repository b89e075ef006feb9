//! `stencil verify`: checks all stored data and lists damage.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::error::{Code, Result};
use crate::store::{Affected, Damage, Digest, Store, TemplateRef, Verified};

/// Number of damaged records of one pack that are printed; `--json` lists all of them.
const MAX_PRINTED: usize = 20;

/// Verify all stored data against its checksums
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil verify
  stencil verify web:1
  stencil verify --json")]
pub struct VerifyArgs {
    /// Template to verify instead of the whole store
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: Option<TemplateRef>,
}

#[derive(Serialize)]
struct VerifyReport {
    #[serde(flatten)]
    verified: Verified,
    /// Templates that at least one of the damages affects.
    affected: Vec<AffectedTemplate>,
}

#[derive(Serialize)]
struct AffectedTemplate {
    digest: Digest,
    tags: Vec<String>,
}

impl VerifyReport {
    /// Returns the exit code. Damage of unreferenced records is reported, but is not a failure.
    fn exit(&self) -> Option<Code> {
        let harmless = self.verified.damages.iter().all(Damage::is_unused);
        (!harmless).then_some(Code::Damage)
    }

    fn affected(&self, affected: &Affected) -> String {
        let template = self.affected.iter().find(|template| template.digest == affected.digest);
        let name = match template.and_then(|template| template.tags.first()) {
            Some(tag) => format!("{tag} ({})", affected.digest.short()),
            None => affected.digest.to_string(),
        };
        match &affected.file {
            Some(file) => format!("{name}/{file}"),
            None => name,
        }
    }

    fn damage(&self, damage: &Damage, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "damaged: {}", damage.path.display())?;
        if let Some(offset) = damage.offset {
            write!(out, " offset {offset}")?;
        }
        writeln!(out, ": {}", damage.message)?;
        if damage.is_unused() {
            writeln!(out, "  affects no template: the record is unreferenced and only takes space")?;
        }
        for affected in &damage.affects {
            writeln!(out, "  affects {}", self.affected(affected))?;
        }
        Ok(())
    }
}

impl Report for VerifyReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut shown: BTreeMap<_, usize> = BTreeMap::new();
        for damage in &self.verified.damages {
            let count = shown.entry(&damage.path).or_default();
            *count += 1;
            if *count <= MAX_PRINTED {
                self.damage(damage, out)?;
            }
        }
        for (path, count) in shown.iter().filter(|(_, count)| **count > MAX_PRINTED) {
            let more = counted((count - MAX_PRINTED) as u64, "more record", "more records");
            writeln!(out, "damaged: {} and {more}", path.display())?;
        }
        let Verified { templates, packs, blocks, stored_bytes, damages } = &self.verified;
        let checked = format!(
            "{}, {}, {} ({stored_bytes})",
            counted(*templates, "template", "templates"),
            counted(*packs, "pack", "packs"),
            counted(*blocks, "block", "blocks")
        );
        match damages.len() as u64 {
            0 => writeln!(out, "verified {checked}: no damage"),
            count => {
                writeln!(out, "verified {checked}: {}", counted(count, "damaged place", "damaged places"))?;
                match self.exit() {
                    Some(_) => {
                        writeln!(out, "to repair a template, import the same memory again, under any name")
                    }
                    None => Ok(()),
                }
            }
        }
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil verify`. Damage is a result with exit code 3, not an error.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist, and an error if the store cannot be read.
pub fn run(args: &VerifyArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let only = args.template.as_ref().map(|t| store.resolve(t)).transpose()?;
    let stop = interrupt::flag()?;
    let verified = store.verify(only.as_ref(), &stop, &*global.progress())?;
    let affected: BTreeSet<Digest> =
        verified.damages.iter().flat_map(|damage| &damage.affects).map(|affected| affected.digest).collect();
    let names = match affected.is_empty() {
        true => Vec::new(),
        false => store.tags().inspect_err(|error| log::warn!("{error}")).unwrap_or_default(),
    };
    let tags = |digest| {
        let tags = names.iter().filter(|tag| tag.digest == digest);
        tags.map(|tag| format!("{}:{}", tag.name, tag.tag)).collect()
    };
    let affected = affected.iter().map(|digest| AffectedTemplate { digest: *digest, tags: tags(*digest) });
    let report = VerifyReport { affected: affected.collect(), verified };
    let exit = report.exit();
    let done = Done::report(report);
    Ok(match exit {
        Some(code) => done.exit_as(code),
        None => done,
    })
}
