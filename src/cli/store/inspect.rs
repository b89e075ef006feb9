//! `stencil inspect`: reports the properties of one template.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::clones::counted;
use crate::clones::recipe::Recipe;
use crate::control::{LeaseHolder, leases};
use crate::error::{Error, Result};
use crate::sanitize::{sanitize, sanitize_lines, utc};
use crate::store::{Digest, Store, TemplateFile, TemplateRef};
use crate::units::Bytes;

/// Show the properties of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil inspect web:1
  stencil inspect web:1 --recipe > recipe.json")]
pub struct InspectArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Show only the launch recipe, in the form that `recipe edit --from` reads
    #[arg(long)]
    recipe: bool,
}

/// The recipe of one template, in the form for editing.
#[derive(Serialize)]
struct RecipeAlone {
    digest: Digest,
    recipe: Value,
}

impl Report for RecipeAlone {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        match Recipe::from_value(&self.recipe) {
            Ok(recipe) => out.write_all(sanitize_lines(&recipe.to_text()).as_bytes()),
            Err(_) => writeln!(out, "{}", sanitize_lines(&format!("{:#}", self.recipe))),
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
    /// Permission bits in octal, as for chmod(1).
    mode: String,
    uid: u32,
    gid: u32,
    created: u64,
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    recipe: Option<Value>,
    /// Commands that rely on the template at this moment.
    leases: Vec<LeaseHolder>,
}

impl Report for Inspection {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "digest   {}", self.digest)?;
        writeln!(out, "tags     {}", if self.tags.is_empty() { "-".into() } else { self.tags.join(" ") })?;
        writeln!(out, "size     {} ({} bytes)", self.size_bytes, self.size_bytes.get())?;
        writeln!(out, "data     {} ({} bytes)", self.data_bytes, self.data_bytes.get())?;
        let packs = counted(self.packs as u64, "pack", "packs");
        writeln!(out, "stored   {} in {packs}", self.stored_bytes)?;
        writeln!(out, "mode     {}", self.mode)?;
        writeln!(out, "owner    {}:{}", self.uid, self.gid)?;
        writeln!(out, "created  {}", utc(self.created))?;
        for (key, value) in &self.labels {
            writeln!(out, "label    {}={}", sanitize(key), sanitize(value))?;
        }
        for file in &self.files {
            let kind = file.kind.name();
            writeln!(
                out,
                "file     {} {kind} {} ({} data)",
                sanitize(&file.name),
                file.size,
                file.data_bytes
            )?;
        }
        for lease in &self.leases {
            writeln!(out, "lease    process {}", lease.name())?;
        }
        if let Some(recipe) = &self.recipe {
            let text = |key| sanitize(recipe.get(key).and_then(Value::as_str).unwrap_or("?"));
            writeln!(out, "recipe   {} {} (printed by --recipe)", text("vmm"), text("vmm_version"))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil inspect`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist, and `Code::Damage` if the template is damaged.
pub fn run(args: &InspectArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let template = store.template(&digest)?;
    let tags = store.tags()?.into_iter().filter(|t| t.digest == digest);
    let policy = template.policy();
    if args.recipe {
        let recipe = policy.recipe.clone().ok_or_else(|| {
            Error::not_found(Recipe::missing(digest)).hint("add a recipe: stencil recipe edit --from FILE")
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

/// Returns the leases of the store. A user who cannot read the runtime directory gets a warning instead.
fn held(store: &Store) -> Vec<LeaseHolder> {
    leases(store).unwrap_or_else(|error| {
        log::warn!("cannot list leases: {error}");
        Vec::new()
    })
}
