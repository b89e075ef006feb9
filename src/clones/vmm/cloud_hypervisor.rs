//! The directory from which Cloud Hypervisor restores one clone: `config.json` and `state.json` of the snapshot,
//! changed so that each memory zone is a private mapping of the template's memory file.
//!
//! A restore copies the ranges that `state.json` lists from `memory-ranges` into anonymous memory. Without such ranges
//! nothing is copied, and a zone with `file` and without `shared` is mapped with `MAP_PRIVATE`. Version 51 is the first
//! one that opens the file of such a zone read-only.

mod config;
mod state;

use std::path::Path;

use serde_json::Value;

use super::paste::{VmmArguments, shell_word};
use super::served::Served;
use crate::error::{Error, Result};

/// Files of a snapshot beside its memory.
pub(super) const FILES: [&str; 2] = ["config.json", "state.json"];

/// Characters that are syntax in the value of Cloud Hypervisor's `--restore`.
const SYNTAX: [char; 4] = [',', '"', '[', ']'];

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let memory = template.one_ram("a Cloud Hypervisor snapshot has one memory file")?;
    let mut config = document(template, FILES[0])?;
    let mut state = document(template, FILES[1])?;
    let dir = template.clone_dir.as_deref().ok_or_else(|| {
        Error::usage("missing option --dir: Cloud Hypervisor restores a clone from files in a directory")
            .hint("name a directory that exists, another one for each clone: --dir DIR")
    })?;
    if dir.contains(SYNTAX) {
        return Err(Error::usage(format!(
            "invalid directory '{dir}': Cloud Hypervisor cannot parse a path with one of {}",
            String::from_iter(SYNTAX)
        ))
        .hint("choose another directory"));
    }
    let refused = |error: Error| error.context(format!("template {}", template.name));
    state::convert(&mut state, memory.size, &config::zone_ids(&config)).map_err(refused)?;
    let mut notes = config::convert(&mut config, memory.path, dir).map_err(refused)?;
    notes.extend([
        "use Cloud Hypervisor 51 or later, which opens the memory file read-only, and add no prefault=on to --restore, \
         which copies all memory"
            .to_owned(),
        format!(
            "the restored guest is paused: resume it with ch-remote --api-socket {} resume",
            shell_word(&format!("{dir}/api.sock"))
        ),
    ]);
    let words = [
        "cloud-hypervisor".to_owned(),
        "--api-socket".to_owned(),
        format!("{dir}/api.sock"),
        "--restore".to_owned(),
        format!("source_url=file://{dir}"),
    ];
    let [program, values @ ..] = words.each_ref().map(|word| shell_word(word));
    let text = format!("{program} \\\n    {} {} \\\n    {} {}", values[0], values[1], values[2], values[3]);
    let written = [&config, &state].map(|json| serde_json::to_vec_pretty(json).unwrap_or_default());
    let files = FILES.iter().zip(written).map(|(name, bytes)| (Path::new(dir).join(name), bytes)).collect();
    Ok(VmmArguments { text, argv: Some(words.to_vec()), files, notes, ..VmmArguments::default() })
}

/// Returns a JSON file of the snapshot.
fn document(template: &Served, name: &str) -> Result<Value> {
    let bytes = template.documents.get(name).ok_or_else(|| {
        Error::usage(format!(
            "template {} has no file '{name}', which a Cloud Hypervisor snapshot has",
            template.name
        ))
        .hint("import the directory of the snapshot: stencil import DIR NAME")
    })?;
    serde_json::from_slice(bytes)
        .map_err(|e| Error::usage(format!("cannot parse file '{name}' of template {}: {e}", template.name)))
}

#[cfg(test)]
mod tests;
