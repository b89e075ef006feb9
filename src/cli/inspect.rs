//! `stencil inspect`: all about one template.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::output::{Done, Report, to_json};
use super::words::word;
use crate::clones::recipe::Recipe;
use crate::control::{LeaseHolder, leases};
use crate::error::{Error, Result};
use crate::shown::{shown, shown_lines};
use crate::store::{Digest, Store, TemplateFile, TemplateRef};
use crate::units::Bytes;

/// Show one template
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Show its launch recipe alone, as `recipe edit` takes it
    #[arg(long)]
    recipe: bool,
}

/// The recipe of one template, in the form that is edited.
#[derive(Serialize)]
struct RecipeAlone {
    digest: Digest,
    recipe: Value,
}

impl Report for RecipeAlone {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        match Recipe::from_value(&self.recipe) {
            Ok(recipe) => out.write_all(shown_lines(&recipe.to_text()).as_bytes()),
            Err(_) => writeln!(out, "{}", shown_lines(&format!("{:#}", self.recipe))),
        }
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

#[derive(Serialize)]
struct Inspection {
    digest: Digest,
    tags: Vec<String>,
    files: Vec<TemplateFile>,
    size_bytes: Bytes,
    data_bytes: Bytes,
    stored_bytes: Bytes,
    packs: usize,
    /// In octal, as chmod takes it.
    mode: String,
    uid: u32,
    gid: u32,
    created: u64,
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    recipe: Option<Value>,
    /// Who relies on it just now.
    leases: Vec<LeaseHolder>,
}

impl Report for Inspection {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "digest   {}", self.digest)?;
        writeln!(out, "tags     {}", if self.tags.is_empty() { "-".into() } else { self.tags.join(" ") })?;
        writeln!(out, "size     {} ({} bytes)", self.size_bytes, self.size_bytes.get())?;
        writeln!(out, "data     {} ({} bytes)", self.data_bytes, self.data_bytes.get())?;
        writeln!(out, "stored   {} in {} packs", self.stored_bytes, self.packs)?;
        writeln!(out, "mode     {}", self.mode)?;
        writeln!(out, "owner    {}:{}", self.uid, self.gid)?;
        writeln!(out, "created  {} (seconds since 1970)", self.created)?;
        for (key, value) in &self.labels {
            writeln!(out, "label    {}={}", shown(key), shown(value))?;
        }
        for file in &self.files {
            let kind = file.kind.name();
            writeln!(out, "file     {} {kind} {} ({} data)", shown(&file.name), file.size, file.data_bytes)?;
        }
        for lease in &self.leases {
            writeln!(out, "lease    process {}", lease.name())?;
        }
        if let Some(recipe) = &self.recipe {
            let text = |key| shown(recipe.get(key).and_then(Value::as_str).unwrap_or("?"));
            writeln!(out, "recipe   {} {} (--recipe shows it)", text("vmm"), text("vmm_version"))?;
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
/// When there is no such template or it is damaged.
pub fn run(args: &InspectArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let template = store.template(&digest)?;
    let tags = store.tags()?.into_iter().filter(|t| t.digest == digest);
    let policy = template.policy();
    if args.recipe {
        let recipe = policy.recipe.clone().ok_or_else(|| {
            Error::not_found(format!("template {digest} has no launch recipe: it was not captured from a VM"))
                .remedy("give it one with `stencil recipe edit --from FILE`")
        })?;
        return Ok(Done::report(RecipeAlone { digest, recipe }));
    }
    Ok(Done::report(Inspection {
        digest,
        tags: tags.map(|t| format!("{}:{}", t.name, t.tag)).collect(),
        files: template.files().to_vec(),
        size_bytes: template.size(),
        data_bytes: template.data_bytes(),
        stored_bytes: template.stored_bytes(),
        packs: template.packs().len(),
        mode: format!("{:04o}", policy.mode),
        uid: policy.uid,
        gid: policy.gid,
        created: policy.created,
        labels: policy.labels.clone(),
        recipe: policy.recipe.clone(),
        leases: held(&store).into_iter().filter(|l| l.digest == digest).collect(),
    }))
}

/// Who may not read the runtime directory still sees the template.
fn held(store: &Store) -> Vec<LeaseHolder> {
    leases(store).unwrap_or_else(|error| {
        log::warn!("leases are not listed: {error}");
        Vec::new()
    })
}
