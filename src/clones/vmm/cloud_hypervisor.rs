//! The directory from which Cloud Hypervisor restores one clone: `config.json` and `state.json` of the snapshot,
//! changed so that each memory zone is a private mapping of the template's memory file.
//!
//! A restore copies the ranges that `state.json` lists from `memory-ranges` into anonymous memory. Without such ranges
//! nothing is copied, and a zone with `file` and without `shared` is mapped with `MAP_PRIVATE`. Version 51 is the first
//! one that opens the file of such a zone read-only.

mod config;
mod state;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::paste::{VmmArguments, shell_word};
use super::served::Served;
use crate::error::{Error, Result};

/// Files of a snapshot beside its memory.
pub(super) const FILES: [&str; 2] = ["config.json", "state.json"];

/// Characters that are syntax in the value of Cloud Hypervisor's `--restore`.
const SYNTAX: [char; 4] = [',', '"', '[', ']'];

/// The files of one clone, as JSON.
struct Converted {
    config: Value,
    state: Value,
    notes: Vec<String>,
}

impl Converted {
    /// Returns the files with their paths and contents.
    fn files(&self, dir: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let written =
            [&self.config, &self.state].map(|json| serde_json::to_vec_pretty(json).unwrap_or_default());
        FILES.iter().zip(written).map(|(name, bytes)| (Path::new(dir).join(name), bytes)).collect()
    }
}

fn convert(template: &Served, dir: &str) -> Result<Converted> {
    let memory = template.one_ram("a Cloud Hypervisor snapshot has one memory file")?;
    let mut config = document(template, FILES[0])?;
    let mut state = document(template, FILES[1])?;
    if dir.contains(SYNTAX) {
        return Err(Error::usage(format!(
            "invalid directory '{dir}': Cloud Hypervisor cannot parse a path that contains {}",
            SYNTAX.map(|c| format!("'{c}'")).join(" or ")
        ))
        .hint("choose a directory without these characters"));
    }
    let refused = |error: Error| error.context(format!("template {}", template.name));
    state::convert(&mut state, memory.size, &config::zone_ids(&config)).map_err(refused)?;
    let notes = config::convert(&mut config, memory.path, dir).map_err(refused)?;
    Ok(Converted { config, state, notes })
}

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    // The check for the files of a snapshot comes before the check for the option.
    let dir = template.clone_dir.as_deref();
    let converted = convert(template, dir.unwrap_or_default())?;
    let dir = dir.ok_or_else(|| {
        Error::usage("missing option --dir: Cloud Hypervisor restores a clone from files in a directory")
            .hint("name a directory that exists, another one for each clone: --dir DIR")
    })?;
    let files = converted.files(dir);
    let mut notes = converted.notes;
    let shared = config::shared(&converted.config);
    if !shared.is_empty() {
        notes.push(format!(
            "each clone opens the same host resources as the source VM: {}; before a second clone runs, give \
             that clone other resources in its config.json",
            shared.join(", ")
        ));
    }
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
    Ok(VmmArguments { text, argv: Some(words.to_vec()), files, notes, ..VmmArguments::default() })
}

/// Returns the files of one clone that `stencil clone` launches, with their contents. `taps` has the id of network
/// devices, and the TAP device of the host for each. Terminals of the source VM become logs in the directory.
///
/// # Errors
/// Same as [`paste`](fn@super::paste), and [`Code::Usage`](crate::error::Code::Usage) if the snapshot has no network
/// device with such an id.
pub fn clone_files(
    template: &Served,
    dir: &Path,
    taps: &[(String, String)],
) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let dir = dir.to_str().ok_or_else(|| {
        Error::usage("invalid directory of a clone: the path is not UTF-8")
            .at(dir)
            .hint("set STENCIL_RUNTIME_DIR to another path")
    })?;
    let mut converted = convert(template, dir)?;
    config::log_terminals(&mut converted.config, dir);
    config::set_taps(&mut converted.config, taps)?;
    Ok(converted.files(dir))
}

/// Checks the snapshot for a launch of `count` clones, and returns notes for the user. `taps` has the id of each
/// network device that gets another TAP device, and the name of that device with placeholders.
///
/// # Errors
/// Same as [`clone_files`], and [`Code::Usage`](crate::error::Code::Usage) with the name of a disk or TAP device to
/// which several clones would write.
pub fn check_launch(template: &Served, taps: &[(String, String)], count: u32) -> Result<Vec<String>> {
    let mut converted = convert(template, "")?;
    let written = config::written(&converted.config, taps);
    config::set_taps(&mut converted.config, taps)?;
    match written.first() {
        Some(device) if count > 1 => {
            Err(Error::usage(format!("cannot launch several clones: each would write to {device}")).hint(
                "make a disk read-only, or give it a relative path, before the snapshot; give each clone a TAP device with \
                 --network ID=tap-{index}; or launch one clone",
            ))
        }
        _ => Ok(converted.notes),
    }
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
