//! `stencil verify`: reads everything and names what is damaged.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::output::{Done, Report, to_json};
use super::words::word;
use super::{Global, interrupt};
use crate::error::{Code, Result};
use crate::store::{Affected, Damage, Digest, Store, TemplateRef, Verified};

/// Damaged records of one pack that are printed; `--json` has all of them.
const SHOWN: usize = 20;

/// Compare everything that is stored with its checksums
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// This template only; without it the whole store
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: Option<TemplateRef>,
}

#[derive(Serialize)]
struct VerifyReport {
    #[serde(flatten)]
    verified: Verified,
    /// Tags by digest, of templates that are affected.
    tags: BTreeMap<Digest, Vec<String>>,
}

impl VerifyReport {
    /// Damage that nobody needs is named, but it is no failure.
    fn exit(&self) -> Option<Code> {
        let harmless = self.verified.damages.iter().all(Damage::is_unused);
        (!harmless).then_some(Code::Damage)
    }

    fn affected(&self, affected: &Affected) -> String {
        let name = match self.tags.get(&affected.digest).and_then(|tags| tags.first()) {
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
            writeln!(out, "  affects no template: it only takes space")?;
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
            if *count <= SHOWN {
                self.damage(damage, out)?;
            }
        }
        for (path, count) in shown.iter().filter(|(_, count)| **count > SHOWN) {
            writeln!(out, "damaged: {} and {} more records", path.display(), count - SHOWN)?;
        }
        let Verified { templates, packs, blocks, stored_bytes, damages } = &self.verified;
        let checked = format!("{templates} templates, {packs} packs, {blocks} blocks ({stored_bytes})");
        match damages.len() {
            0 => writeln!(out, "verified {checked}: no damage"),
            count => {
                writeln!(out, "verified {checked}: {count} damaged places")?;
                match self.exit() {
                    Some(_) => {
                        writeln!(out, "to repair a template import the same memory again, under any name")
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

/// Runs it.
///
/// # Errors
/// When there is no such template or the store cannot be read. Damage is a result with exit code 3.
pub fn run(args: &VerifyArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let only = args.template.as_ref().map(|t| store.resolve(t)).transpose()?;
    let stop = interrupt::flag()?;
    let verified = store.verify(only.as_ref(), &stop, &*global.progress())?;
    let mut tags: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    if !verified.damages.is_empty() {
        let names = store.tags().inspect_err(|error| log::warn!("{error}")).unwrap_or_default();
        for tag in names {
            let hit = verified.damages.iter().flat_map(|d| &d.affects).any(|a| a.digest == tag.digest);
            if hit {
                tags.entry(tag.digest).or_default().push(format!("{}:{}", tag.name, tag.tag));
            }
        }
    }
    let report = VerifyReport { verified, tags };
    let exit = report.exit();
    let done = Done::report(report);
    Ok(match exit {
        Some(code) => done.exit_as(code),
        None => done,
    })
}
